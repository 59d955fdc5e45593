"""Train a chain of stages in a given time, on a GPU that is rented by the minute.

    python -m benchmarks.timed_chain --minutes 10 --stages rectified_flow:0.6,alpha_flow:0.4 \
        --out results/gpu -- --data_root ROOT --split_dir SPLIT

The shares are of the time, where train.py's are of the steps: a few steps of each stage, in OUT/trial, tell their
speeds, and so how many fit. What follows `--` goes to train.py. Writes OUT/chain as train.py does; interrupted, the
same command goes on from its last save, with the steps that were planned.
"""

import argparse
import gc
import json
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import torch

import train
from src.errors import UserError, one_line_errors
from src.evaluation.launch import split_flags
from src.objectives import parse_objective, parse_stages

TRIAL = 8  # steps of each stage
SAVES = 5  # the machine may be taken back
RESERVE = 0.06  # of the minutes, for those
# What this script tells train.py itself, and what would spend the minutes on scores.
OURS = "stages objective num_iterations batch_size save_dir save_interval max_minutes dry_run eval_interval".split()
KEPT = "stages num_iterations save_interval".split()  # when an interrupted chain goes on


def train_here(*arguments: str) -> None:
    """train.py in this process, where what was compiled before is found again."""
    sys.argv = ["train.py", *arguments]
    train.main()
    gc.collect()
    torch.cuda.empty_cache()


def speeds(trial: Path) -> list[float]:
    """Images a second of each stage, from its second half, when all is compiled."""
    rows = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    stages = [[row["images_per_second"] for row in rows if row["stage"] == i] for i in range(rows[-1]["stage"] + 1)]
    return [median(found[len(found) // 2 :]) for found in stages]


def fitted(
    shares: list[tuple[str, float]], seconds: float, images_per_second: list[float], batch_size: int
) -> tuple[str, int]:
    """Stages with shares of the steps, as --stages writes them, and the number of steps that fit the seconds."""
    pairs = zip(shares, images_per_second, strict=True)
    steps = [int(seconds * share * speed / batch_size) for (_, share), speed in pairs]
    if min(steps) < 1:
        raise UserError(f"{seconds:.0f} seconds are left, which do not fit a step of each stage: raise --minutes")
    stages = ",".join(f"{name}:{count / sum(steps)!r}" for (name, _), count in zip(shares, steps, strict=True))
    return stages, sum(steps)


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="in all, but for the last export")
    parser.add_argument("--stages", required=True, metavar="OBJECTIVE:SHARE,...", help="shares of the time")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    ours, theirs = split_flags(OURS)
    args = parser.parse_args(ours)
    if "RANK" in os.environ:
        raise UserError("torchrun's processes end with the trial, the first of two runs: start it without torchrun")
    shares = parse_stages(args.stages)
    for name, _ in shares:
        if parse_objective(name)[0].pairs:
            raise UserError(
                f"{name} generates pairs, twice here and beyond the minutes: use train.py, which does it once"
            )
    common = [*theirs, "--batch_size", str(args.batch_size)]
    chain, trial = args.out / "chain", args.out / "trial"

    if (chain / "training_config.json").exists():
        kept = json.loads((chain / "training_config.json").read_text())
        before, now = ([name for name, _ in parse_stages(text)] for text in (kept["stages"], args.stages))
        if before != now:
            raise UserError(f"{chain} trains {', '.join(before)}, not {', '.join(now)}: choose another --out")
        plan = [part for key in KEPT for part in (f"--{key}", str(kept[key]))]
    else:
        shutil.rmtree(trial, ignore_errors=True)
        count = TRIAL * len(shares)
        equal = ",".join(f"{name}:{1 / len(shares)!r}" for name, _ in shares)
        few = ["--stages", equal, "--num_iterations", str(count), "--log_interval", "1"]
        train_here(*common, *few, "--save_interval", str(count + 1), "--save_dir", str(trial))
        found = speeds(trial)
        shutil.rmtree(trial)
        left = 60 * args.minutes * (1 - RESERVE) - (time.monotonic() - began)
        stages, steps = fitted(shares, left, found, args.batch_size)
        for (name, _), speed in zip(shares, found, strict=True):
            print(f"{name}: {speed:.1f} images a second")
        print(f"{steps} steps fit: {stages}", flush=True)
        plan = ["--stages", stages, "--num_iterations", str(steps), "--save_interval", str(-(-steps // SAVES))]
    left = args.minutes - (time.monotonic() - began) / 60
    train_here(*common, *plan, "--max_minutes", str(left), "--save_dir", str(chain))


if __name__ == "__main__":
    with one_line_errors():
        main()
