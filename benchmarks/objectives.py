"""Objectives side by side: trained from one model for the same number of network evaluations, scored at NFE 1, 2, 4.

    python -m benchmarks.objectives --start RUN/final_model.pt --data_root ROOT --split_dir SPLIT --features FILE \
        --budget 300000 --objectives shortcut alpha_flow distribution_matching -- --batch_size 32 --lr 4e-4

The budget is in forward passes of the network on one image; a backward pass counts two, teachers and critics by
their arithmetic (FLOPs), a reflow's pairs with all their steps. What follows `--` goes to train.py. A name that holds
a `:` is a chain of stages. Interrupted, the same command goes on. Writes OUT/table.md, OUT/objectives.json and
OUT/grid.png, one row an objective from the same noise.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from custom_model import create_custom_model
from src.evaluation.intervals import mean_interval
from src.evaluation.scoring import NFES, Scorer
from src.objectives import make_objective, parse_stages
from src.training.engine import Recipe, Stage, Training, plan
from src.utils import (
    UserError,
    labelled_grid,
    load_model,
    one_line_errors,
    pick_device,
    run_to_the_end,
    tensor_to_pil_image,
    write_json,
)


def flops(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@torch.compiler.set_stance("force_eager")  # compiled operations are not counted
def evaluations_a_sample(model, stage: Stage, batch: int = 12, steps: int = 2) -> float:
    """What one sample of a stage's steps costs, in forward passes of the model's network on one image.

    Args:
        batch: a multiple of 12, for each jump of NFE 1, 2 and 4 to have its share.
    """
    size = model.image_size
    x = torch.zeros(1, 3, size, size, device=model.device)
    with torch.no_grad():
        unit = flops(lambda: model.predict(x, 1.0))
    images = np.zeros((batch, 3, size, size), np.uint8)
    objective = copy.copy(stage.objective)
    objective.pairs = 0  # they are counted apart
    recipe = Recipe(batch_size=batch)
    training = Training(copy.deepcopy(model), images, recipe, [Stage(stage.name, objective, stage.steps)])
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
    ours, theirs = sys.argv[1:], []
    if "--" in ours:
        split = ours.index("--")
        ours, theirs = ours[:split], ours[split + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", required=True, help="checkpoint of a rectified flow with the extra condition")
    parser.add_argument("--objectives", nargs="+", required=True)
    parser.add_argument("--budget", type=float, required=True, help="network evaluations of each")
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--split_dir", required=True)
    parser.add_argument("--features", help="network to score with; default: the official one, for the FID")
    parser.add_argument("--samples", type=int, default=500, help="for each NFE and sampling seed")
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds")
    parser.add_argument("--out", type=Path, default=Path("results/objectives"))
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")
    return parser.parse_args(ours), theirs


def main() -> None:
    args, extra = parse_arguments()
    device = pick_device(args.device)
    start = load_model(args.start, create_custom_model, "cpu")
    config = json.loads(Path(args.start).with_name("model_config.json").read_text())
    batch = argparse.ArgumentParser()
    batch.add_argument("--batch_size", type=int, default=Recipe.batch_size)
    batch_size = batch.parse_known_args(extra)[0].batch_size
    data = ["--data_root", args.data_root, "--split_dir", args.split_dir]
    scoring = args.data_root, args.split_dir, start.image_size, args.samples, args.features, device
    scorers = [Scorer(*scoring, seed=1_000_000 * (1 + i)) for i in range(args.seeds)]
    settings = {k: v for k, v in vars(args).items() if k not in ("objectives", "out", "device")} | {"extra": extra}

    rows, grid = {}, {}
    for name in ["start", *args.objectives]:
        folder = args.out / name.replace("/", "_").replace(",", "+").replace(":", "@")
        result = folder / "scores.json"
        if not result.exists():
            row = {"evaluations_a_sample": 0.0, "samples": 0, "hours": 0.0}
            model = copy.deepcopy(start).to(device)
            if name != "start":
                shares = parse_stages(name if ":" in name else f"{name}:1")
                steps, cost = steps_for(model, shares, args.budget, batch_size)
                command = [sys.executable, "train.py", "--teacher", args.start, "--num_iterations", str(steps)]
                command += ["--stages", name] if ":" in name else ["--objective", name]
                command += ["--unet", config["unet"], "--image_size", str(start.image_size), *data]
                command += ["--num_train_timesteps", str(config["num_train_timesteps"]), "--use_additional_condition"]
                run_to_the_end([*command, "--device", args.device, "--save_dir", str(folder), *extra])
                model = load_model(folder / "final_model.pt", create_custom_model, device)
                hours = json.loads((folder / "run.json").read_text())["device_hours"]
                row = {"evaluations_a_sample": cost, "samples": steps * batch_size, "hours": hours}
            write_json(result, {**row, "settings": settings, "distances": scores_of(model, scorers)})
        rows[name] = json.loads(result.read_text())
        if rows[name]["settings"] != settings:
            raise UserError(f"{result} was measured with {rows[name]['settings']}: choose another --out")
        final = args.start if name == "start" else folder / "final_model.pt"
        model = load_model(final, create_custom_model, device)
        grid[name] = []
        for nfe in NFES:  # four images each, side by side
            noise = [torch.Generator().manual_seed(i) for i in range(4)]
            images = model.sample((4, 3, start.image_size, start.image_size), nfe, generator=noise)
            grid[name] += tensor_to_pil_image(images)

    distance, floor = scorers[0].features.distance, scorers[0].floor
    lines = [
        f"{distance}, {args.samples} samples, {args.seeds} sampling seeds (mean ± 95 %), floor {floor:.2f}; "
        f"{args.budget:g} network evaluations each, after {args.start}",
        "",
        f"| objective | evaluations a sample | samples | device hours | {' | '.join(f'NFE {n}' for n in NFES)} |",
        "|" + "---|" * (4 + len(NFES)),
    ]
    for name, row in rows.items():
        cells = " | ".join("{:.2f} ± {:.2f}".format(*mean_interval(row["distances"][str(nfe)])) for nfe in NFES)
        lines.append(
            f"| {name} | {row['evaluations_a_sample']:.1f} | {row['samples']:,} | {row['hours']:.2f} | {cells} |"
        )
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    write_json(
        args.out / "objectives.json", {"arguments": {**vars(args), "out": str(args.out)}, "extra": extra, "rows": rows}
    )
    labelled_grid(grid).save(args.out / "grid.png")


if __name__ == "__main__":
    with one_line_errors():
        main()
