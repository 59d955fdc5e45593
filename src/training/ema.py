"""Averages of the weights over training, and mixtures of a model with an earlier one of its stages."""

import copy
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from src.errors import UserError
from src.quantise import restore_quantised
from src.utils import objective_of, read_checkpoint, read_config, weights_hash, weights_of


class EMA:
    """An exponentially averaged copy of `model`, always in eval mode: teacher, preview and export.

    It starts as a power-function average of width 0.1 (arXiv:2312.02696), which knows no initial weights and
    reaches over a fixed share of the training so far, until that is longer than 1 / (1 - decay) steps. A plain
    average of the first steps, which is what correcting the bias of a constant decay gives, lags far behind. Buffers,
    which the U-Net has none of, stay those of the start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Take in `model`'s weights, as the `updates`-th (from 1)."""
        decay = min(self.decay, power_decay(0.1, updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


class PowerEMA:
    """Two power-function averages, from which any other length is rebuilt afterwards (arXiv:2312.02696, section 3).

    An average of relative width sigma_rel weighs the weights of step tau <= t by tau^gamma; its width is
    sigma_rel * t steps, whatever t.
    """

    SIGMA_RELS = (0.05, 0.10)  # the paper's choice for rebuilding

    def __init__(self, model: nn.Module):
        self.averages = {
            str(sigma_rel): {name: p.detach().clone() for name, p in model.named_parameters()}
            for sigma_rel in self.SIGMA_RELS
        }

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Take in `model`'s weights, as the `updates`-th (from 1)."""
        weights = list(model.parameters())
        for sigma_rel, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), weights, 1 - power_decay(float(sigma_rel), updates))

    def load(self, averages: dict[str, dict[str, Tensor]]) -> None:
        for sigma_rel, average in averages.items():
            for name, value in average.items():
                self.averages[sigma_rel][name].copy_(value)


def power_decay(sigma_rel: float, updates: int) -> float:
    """The old average's weight at the `updates`-th update (from 1) of the one with this relative width."""
    return (1 - 1 / updates) ** (gamma_of(sigma_rel) + 1)


@cache
def gamma_of(sigma_rel: float) -> float:
    """The exponent whose power-function average has this relative width: the root of
    sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (arXiv:2312.02696, appendix C)."""
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def rebuilding_weights(kept: Iterable[tuple[int, float]], step: int, sigma_rel: float) -> tuple[np.ndarray, float]:
    """Least-squares weights of kept averages for the average of width `sigma_rel` at `step`.

    Args:
        kept: (step, sigma_rel) of each; none later than `step`.
    Returns: as many weights, of sum 1, and the relative error of the rebuilt weight profile
        (arXiv:2312.02696, appendix C).
    """
    steps, gammas = (np.array(values, dtype=np.float64) for values in zip(*kept, strict=True))
    gammas = np.array([gamma_of(sigma) for sigma in gammas])
    target = np.array([step], dtype=np.float64), np.array([gamma_of(sigma_rel)])
    products = _profile_products(steps[:, None], gammas[:, None], steps, gammas)
    wanted = _profile_products(steps, gammas, *target)
    weights = np.linalg.lstsq(products, wanted, rcond=None)[0]
    error = math.sqrt(max(0.0, 1 - float(wanted @ weights) / _profile_products(*target, *target).item()))
    return weights / weights.sum(), error


def _profile_products(t_a, gamma_a, t_b, gamma_b) -> np.ndarray:
    """Inner products of the averages' weight profiles over continuous time."""
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def rebuild(run: Path, sigma_rel: float, step: int | None) -> tuple[int, dict, dict[str, Tensor]]:
    """The average of relative width `sigma_rel` at `step` (None: the last kept): step, origin, float32 weights.

    The width is relative to the steps of the stage that the step belongs to; the origin is `model_config` and
    `provenance`.

    Raises: UserError if the run kept no averages, or the width is outside of what they can tell.
    """
    if not 0.01 <= sigma_rel <= 0.25:
        raise UserError(f"--sigma_rel must lie between 0.01 and 0.25, got {sigma_rel}")
    steps = sorted(int(path.stem) for path in (run / "averages").glob("*.pt") if path.stem.isdigit())
    if step is None:
        step = steps[-1] if steps else 0
    steps = [kept for kept in steps if kept <= step]
    if not steps or steps[-1] != step:
        raise UserError(f"{run}/averages holds none of step {step}: its steps are {steps or 'none'}")
    files: list[dict] = []
    for one in reversed(steps):
        file = read_checkpoint(run / f"averages/{one}.pt")
        if files and file["stage"] != files[0]["stage"]:
            break  # of the stage before
        files.insert(0, file)
    last = files[-1]
    kept = [(file["age"], float(sigma), average) for file in files for sigma, average in file["averages"].items()]
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

    Raises: UserError if the share is not between 0 and 1, `end` is a mixture itself, was not trained from `start`, or
        has settings of the sampler, which were chosen for its weights.
    """
    if not 0 < share < 1:
        raise UserError(f"--share must lie between 0 and 1, got {share}")
    saved, other = read_checkpoint(end), read_checkpoint(start)
    config = read_config(end.with_name("model_config.json"))
    if chosen := [name for name in ("time_grids", "asking", "smoothing", "sharpening") if config.get(name)]:
        raise UserError(f"{end} has {' and '.join(chosen)} for its own weights: mix the model before that, then search")
    states = [weights_of(checkpoint, path) for checkpoint, path in ((saved, end), (other, start))]
    for state in states:
        restore_quantised(state)
        state.update({name: value.float() for name, value in state.items()})
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    provenance, origin = (checkpoint.get("provenance", {}) for checkpoint in (saved, other))
    if shapes[0] != shapes[1] or not _went_on_from(provenance, origin, weights_hash(states[1])):
        raise UserError(
            f"{end} was not trained from {start}: mix a model with the end of a stage that came before its last, or "
            "with the very file that its run began with"
        )
    stages = provenance["stages"]
    last = stages[-1]
    if "mixed" in last:
        raise UserError(f"{end} is a mixture already: name the model that it was made of")
    return {
        "state_dict": {name: value.lerp(states[1][name], share) for name, value in states[0].items()},
        "model_config": config | objective_of(saved),
        "provenance": {
            **provenance,
            "stages": [
                *stages[:-1],
                {
                    **last,
                    "citations": [*last["citations"], "wortsman2022robust"],
                    "mixed": {"share": share, "stages": len(origin["stages"])},
                },
            ],
        },
    }


def _went_on_from(end: dict, start: dict, weights: str) -> bool:
    """Whether a model of the provenance `end` went on from one of the provenance `start` and with `weights` of this
    hash, as far as they tell."""
    stages, begun = end.get("stages", []), start.get("stages", [])
    if not (0 < len(begun) < len(stages) and all(map(_one_stage, begun, stages))):
        return False
    if "teacher" not in end:  # of an older version
        return True
    taught = len(end["teacher"]["stages"]) if end["teacher"] else 0
    if len(begun) == taught:  # what its run began with
        return weights[:16] == end["teacher"]["weights"]
    # An earlier model of its run; or, before its teacher, of one whose seed and data nobody told.
    return len(begun) < taught or all(start.get(fact, end[fact]) == end[fact] for fact in ("seed", "data", "teacher"))


def _one_stage(one: dict, other: dict) -> bool:
    """Whether both tell of one stage, of which older versions told less."""
    untold = {"citations"} | ({"lr_decay_start"} - (one.keys() & other.keys()))
    kept = [{name: value for name, value in stage.items() if name not in untold} for stage in (one, other)]
    for stage in kept:  # nothing of options that they did not have, whose effect is off
        stage["options"] = {name: value for name, value in stage.get("options", {}).items() if value is not False}
    return kept[0] == kept[1]
