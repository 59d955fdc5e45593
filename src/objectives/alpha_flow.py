"""alpha-Flow: from the velocity to the mean velocity by finite jumps (Zhang et al., arXiv:2510.20771)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from src.errors import UserError
from src.objectives.contract import Nets
from src.objectives.regression import JumpRegression, adaptive, dyadic


@dataclass(eq=False)
class AlphaFlow(JumpRegression):
    """u(x_t, t, d) <- alpha v + (1 - alpha) u_ema(x_t - alpha d v, t - alpha d, (1 - alpha) d) (eq. 8).

    alpha = 1 is flow matching, alpha -> 0 MeanFlow. With no `anneal`, alpha stays: the constant ratio that
    the code of arXiv:2512.15657 advises for short runs. The paper's u without gradient is the student, not its EMA.

    Args:
        alpha: its last, and smallest, value.
        anneal: steepness of a sigmoid in the stage's progress by which alpha falls from
            1 / (1 + exp(-anneal / 2)), 0.99 at 10; 0: constant.
        grid: share of the jumps that are the ones of the samplers with 1, 2 and 4 steps; the others, which the
            targets are made of, have t and t - d uniform.
        own: start along the EMA's velocity instead of the sample's v, which a large alpha biases: one call more.
        power: p of the weight alpha^(2p - 1) / (error + 1e-3)^p; at 1 it is the paper's alpha / (error + 1e-3).
    """

    alpha: float = 0.125
    anneal: float = 0.0
    grid: float = 0.5
    own: bool = False
    power: float = 0.75

    citations = ("zhang2025alphaflow",)

    def __post_init__(self):
        super().__post_init__()
        if self.alpha > 1:  # it would step past the end of the jump
            raise UserError(f"the option alpha must be at most 1, got {self.alpha}")
        if not self.anneal:
            self.citations += ("luo2025soflow",)

    @property
    def follows_progress(self) -> bool:
        return self.anneal > 0

    def ratio(self, t: Tensor, progress: float) -> Tensor:
        """alpha of each jump, [B]."""
        falling = 1 / (1 + math.exp(min(50.0, self.anneal * (progress - 0.5)))) if self.anneal else 0.0
        return torch.full_like(t, max(self.alpha, falling))

    def jumps(self, batch_size: int) -> tuple[Tensor, Tensor]:
        t_grid, d_grid = dyadic(batch_size, 4)
        on_grid = torch.rand(batch_size) < self.grid
        t, r = torch.rand(2, batch_size).sort(dim=0, descending=True).values
        t = t.clamp(min=1e-3)  # so that no jump, of 1e-3 at least, ends below 0
        return torch.where(on_grid, t_grid, t), torch.where(on_grid, d_grid, (t - r).clamp(min=1e-3))

    def target(self, nets: Nets, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, progress: float) -> Tensor:
        first = nets.ema.predict(x_t, t) if self.own else v
        return self.partial_jump(nets.ema, x_t, t, d, first, self.ratio(t, progress))

    def weigh(self, error: Tensor, t: Tensor, d: Tensor, progress: float) -> Tensor:
        scale = self.ratio(t, progress) ** (2 * self.power - 1)  # the error falls with alpha^2
        return torch.where(d > 0, scale, 1.0) * adaptive(error, self.power)
