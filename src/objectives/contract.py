"""What every training objective offers, and what it is given.

An objective is a loss on the flow map u(x_t, t, d), the mean velocity from time t down to t - d, so that
x_{t-d} = x_t - d * u(x_t, t, d). d = 0 is the instantaneous velocity. A class in a file of its own:

    class Name:
        needs_condition: bool  # does the network embed d?
        learns_jumps: bool     # at sampling, is the network asked for the jump's d, or for d = 0?

        def __init__(self, scheduler): ...
        def draw(self, batch_size) -> dict[str, Tensor]
        def loss(self, nets, data, noise, step, draw) -> tuple[Tensor, dict[str, Tensor]]

`draw` makes every random choice of one global batch at once: tensors [batch_size, ...] on the CPU, which
the engine slices along with the data. So neither accumulation nor the number of processes changes the
gradient. `loss` returns the per-sample loss [B], unreduced, and logs: a 1-d tensor of per-sample values for
each name, of any length, averaged by the engine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.nn as nn
from torch import Tensor


class Nets(NamedTuple):
    """The models an objective may ask for, each with `predict(xt, t, d)`."""

    student: nn.Module
    ema: nn.Module


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate inside (no dropout), leave every submodule in the mode it was found in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample: [B, ...] and [B, ...] -> [B]."""
    return (pred - target).square().flatten(1).mean(1)
