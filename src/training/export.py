"""Put a run's chosen model where the challenge's scripts, and a submission, look for it."""

import sys
from pathlib import Path

import torch

from src.errors import UserError
from src.quantise import quantised, restore_quantised
from src.training.checkpoints import step_of
from src.training.record import parsed
from src.utils import objective_of, read_checkpoint, read_config, save_weights, weights_of

TARGET = Path("checkpoints/best_model.pt")
CHOICES = ("best_model.pt", "final_model.pt", "last.ckpt")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": None}  # int8: with scales, see `quantised`
FORBIDDEN = {"unet": "small", "image_size": 32}


def export(run: Path, checkpoint: str | None = None, dtype: str = "float32", target: Path = TARGET) -> Path:
    """Write the weights of one of a run's checkpoints, and the config beside them; nothing else of the run.

    Args:
        run: a folder that train.py wrote.
        checkpoint: a file in it; None: the best by score, else of the final and the last the one trained further.
        dtype: float16 halves the file, int8 quarters it; loading makes a float32 model of each.
    Returns: the checkpoint that was taken.
    Raises: UserError if there is none, its network is not the challenge's and `target` is the submission's place, or
        another model would be spoilt at a `target` elsewhere.
    """
    if target.suffix != ".pt" or target.is_dir():
        raise UserError(f"--out {target} names no checkpoint: give a file that ends in .pt")
    submitted = target.resolve() == TARGET.resolve()
    source = run / (checkpoint or choose(run))
    kept = target.name in CHOICES or target.name.startswith("checkpoint_iter_") or target.name == source.name
    if kept and not submitted and target.parent.resolve() == source.parent.resolve():
        raise UserError(f"--out {target} would replace a model of {run}: choose another name")
    saved = read_checkpoint(source)
    config = read_config(run / "model_config.json")
    for name, value in FORBIDDEN.items():
        if config.get(name) == value and submitted:
            raise UserError(f"{source} was trained with {name}={value!r}, which no submission may use")
    if "state_dict" not in saved:
        raise UserError(f"{source} holds no model that can be exported: name one that train.py saved")
    state = weights_of(saved, source)
    restore_quantised(state)  # if it was exported in 8 bits before
    if dtype == "int8":
        state = quantised(state)
    else:
        state = {name: value.to(DTYPES[dtype]) for name, value in state.items()}
    config |= objective_of(saved)
    if not submitted:
        refuse_other_config(target, config)
    save_weights(state, target, config, provenance=saved.get("provenance", {}))
    return source


def choose(run: Path) -> str:
    """The name of a run's model: the best by score, with a warning if others were never scored, else the furthest.

    Raises: UserError if it has none.
    """
    there = [name for name in CHOICES if (run / name).is_file()]
    if not there:
        raise UserError(f"{run} holds none of {', '.join(CHOICES)}: is it a folder that train.py wrote?")
    best, *others = CHOICES
    # A final model may be of a session that --max_minutes ended, and the run have gone on.
    steps = {name: step_of(run / name) for name in others if name in there}
    furthest = max(steps, key=steps.get, default=best)
    if best not in there:
        return furthest
    path = run / "metrics.jsonl"
    rows = filter(None, map(parsed, path.read_text().splitlines())) if path.is_file() else []
    scored = [row["step"] for row in rows if "ratio" in row]
    if steps and scored and (left := steps[furthest] - max(scored)) > 0:
        told = f"{run}/{furthest} is further by {left} steps, never scored: --checkpoint {furthest} takes it"
        print(f"warning: {told}", file=sys.stderr)
    return best


def refuse_other_config(target: Path, config: dict) -> None:
    """UserError if other models beside `target` would be left with a config that is not theirs."""
    beside = target.with_name("model_config.json")
    others = [path.name for path in target.parent.glob("*") if path.suffix in (".pt", ".ckpt") and path != target]
    if others and beside.is_file() and read_config(beside) != config:
        raise UserError(f"{beside} is another model's, of {', '.join(sorted(others)[:3])}: choose another folder")
