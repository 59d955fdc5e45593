"""Differences between models on common noise, and ablations: one change at a time from one base command."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from src.errors import UserError
from src.evaluation.distances import frechet_distance
from src.evaluation.features import load_features, official_inception
from src.evaluation.intervals import mean_interval
from src.evaluation.launch import refuse_flags, run_to_the_end
from src.evaluation.page import numbered
from src.evaluation.report import Data, Model, check_counts
from src.files import replacing, write_json
from src.images import split_paths
from src.utils import pick_device, read_checkpoint

OURS = "data_root split_dir device save_dir dry_run".split()  # what `ablate` tells train.py itself


def checkpoint_of(run: str) -> Path:
    """The checkpoint itself, or a run's final model."""
    path = Path(run)
    path = path / "final_model.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: name one, or a folder that train.py has finished")
    return path


def differences(distances: dict[str, list[float]]) -> dict[str, dict]:
    """Each model's distances against the first's, seed by seed.

    Args:
        distances: for each model, one value for each sampling seed, the same seeds for all.
    Returns: for each model the mean and half interval of its distance and of its difference to the first, and whether
        the difference exceeds what sampling seeds do (its 95 % interval leaves out 0).
    """
    base = next(iter(distances.values()))
    found = {}
    for name, values in distances.items():
        difference, half = mean_interval([a - b for a, b in zip(values, base, strict=True)])
        found[name] = {
            "distance": mean_interval(values),
            "difference": (difference, half),
            "exceeds noise": len(values) > 1 and abs(difference) > half,
        }
    return found


def compare(args: argparse.Namespace) -> None:
    """Carry out `python -m src.evaluation compare`, whose flags `args` holds."""
    check_counts(args, args.nfe)
    if len(set(args.runs)) < max(2, len(args.runs)):
        raise UserError("name at least two different runs")
    write_comparison({run: checkpoint_of(run) for run in args.runs}, args)


def ablate(args: argparse.Namespace) -> None:
    """Carry out `python -m src.evaluation ablate`: train the base and each change, then compare them."""
    check_counts(args, args.nfe)
    load_features(args.features or official_inception(), pick_device(args.device))  # before hours of training
    changes: dict[str, list[str]] = {"base": []}
    for change in args.change:
        name, colon, setting = change.partition(":")
        flag, equals, value = setting.partition("=")
        if not (name and colon and flag) or equals and not value or name in changes:
            raise UserError(f"--change {change!r} is not of the form name:flag[=value] with a name of its own")
        changes[name] = [f"--{flag}", *([value] if equals else [])]  # some flags have no value
        refuse_flags(changes[name], [*OURS, "image_size"], "in --change")  # of one size, to be compared
    data = ["--data_root", args.data_root, "--split_dir", args.split_dir, "--device", args.device]
    commands = {
        name: [sys.executable, "train.py", *data, *args.base, *flags, "--save_dir", str(Path(args.out) / name)]
        for name, flags in changes.items()
    }
    for command in list(commands.values())[1:]:  # a wrong flag of the last one shows before hours of the first
        run_to_the_end([*command, "--dry_run"], stdout=subprocess.DEVNULL)
    split_paths(args.data_root, "val", args.split_dir)  # what they will be scored against
    for name, command in commands.items():  # runs go on by it, finished ones end at once, others are refused
        run_to_the_end(command)
        folder = Path(args.out) / name
        planned = json.loads((folder / "training_config.json").read_text())["num_iterations"]
        done = read_checkpoint(folder / "final_model.pt")["provenance"]["step"]
        if done < planned:
            raise UserError(f"{folder} is at iteration {done} of {planned}: the same command goes on")
    write_comparison({name: checkpoint_of(str(Path(args.out) / name)) for name in changes}, args)


def write_comparison(checkpoints: dict[str, Path], args: argparse.Namespace) -> None:
    """Score each on the same noise; print the table, write OUT/comparison.json, .md and .png."""
    device = pick_device(args.device)
    features = load_features(args.features or official_inception(), device)
    models = {name: Model(str(path), features, device, args.samples, args.bf16) for name, path in checkpoints.items()}
    first = next(iter(models.values()))
    sizes = {model.net.image_size for model in models.values()}
    if len(sizes) > 1:
        raise UserError(f"the models make images of different sizes ({sorted(sizes)}): they cannot be compared")
    size = sizes.pop()
    source = args.data_root, args.split_dir
    real = Data(*source, "val", size, features, device).features
    floor = frechet_distance(Data(*source, "train", size, features, device, most=args.samples).features, real)
    content = {"distance": features.distance, "samples": args.samples, "seeds": args.seeds, "bf16": first.bf16}
    content |= {"floor": floor, "nfe": {}}
    for nfe in tqdm(sorted(set(args.nfe)), desc="NFE"):
        found = {
            name: [frechet_distance(model.embedded(nfe, seed), real) for seed in range(args.seeds)]
            for name, model in models.items()
        }
        rows = content["nfe"][str(nfe)] = differences(found)
        base = first.pixels(nfe, 0).astype(np.float32)
        for name, model in models.items():
            rows[name]["pixels"] = float(np.abs(model.pixels(nfe, 0) - base).mean())
            model.filtered.clear()  # of no other NFE

    lines = [
        f"{features.distance}, {args.samples} samples, {args.seeds} common sampling seeds; difference to "
        f"{next(iter(models))} (± half the 95 % interval), * where it exceeds noise, and how far a pixel is from that "
        f"model's on average, of 255, with the first seed; training images: {floor:.2f}",
        "",
        "| | " + " | ".join(f"NFE {nfe} | difference | pixels" for nfe in content["nfe"]) + " |",
        "|---" * (1 + 3 * len(content["nfe"])) + "|",
    ]
    for i, name in enumerate(models):
        cells = []
        for rows in content["nfe"].values():
            row = rows[name]
            mark = " *" if row["exceeds noise"] else ""
            cells.append("{:.2f} ± {:.2f}".format(*row["distance"]))
            cells.append("{:+.2f} ± {:.2f}{}".format(*row["difference"], mark) if i else "")
            cells.append(f"{row['pixels']:.2f}" if i else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    out = Path(args.out)
    write_json(out / "comparison.json", content)
    with replacing(out / "comparison.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    curves = {name: {int(nfe): found[name]["distance"] for nfe, found in content["nfe"].items()} for name in models}
    plot_distances(curves, features.distance, floor, "sampling seeds", out / "comparison.png")
    print("\n".join(lines))


def plot_distances(
    curves: dict[str, dict[int, tuple[float, float]]], distance: str, floor: float, over: str, path: Path
) -> None:
    """Distances against NFE as a PNG, a line a model.

    Args:
        curves: for each model's name and NFE, the mean and half of its 95 % interval.
        distance: what the distance is called.
        floor: that of training images.
        over: what the intervals are over; "" if there are none.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    nfes = sorted(set().union(*curves.values()))
    for name, found in curves.items():
        means, halves = zip(*found.values(), strict=True)
        axes.errorbar(list(found), means, yerr=halves, fmt="o-", capsize=3, label=name)
    axes.axhline(floor, color="grey", linestyle="--", label="training images")
    axes.set_xlabel("network calls an image (NFE)")
    axes.set_ylabel(f"{distance} (mean and 95 % interval over {over})" if over else distance, fontsize="small")
    numbered(axes, nfes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
