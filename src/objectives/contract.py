"""What every training objective offers, and what it is given.

An objective is a loss on the flow map u(x_t, t, d), the mean velocity from time t down to t - d, so that
x_{t-d} = x_t - d * u(x_t, t, d). d = 0 is the instantaneous velocity. A class in a file of its own:

    class Name(Objective):
        needs_condition = ...  # does the network embed d?
        learns_jumps = ...     # at sampling, is the network asked for the jump's d, or for d = 0?

        def draw(self, batch_size) -> dict[str, Tensor]
        def loss(self, nets, data, noise, step, draw) -> tuple[Tensor, dict[str, Tensor]]

`draw` makes every random choice of one global batch at once: tensors [batch_size, ...] on the CPU, which
the engine slices along with the data. So neither accumulation nor the number of processes changes what is
learned from a sample. `loss` returns the per-sample loss [B], unreduced, and logs: a 1-d tensor of per-sample
values for each name, of any length, averaged by the engine.
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


class Objective:
    """What an objective has that it does not say itself."""

    needs_condition: bool
    learns_jumps: bool

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def after_step(self, nets: Nets, step: int) -> None:
        """Called after the `step`-th optimizer step (from 1): schedules, a teacher's refresh."""

    def state_dict(self) -> dict:
        """What resuming needs of the objective: tensors and JSON types."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` gave."""


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
