"""python -m src.training ema RUN: rebuild an average of another length from the ones a run kept."""

import argparse
from pathlib import Path

import torch

from src.training.ema import rebuilding_weights
from src.utils import UserError, one_line_errors, read_checkpoint, writing_checkpoint


def rebuild(run: Path, sigma_rel: float, step: int | None) -> tuple[int, dict, dict[str, torch.Tensor]]:
    """The average of relative width `sigma_rel` at `step` (None: the last kept): step, origin, float32 weights.

    The width is relative to the steps of the stage that the step belongs to; the origin is `model_config` and
    `provenance`.

    Raises: UserError if the run kept no averages, or the width is outside of what they can tell.
    """
    if not 0.01 <= sigma_rel <= 0.25:
        raise UserError(f"--sigma_rel must lie between 0.01 and 0.25, got {sigma_rel}")
    steps = sorted(int(path.stem) for path in (run / "averages").glob("*.pt"))
    step = step or (steps[-1] if steps else 0)
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


def main() -> None:
    root = argparse.ArgumentParser(prog="python -m src.training")
    commands = root.add_subparsers(required=True, metavar="command")
    parser = commands.add_parser("ema", help="rebuild an average of the weights of another length")
    parser.add_argument("run_dir", type=Path, help="a folder that train.py wrote")
    parser.add_argument("--sigma_rel", type=float, required=True, help="width as a share of the stage so far")
    parser.add_argument("--step", type=int, help="one that the run saved at; left out, the last")
    args = root.parse_args()

    step, origin, state = rebuild(args.run_dir, args.sigma_rel, args.step)
    target = args.run_dir / f"ema_{step}_{args.sigma_rel:g}.pt"
    with writing_checkpoint(target) as temporary:
        torch.save({"state_dict": state, **origin}, temporary)
    print(f"{target}: python sampling.py --ckpt_path {target}")


if __name__ == "__main__":
    with one_line_errors():
        main()
