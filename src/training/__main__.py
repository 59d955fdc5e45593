"""python -m src.training ema | mix: weights between those that were trained."""

import argparse
from pathlib import Path

import torch

from src.errors import one_line_errors
from src.training.ema import mix, rebuild
from src.utils import refuse_others_folder, save_weights, writing_checkpoint


def write_average(args: argparse.Namespace) -> None:
    step, origin, state = rebuild(args.run_dir, args.sigma_rel, args.step)
    target = args.run_dir / f"ema_{step}_{args.sigma_rel:g}.pt"
    with writing_checkpoint(target) as temporary:
        torch.save({"state_dict": state, **origin}, temporary)
    print(f"{target}: python sampling.py --ckpt_path {target}")


def write_mixture(args: argparse.Namespace) -> None:
    target = args.out / "final_model.pt"
    refuse_others_folder(args.out, target.name, args.end, args.start)
    mixed = mix(args.end, args.start, args.share)
    save_weights(mixed["state_dict"], target, mixed["model_config"], provenance=mixed["provenance"])
    print(f"{target}: python sampling.py --ckpt_path {target}")


def main() -> None:
    root = argparse.ArgumentParser(prog="python -m src.training")
    commands = root.add_subparsers(required=True, metavar="command")

    def command(name: str, run, about: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=about, description=about)
        parser.set_defaults(run=run)
        return parser

    parser = command("ema", write_average, "rebuild a power-function average of the weights, of another length")
    parser.add_argument("run_dir", type=Path, help="a folder that train.py wrote")
    parser.add_argument("--sigma_rel", type=float, required=True, help="width as a share of the stage so far")
    parser.add_argument("--step", type=int, help="one that the run saved at; left out, the last")

    parser = command("mix", write_mixture, "average a model with an earlier one that it was trained from")
    parser.add_argument("end", type=Path, help="a checkpoint, with its model_config.json beside it")
    parser.add_argument("start", type=Path, help="a checkpoint that its stages went on from")
    parser.add_argument("--share", type=float, required=True, help="of the start, between 0 and 1")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")

    args = root.parse_args()
    args.run(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
