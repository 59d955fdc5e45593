"""Train the winning chain from nothing in a given time, on a GPU that is rented by the minute.

    python -m benchmarks.timed_chain --minutes 10 --out results/gpu -- --data_root ROOT --split_dir SPLIT

The flow trains in a process of its own. Meanwhile this one compiles what the later stages need, by a step of each in a
scratch folder. When that is done and the flow's share of the minutes is over, it stops the flow and trains the later
stages from its average, in as many steps as the flow's speed says are left. What follows `--` goes to train.py, where
it may set what this script does not (--warmup and --save_interval are the flow's; the later stages warm up for a tenth
of alpha-Flow, and save five times). Writes OUT/flow and OUT/chain, each as train.py does; interrupted, the same command
goes on from their last save.
"""

import argparse
import gc
import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch

import train
from benchmarks.objectives import split_flags
from src.objectives import parse_stages
from src.utils import UserError, one_line_errors

FLOW = "--stages rectified_flow:1 --use_additional_condition --num_iterations 1000000".split()
# What this script tells train.py itself.
OURS = "stages objective use_additional_condition num_iterations batch_size save_dir max_minutes dry_run".split()
KEPT = "stages num_iterations warmup save_interval".split()  # of the later stages, when they go on
# A sample's time in that of the flow's, measured on an H200; the adversarial stage's was 5.6 when a sample took 12.9
# network evaluations (the small network's), which are 11.0 by now.
COST = {"alpha_flow": 1.13, "adversarial": 4.7}


def train_here(*arguments: str) -> None:
    """train.py in this process, where what was compiled before is found again."""
    sys.argv = ["train.py", *arguments]
    train.main()
    gc.collect()
    torch.cuda.empty_cache()


def speed(run: Path) -> float:
    """Images a second near the end of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return median([row["images_per_second"] for row in rows if "images_per_second" in row][-5:])


def steps_in(seconds: float, alpha_share: float, images_per_second: float, batch_size: int) -> tuple[int, int]:
    """Steps of alpha-Flow, for a share of the time, and of the adversarial stage, for the rest."""
    shares = {"alpha_flow": alpha_share, "adversarial": 1 - alpha_share}
    alpha, adversarial = (seconds * shares[k] * images_per_second / COST[k] / batch_size for k in COST)
    if min(alpha, adversarial) < 1:
        raise UserError(f"{seconds:.0f} seconds are left after the flow, which do not fit a step: raise --minutes")
    return int(alpha), int(adversarial)


def later(adversarial: str, alpha_steps: int, adversarial_steps: int) -> list[str]:
    """The stages after the flow, as flags of train.py."""
    steps = alpha_steps + adversarial_steps
    share = alpha_steps / steps
    stages = f"alpha_flow:{share},{adversarial}:{1 - share}"
    flags = ["--stages", stages, "--num_iterations", str(steps), "--warmup", str(max(1, alpha_steps // 10))]
    return [*flags, "--save_interval", str(max(1, steps // 5))]  # the machine may be taken back


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="in all, but for the last export")
    parser.add_argument("--flow_share", type=float, default=0.6, help="of the minutes, or what compiling takes")
    parser.add_argument("--alpha_share", type=float, default=0.25, help="of what the flow leaves")
    last_stage = parse_stages(train.CHAIN)[-1][0]
    parser.add_argument("--adversarial", default=last_stage, metavar="NAME[/OPTION=VALUE...]")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    ours, theirs = split_flags(OURS)
    args = parser.parse_args(ours)
    common = [*theirs, "--batch_size", str(args.batch_size)]
    flow, chain, scratch = (args.out / name for name in ("flow", "chain", "scratch"))

    ended = args.out / "flow.ended"
    if not ended.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        with (args.out / "flow.log").open("a") as log:
            command = [sys.executable, "train.py", *common, *FLOW, "--max_minutes", str(args.minutes)]
            process = subprocess.Popen([*command, "--save_dir", str(flow)], stdout=log, stderr=subprocess.STDOUT)
        try:
            try:
                train_here(*common, *later(args.adversarial, 1, 1), "--save_dir", str(scratch))
            except UserError:  # a mistake, or an interruption
                raise
            except Exception as fault:  # such as no memory for both at once: these stages may have their turn
                print(f"warning: the later stages did not compile beside the flow: {fault}", file=sys.stderr)
            print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, 60 * args.minutes * args.flow_share - (time.monotonic() - began)))
                raise UserError(f"the flow ended by itself: {args.out}/flow.log says why")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            process.terminate()  # train.py saves
            process.wait()
        if not (flow / "last.ckpt").exists():
            raise UserError(f"the flow did not come to its first step ({args.out}/flow.log): raise --minutes")
        ended.touch()

    left = 60 * args.minutes - (time.monotonic() - began)
    alpha, adversarial = steps_in(left, args.alpha_share, speed(flow), args.batch_size)
    if (chain / "training_config.json").exists():
        kept = json.loads((chain / "training_config.json").read_text())
        rest = [part for key in KEPT for part in (f"--{key}", str(kept[key]))]
    else:
        rest = later(args.adversarial, alpha, adversarial)
    teacher = ["--teacher", str(flow / "last.ckpt")]
    train_here(*common, *rest, *teacher, "--max_minutes", str(left / 60), "--save_dir", str(chain))


if __name__ == "__main__":
    with one_line_errors():
        main()
