"""python -m src.training ema | mix: weights between those that were trained."""

import argparse
from pathlib import Path

import torch

from src.training.ema import rebuilding_weights
from src.utils import (
    UserError,
    objective_of,
    one_line_errors,
    read_checkpoint,
    read_config,
    refuse_others_folder,
    restore_quantised,
    save_weights,
    weights_of,
    writing_checkpoint,
)


def rebuild(run: Path, sigma_rel: float, step: int | None) -> tuple[int, dict, dict[str, torch.Tensor]]:
    """The average of relative width `sigma_rel` at `step` (None: the last kept): step, origin, float32 weights.

    The width is relative to the steps of the stage that the step belongs to; the origin is `model_config` and
    `provenance`.

    Raises: UserError if the run kept no averages, or the width is outside of what they can tell.
    """
    if not 0.01 <= sigma_rel <= 0.25:
        raise UserError(f"--sigma_rel must lie between 0.01 and 0.25, got {sigma_rel}")
    steps = sorted(int(path.stem) for path in (run / "averages").glob("*.pt"))
    if step is None:
        step = steps[-1] if steps else 0
    steps = [kept for kept in steps if kept <= step]
    if not steps or steps[-1] != step:
        raise UserError(f"{run}/averages holds none of step {step}: its steps are {steps or 'none'}")
    files = [read_checkpoint(run / f"averages/{kept}.pt") for kept in steps]
    last = files[-1]
    kept = [
        (file["age"], float(sigma), average)
        for file in files
        if file["stage"] == last["stage"]
        for sigma, average in file["averages"].items()
    ]
    weights, error = rebuilding_weights([(age, sigma) for age, sigma, _ in kept], last["age"], sigma_rel)
    if error > 0.05:
        raise UserError(
            f"the averages kept at {steps} cannot tell the one of width {sigma_rel} at {step} (they miss it by "
            f"{100 * error:.0f} %): save more often, or ask for a width between 0.05 and 0.1"
        )
    names = kept[0][2]
    return (
        step,
        {"model_config": last["model_config"], "provenance": last.get("provenance", {})},  # older runs kept none
        {
            name: sum(float(w) * average[name].float() for w, (_, _, average) in zip(weights, kept, strict=True))
            for name in names
        },
    )


def mix(end: Path, start: Path, share: float) -> dict:
    """The checkpoint `end` with the float32 weights (1 - share) end + share start (arXiv:2109.01903, section 3).

    The last of its `stages` tells of it.

    Raises: UserError if the share is not between 0 and 1, `end` is a mixture itself or was not trained from `start`.
    """
    if not 0 < share < 1:
        raise UserError(f"--share must lie between 0 and 1, got {share}")
    saved, other = read_checkpoint(end), read_checkpoint(start)
    config = read_config(end.with_name("model_config.json"))
    states = [weights_of(checkpoint, path) for checkpoint, path in ((saved, end), (other, start))]
    for state in states:
        restore_quantised(state)
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    provenance = saved.get("provenance", {})
    stages, begun = (checkpoint.get("provenance", {}).get("stages", []) for checkpoint in (saved, other))
    if shapes[0] != shapes[1] or not 0 < len(begun) < len(stages) or stages[: len(begun)] != begun:
        raise UserError(f"{end} was not trained from {start}: mix a model with one that its stages went on from")
    last = stages[-1]
    if "mixed" in last:
        raise UserError(f"{end} is a mixture already: name the model that it was made of")
    return {
        "state_dict": {name: value.float().lerp(states[1][name].float(), share) for name, value in states[0].items()},
        "model_config": config | objective_of(saved),
        "provenance": {
            **provenance,
            "stages": [
                *stages[:-1],
                {
                    **last,
                    "citations": [*last["citations"], "wortsman2022robust"],
                    "mixed": {"share": share, "stages": len(begun)},
                },
            ],
        },
    }


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

    parser = command("ema", write_average, "rebuild an average of the weights of another length")
    parser.add_argument("run_dir", type=Path, help="a folder that train.py wrote")
    parser.add_argument("--sigma_rel", type=float, required=True, help="width as a share of the stage so far")
    parser.add_argument("--step", type=int, help="one that the run saved at; left out, the last")

    parser = command("mix", write_mixture, "a model's weights, and a share of those it was trained from")
    parser.add_argument("end", type=Path, help="a checkpoint, with its model_config.json beside it")
    parser.add_argument("start", type=Path, help="a checkpoint that its stages went on from")
    parser.add_argument("--share", type=float, required=True, help="of the start, between 0 and 1")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")

    args = root.parse_args()
    args.run(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
