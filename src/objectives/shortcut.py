"""Shortcut models: flow matching plus self-consistency (Frans et al., arXiv:2410.12557)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from src.errors import UserError
from src.objectives.contract import Nets
from src.objectives.regression import JumpRegression, dyadic


@dataclass(eq=False)
class Shortcut(JumpRegression):
    """A jump of 2d should equal two jumps of d by the EMA in eval mode (eqs. 4 and 5).

    The defaults are the authors' code's: 128 levels, a bootstrapped eighth, targets and intermediate states
    clipped to [-4, 4]. The smallest step 1/levels is asked for as d = 0.

    Args:
        levels: number of smallest steps in [0, 1], a power of two; learned are 1, 1/2, ..., 2/levels.
    """

    levels: int = 128
    flow: float = 7 / 8

    citations = ("frans2025shortcut",)

    def __post_init__(self):
        super().__post_init__()
        must_be_power_of_two(self.levels)

    def jumps(self, batch_size: int) -> tuple[Tensor, Tensor]:
        return dyadic(batch_size, self.levels // 2)

    def asked(self, t: Tensor, t_next: Tensor) -> Tensor:
        return torch.where(t - t_next > 1 / self.levels, t - t_next, 0.0)

    def target(self, nets: Nets, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, progress: float) -> Tensor:
        return self.two_jumps(nets.ema, x_t, t, d)


def must_be_power_of_two(levels: int) -> None:
    if levels < 2 or levels & (levels - 1):
        raise UserError(f"the option levels must be a power of two, from 2 on, got {levels}")
