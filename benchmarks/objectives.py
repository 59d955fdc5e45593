"""Objectives side by side: trained from one model for the same number of network evaluations, scored at NFE 1, 2, 4.

    python -m benchmarks.objectives --start RUN/final_model.pt --data_root ROOT --split_dir SPLIT --features FILE \
        --budget 300000 --objectives shortcut alpha_flow distribution_matching -- --batch_size 32 --lr 4e-4

The budget is in forward passes of the network on one image; a backward pass counts two, teachers and critics by
their arithmetic (FLOPs), a reflow's pairs with all their steps. What follows `--` goes to train.py, where it may set
what this script does not. A name that holds a `:` is a chain of stages. With several `--training_seeds` intervals are
over training runs, otherwise only over what is sampled. Interrupted, the same command goes on. Writes OUT/table.md,
OUT/curve.png (distance against NFE), OUT/objectives.json and OUT/grid.png, one row a run from the same noise.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from custom_model import create_custom_model
from src.errors import UserError, one_line_errors
from src.evaluation.compare import plot_distances
from src.evaluation.intervals import mean_interval
from src.evaluation.launch import run_to_the_end, split_flags
from src.evaluation.sampler import SETTINGS, choose_strength
from src.evaluation.scoring import CHOOSING_SEED, Scorer, draw_samples
from src.files import write_json
from src.objectives import make_objective, parse_stages
from src.training.data import load_images
from src.training.estimate import rehearsal
from src.training.recipe import Recipe, Stage, plan
from src.training.record import environment
from src.utils import (
    NFES,
    labelled_grid,
    load_model,
    pick_device,
    read_checkpoint,
    read_config,
    tensor_to_pil_image,
    weights_hash,
)

SEARCHED = 128  # images that a smoothing is chosen with

# What this script tells train.py itself, and what would change how much is trained.
OURS = """teacher device data_root split_dir unet image_size use_additional_condition num_train_timesteps num_iterations
    seed save_dir stages objective preset dry_run max_minutes""".split()


def flops(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@torch.compiler.set_stance("force_eager")  # compiled operations are not counted
def evaluations_a_sample(model, stage: Stage, batch: int = 24, steps: int = 2) -> float:
    """What one sample of a stage's steps costs, in forward passes of the model's network on one image.

    Args:
        batch: a multiple of 24, for what is drawn in turn by threes or eights to have its share.
    """
    size = model.image_size
    x = torch.zeros(1, 3, size, size, device=model.device)
    with torch.no_grad():
        unit = flops(lambda: model.predict(x, 1.0))
    images = np.zeros((batch, 3, size, size), np.uint8)
    training = rehearsal(model, images, Recipe(batch_size=batch), stage)
    return flops(lambda: [training.step() for _ in range(steps)]) / (unit * batch * steps)


def steps_for(model, shares: list[tuple[str, float]], budget: float, batch_size: int) -> tuple[int, float]:
    """Optimizer steps that spend `budget` network evaluations, and the evaluations a sample costs on average."""
    stages = plan(shares, lambda name: make_objective(name, model.scheduler), 1_000_000)
    calls = {"heun": 2, "euler": 1}
    for stage in stages:
        if stage.objective.pairs:
            budget -= stage.objective.pairs * stage.objective.solver_steps * calls[stage.objective.solver]
    cost = sum(share * evaluations_a_sample(model, stage) for (_, share), stage in zip(shares, stages, strict=True))
    steps = int(budget / (cost * batch_size))
    if steps < len(stages):
        raise UserError(f"the budget does not reach for {', '.join(name for name, _ in shares)}")
    return steps, cost


def scores_of(model, scorers: list[Scorer]) -> dict[str, list[float]]:
    """The distance at each NFE for each scorer's sampling seed."""
    found = [scorer(model) for scorer in scorers]
    distance = scorers[0].features.distance
    return {str(nfe): [one[f"{distance} NFE {nfe}"] for one in found] for nfe in NFES}


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    ours, theirs = split_flags(OURS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", required=True, help="checkpoint of a rectified flow with the extra condition")
    parser.add_argument("--objectives", nargs="+", required=True)
    parser.add_argument("--budget", type=float, required=True, help="network evaluations of each")
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--split_dir", required=True)
    parser.add_argument("--features", help="network to score with; default: the official one, for the FID")
    parser.add_argument("--samples", type=int, default=500, help="for each NFE and sampling seed")
    parser.add_argument("--seeds", type=int, default=3, help="number of sampling seeds")
    parser.add_argument("--training_seeds", type=int, nargs="+", default=[42], help="a run with each")
    parser.add_argument("--smoothed", action="store_true", help="score each run's smoothed samples as well")
    parser.add_argument("--out", type=Path, default=Path("results/objectives"))
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")
    args = parser.parse_args(ours)
    if args.seeds < 1 or args.samples < 2:
        raise UserError("--seeds must be at least 1, and --samples at least 2")
    if not 0 < args.budget < math.inf:
        raise UserError(f"--budget {args.budget}: a number of network evaluations, more than 0")
    if len(set(args.training_seeds)) < len(args.training_seeds):
        raise UserError("name each training seed once: the same run twice says nothing of their spread")
    return args, theirs


def measure(
    folder: Path, final: Path, settings: dict, train: Callable[[], dict], scorers: list[Scorer], device
) -> dict:
    """What the run in this folder cost and scores; where that is not known yet, trained and scored first."""
    result = folder / "scores.json"
    if not result.exists():
        cost = train()
        model = load_model(final, create_custom_model, device)
        write_json(result, {**cost, "settings": settings, "distances": scores_of(model, scorers)})
    row = json.loads(result.read_text())
    if row["settings"] != settings:
        raise UserError(f"{result} was measured with {row['settings']}: choose another --out")
    return row


def side_by_side(final: Path, device) -> list:
    """Four images at each NFE, from the same noise for every model."""
    model = load_model(final, create_custom_model, device)
    images = []
    for nfe in NFES:
        images += tensor_to_pil_image(draw_samples(model, nfe, 0, 4))
    return images


def over_runs(runs: list[dict]) -> dict[int, tuple[float, float]]:
    """At each NFE the mean distance and half its interval: over training runs, or over one run's sampling seeds."""
    found = {nfe: [run["distances"][str(nfe)] for run in runs] for nfe in NFES}
    return {
        nfe: mean_interval([mean(one) for one in many] if len(many) > 1 else many[0]) for nfe, many in found.items()
    }


def table(rows: dict[str, list[dict]]) -> list[str]:
    """A line of markdown for each objective."""
    lines = [
        f"| objective | evaluations a sample | samples | device hours | {' | '.join(f'NFE {n}' for n in NFES)} |",
        "|" + "---|" * (4 + len(NFES)),
    ]
    for name, runs in rows.items():
        known = len(runs) > 1 or len(runs[0]["distances"][str(NFES[0])]) > 1  # an interval
        form = "{:.2f} ± {:.2f}" if known else "{:.2f}"
        cells = " | ".join(form.format(*found) for found in over_runs(runs).values())
        cost, samples, hours = (mean(run[key] for run in runs) for key in ("evaluations_a_sample", "samples", "hours"))
        lines.append(f"| {name} | {cost:.1f} | {samples:,.0f} | {hours:.2f} | {cells} |")
    return lines


def code_of(surroundings: dict) -> str:
    """The commit, and whether its Python files had been changed."""
    return surroundings["commit"] + ("" if surroundings["clean_tree"] else " (changed)")


def main() -> None:
    args, extra = parse_arguments()
    batch = argparse.ArgumentParser()
    batch.add_argument("--batch_size", type=int, default=Recipe.batch_size)
    batch_size = batch.parse_known_args(extra)[0].batch_size
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size} after --: at least 1")
    device = pick_device(args.device)
    start = load_model(args.start, create_custom_model, device)
    if not start.network.use_additional_condition:
        raise UserError(f"{args.start} has no extra condition, which jumps need: train it --use_additional_condition")
    if "critic" in read_checkpoint(args.start).get("training", {}):
        raise UserError(
            f"{args.start} would bring its critic to some of them: name a checkpoint without (final_model.pt)"
        )
    config = read_config(Path(args.start).with_name("model_config.json"))
    images, data_hash = load_images(args.data_root, args.split_dir, start.image_size)
    chains = {name: parse_stages(name if ":" in name else f"{name}:1") for name in args.objectives}

    def folder_of(name: str, seed: int) -> Path:
        return args.out / name.replace("/", "_").replace(",", "+").replace(":", "@") / f"seed{seed}"

    # All of them before anything is scored: a budget may be too small.
    planned = {
        name: steps_for(start, shares, args.budget, batch_size)
        for name, shares in chains.items()
        if not all((folder_of(name, seed) / "scores.json").exists() for seed in args.training_seeds)
    }
    scoring = args.data_root, args.split_dir, start.image_size, args.samples, args.features, device
    scorers = [Scorer(*scoring, seed=1_000_000 * (1 + i)) for i in range(args.seeds)]
    options = {  # the defaults as well, since they may change
        name: [make_objective(stage, start.scheduler).options() for stage, _ in shares]
        for name, shares in chains.items()
    }
    common = [sys.executable, "train.py", "--teacher", args.start, "--device", args.device]
    common += ["--data_root", args.data_root, "--split_dir", args.split_dir]
    common += ["--unet", config.get("unet", "full"), "--image_size", str(start.image_size)]
    common += ["--use_additional_condition", "--num_train_timesteps", str(start.scheduler.num_train_timesteps)]

    def train(name: str, seed: int, folder: Path) -> dict:
        steps, cost = planned[name]
        command = [*common, "--num_iterations", str(steps), "--seed", str(seed), "--save_dir", str(folder)]
        run_to_the_end([*command, "--stages" if ":" in name else "--objective", name, *extra])
        record = json.loads((folder / "run.json").read_text())
        commits = sorted({code_of(session["environment"]) for session in record["sessions"]})  # that trained it
        hours = record["device_hours"]
        return {"evaluations_a_sample": cost, "samples": steps * batch_size, "hours": hours, "commits": commits}

    def smoothed(run: dict, final: Path, folder: Path) -> dict:
        data = args.data_root, args.split_dir
        choose_strength("smoothing", final, folder, NFES, SEARCHED, CHOOSING_SEED, data, args.features, device)
        return {key: run[key] for key in nothing}  # the search costs no training

    # By content, not by name: another start at the same place is another measurement.
    settings = {"start": weights_hash(start.state_dict()), "data": data_hash}
    settings |= {"scores": [scorer.key for scorer in scorers], "budget": args.budget, "extra": extra}
    nothing = {"evaluations_a_sample": 0.0, "samples": 0, "hours": 0.0, "commits": [code_of(environment(device))]}
    rows = {"start": [measure(args.out / "start", Path(args.start), settings, lambda: nothing, scorers, device)]}
    grid = {"start": side_by_side(Path(args.start), device)}
    for name in chains:
        for seed in args.training_seeds:
            folder = folder_of(name, seed)
            final = folder / "final_model.pt"
            asked = settings | {"options": options[name]}
            run = measure(folder, final, asked, partial(train, name, seed, folder), scorers, device)
            rows.setdefault(name, []).append(run)
            grid[f"{name}, seed {seed}"] = side_by_side(final, device)
            if args.smoothed:
                smooth = folder / "smooth"
                asked |= {"sigmas": list(SETTINGS["smoothing"][1])}
                smoothing = partial(smoothed, run, final, smooth)
                run = measure(smooth, smooth / final.name, asked, smoothing, scorers, device)
                rows.setdefault(f"{name}, smoothed", []).append(run)
                grid[f"{name}, smoothed, seed {seed}"] = side_by_side(smooth / final.name, device)

    distance, floor, runs = scorers[0].features.distance, scorers[0].floor, len(args.training_seeds)
    commits = {commit[:7] + commit[40:] for name in chains for run in rows[name] for commit in run["commits"]}
    named = ", ".join(sorted(commits))
    parameters = sum(p.numel() for p in start.parameters()) / 1e6
    over = f"{runs} training runs" if runs > 1 else "sampling seeds of one training run" if args.seeds > 1 else ""
    interval = f"mean ± 95 % over {over}" if over else "one training run"
    interval += " (start: over sampling seeds)" if min(runs, args.seeds) > 1 else ""
    text = (
        f"{distance}, {args.samples} samples, {args.seeds} sampling seeds, floor {floor:.2f}; {interval}; "
        f"{args.budget:g} network evaluations each, after {args.start}; {parameters:.2f} M parameters at "
        f"{start.image_size}x{start.image_size}, {len(images)} training images; training seeds "
        f"{', '.join(map(str, args.training_seeds))}; commit {named}\n\n" + "\n".join(table(rows)) + "\n"
    )
    print(text, end="")
    (args.out / "table.md").write_text(text, encoding="utf-8")
    curves = {name: over_runs(runs) for name, runs in rows.items()}
    plot_distances(curves, distance, floor, over, args.out / "curve.png")
    write_json(
        args.out / "objectives.json", {"arguments": {**vars(args), "out": str(args.out)}, "extra": extra, "rows": rows}
    )
    labelled_grid(grid).save(args.out / "grid.png")


if __name__ == "__main__":
    with one_line_errors():
        main()
