"""What a run leaves behind besides weights: its record, metrics, curves, previews."""

import json
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from src.files import replacing, write_json
from src.utils import NFES, labelled_grid, tensor_to_pil_image


def environment(device: torch.device) -> dict:
    """Which code, package versions and chip are at work. A clean tree has the commit's Python files."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = [*git, "status", "--porcelain", "-uno", "--", ":(top)*.py"]
        clean = not subprocess.run(changed, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        commit, clean = "unknown", False
    return {
        "commit": commit,
        "clean_tree": clean,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "torchvision", "numpy", "scipy", "pillow", "clean-fid")},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "device": device.type,
        "chip": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }


class RunRecord:
    """`run.json`: what was run, on what, and for how long, over all the sessions of a run.

    Args:
        surroundings: this session's, as `environment` tells them.
        facts: what holds for the whole run; of a resumed one, the newest.
        ended: whether nothing was left to train; such a session is not told, nor changes what was.
    """

    def __init__(self, path: Path, step: int, surroundings: dict, processes: int, facts: dict, ended: bool = False):
        self.path = path
        before = json.loads(path.read_text()) if path.exists() else {"sessions": []}
        # A session that was killed trained steps that are trained again: they count in its time alone.
        self.session = {
            "command": sys.argv,
            "environment": surroundings,
            "processes": processes,
            "started": _now(),
            "ended": _now(),
            "first_step": step,
            "last_step": step,
            "seconds": 0.0,
        }
        sessions = before["sessions"] if ended else [*before["sessions"], self.session]
        commits = [one["environment"]["commit"] for one in sessions]
        if commits[-1:] != commits[:1]:
            print(f"warning: {path} began with commit {commits[0]} and goes on with {commits[-1]}", file=sys.stderr)
        self.content = {**facts, "sessions": sessions}
        self.kept = before if ended else {}
        self.began = time.monotonic()

    def write(self, step: int, batch_size: int, facts: dict) -> None:
        self.session |= {"ended": _now(), "last_step": step, "seconds": round(time.monotonic() - self.began, 1)}
        seconds = [one["seconds"] * one["processes"] for one in self.content["sessions"]]
        self.content |= facts
        self.content |= {"iterations": step, "images_seen": step * batch_size, "device_hours": sum(seconds) / 3600}
        self.content |= self.kept  # all but what an older version did not tell
        write_json(self.path, self.content)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Metrics:
    """`metrics.jsonl`: one JSON object a line; lines after `step` are dropped when a run is resumed."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [row for row in map(parsed, lines) if row is not None and row["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def scored(self, step: int) -> bool:
        return any(row["step"] == step and "ratio" in row for row in self.rows)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def parsed(line: str) -> dict | None:
    """A row of `metrics.jsonl`."""
    try:
        return json.loads(line)
    except ValueError:  # the last line of a run that was killed while writing it
        return None


def early_preview(step: int) -> bool:
    """Whether `step` is one of 100, 200, 400, 800, ...: the write-up shows early training."""
    return step >= 100 and step % 100 == 0 and (step // 100).bit_count() == 1


def plot_curves(rows: list[dict], path: Path) -> None:
    """The loss and its parts against the iteration, raw (faint) and smoothed; a line where a stage ends."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("loss"))
    if not names:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not points:
            continue
        steps, losses = map(np.array, zip(*points, strict=True))
        window = max(1, len(losses) // 30)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        dot = "." if len(losses) == 1 else None  # one point makes no line
        (line,) = axes.plot(steps[window - 1 :], smooth, marker=dot, label=name.replace("_", " "))
        axes.plot(steps, losses, color=line.get_color(), alpha=0.25, linewidth=0.8)
    trained = [row for row in rows if "stage" in row]
    for row, following in zip(trained, trained[1:], strict=False):
        if row["stage"] != following["stage"]:
            axes.axvline(row["step"], color="black", linewidth=0.8)
    axes.set(xlabel="iteration", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def save_previews(model, save_dir: Path, step: int, seed: int, count: int = 8) -> None:
    """Samples from the same noise at each NFE as one labelled grid, and four single images at NFE 4."""
    rows = {}
    for nfe in NFES:
        noise = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        images = model.sample((count, 3, model.image_size, model.image_size), nfe, generator=noise)
        rows[f"NFE {nfe}"] = tensor_to_pil_image(images)
    labelled_grid(rows).save(save_dir / f"iter={step}_grid.png")
    for i, image in enumerate(rows[f"NFE {NFES[-1]}"][:4]):
        image.save(save_dir / f"iter={step}_sample_{i}.png")
