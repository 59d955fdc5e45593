"""Averages of the weights over training."""

import copy
import math
from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor


class EMA:
    """An exponentially averaged copy of `model`, always in eval mode: teacher, preview and export.

    It starts as a power-function average of width 0.1 (arXiv:2312.02696), which knows no initial weights and
    reaches over a fixed share of the training so far, until that is longer than 1 / (1 - decay) steps. A plain
    average of the first steps, which is what correcting the bias of a constant decay gives, lags far behind.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Take in `model`'s weights, as the `updates`-th (from 1)."""
        decay = min(self.decay, power_decay(0.1, updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)


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
