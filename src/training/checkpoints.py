"""What a run saves to go on from, and how it goes on."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from src.errors import UserError
from src.utils import read_checkpoint, save_model, writing_checkpoint

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LAST, NEXT, PREVIOUS = "last.ckpt", "next.ckpt", "previous.ckpt"


@contextmanager
def alone_in(save_dir: Path) -> Iterator[None]:
    """Hold a run's folder while the body writes there; UserError if another process does."""
    if fcntl is None:
        yield
        return
    save_dir.mkdir(parents=True, exist_ok=True)
    held = os.open(save_dir, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise UserError(f"another process trains in {save_dir}: wait for it, or choose another --save_dir") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(held)


def save_last(save_dir: Path, model: nn.Module, model_config: dict, **state) -> None:
    """Write `last.ckpt` and keep the one before it: whenever the process dies, a whole one is left."""
    following = save_dir / NEXT
    save_model(model, following, model_config, **state)
    if (save_dir / LAST).exists():
        os.replace(save_dir / LAST, save_dir / PREVIOUS)
    os.replace(following, save_dir / LAST)


def load_last(save_dir: Path, identity: dict, defaults: dict[str, dict]) -> dict | None:
    """The newest good checkpoint of a run, or None if there is none at all.

    Args:
        identity: the settings that make a run this run.
        defaults: of the options of its stages' objectives, by the stages' names.
    Raises: UserError if all checkpoints are damaged or foreign, or belong to a run with other settings, or if there
        is none and the folder holds models, which would be lost.
    """
    paths = [save_dir / name for name in (NEXT, LAST, PREVIOUS) if (save_dir / name).exists()]
    faults = []
    for path in paths:
        try:
            checkpoint = _training_checkpoint(path)
        except UserError as fault:
            faults.append(str(fault))
            continue
        _refuse_changes(path, checkpoint["training"]["identity"], identity, defaults)
        if path.name == PREVIOUS and not faults:
            faults = [f"{save_dir} holds no {LAST}"]
        for fault in faults:
            print(f"warning: {fault}; going on from {path} instead", file=sys.stderr)
        return checkpoint
    if faults:
        raise UserError(f"{'; '.join(faults)}: nothing to go on from, choose another --save_dir")
    if (save_dir / "model_config.json").exists() and not (save_dir / "training_config.json").exists():
        raise UserError(
            f"{save_dir} holds a model that was not trained there, whose files would be lost: choose another --save_dir"
        )
    models = [name for name in ("final_model.pt", "best_model.pt") if (save_dir / name).exists()]
    saved = sorted(path.name for path in save_dir.glob("checkpoint_iter_*.pt"))
    if models := models or saved[1:]:  # one is left by a run that is killed in its first save
        raise UserError(
            f"{save_dir} holds {models[0]}, but no {LAST} to go on from: choose another --save_dir, or move the whole "
            "folder away to train anew"
        )
    return None


def _training_checkpoint(path: Path) -> dict:
    checkpoint = read_checkpoint(path)
    if "identity" not in checkpoint.get("training", {}):
        raise UserError(f"{path} holds no training state of this project")
    return checkpoint


def _refuse_changes(path: Path, before: dict, now: dict, defaults: dict[str, dict]) -> None:
    # An option that did not exist yet had the effect of its default.
    stages = [[name, {**defaults.get(name, {}), **options}, *steps] for name, options, *steps in before["stages"]]
    before = {**before, "stages": stages}
    changed = [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(f"{path} belongs to another run ({'; '.join(changed)}): choose another --save_dir")


def clear_leftovers(save_dir: Path, anew: bool) -> None:
    """Delete what a process that was killed while writing to a run's folder left, this training or `ema`.

    Args:
        anew: whether the run begins: then no averages are its own.
    """
    averages = [*save_dir.glob("averages/.*.tmp"), *(save_dir.glob("averages/*.pt") if anew else [])]
    for path in [*save_dir.glob(".*.tmp"), *averages]:
        if path.is_file():  # a killed sampling.py leaves a folder, which harms nothing
            path.unlink()


def best_score(save_dir: Path, scorer: str) -> float:
    """The ratio of `best_model.pt`, infinity if there is none; UserError if it was scored in another way."""
    path = save_dir / "best_model.pt"
    if not path.exists():
        return math.inf
    facts = read_checkpoint(path).get("provenance", {})
    before, now = facts.get("scorer", "not told"), scorer
    if ", floor " in before:  # an older version, which told of the images by the floor
        before, now = before.split(", floor ")[0], now.split(", images ")[0]
    if before != now:
        raise UserError(
            f"{path} was chosen by other scores ({before}; now {now}), which compare with none of these: give the "
            "flags that it was scored with, or move it away"
        )
    return facts["ratio"]


def step_of(checkpoint: Path) -> int:
    """The step of its run that a checkpoint is of; 0 if it does not tell, -1 if it is damaged or missing."""
    try:
        return read_checkpoint(checkpoint).get("provenance", {}).get("step", 0)
    except UserError:
        return -1


def save_averages(save_dir: Path, step: int, averages: dict[str, dict[str, Tensor]], **origin) -> None:
    """Keep the power-function averages of this step in half precision, for `python -m src.training ema`.

    Args:
        origin: the `stage`'s index, its `age`, how many of its steps the averages are of, `model_config`, `provenance`.
    """
    halves = {width: {name: value.half() for name, value in average.items()} for width, average in averages.items()}
    with writing_checkpoint(save_dir / f"averages/{step}.pt") as temporary:
        torch.save({**origin, "averages": halves}, temporary)
