"""Easy consistency tuning: states of one path have one end (Geng et al., arXiv:2406.14548)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from src.objectives.contract import Nets
from src.objectives.regression import JumpRegression


@dataclass(eq=False)
class Consistency(JumpRegression):
    """f(x_t) <- f_ema(x_r) with f(x_t) = x_t - t u(x_t, t, t), x_r on the same straight path, r < t.

    Section 3 of the paper, and the authors' code for the pair of times. Divided by t, this is alpha-Flow's regression
    of the jump to 0, with alpha = (t - r)/t. Only the last jump of a sample is asked of f; the ones before it are
    Euler steps with the velocity, which the flow share keeps. Where the paper moves sigma by the ratio r/t, here flow
    time moves; where it shares dropout's mask between the pair, here the target comes from the EMA without dropout.

    Args:
        q: r = t (1 - n(t)/q), n(t) = 1 + 8 sigmoid(-sigma), sigma = t/(1 - t).
        grid: share of the jumps whose t is 1, 1/2 or 1/4, where samples take them.
    """

    q: float = 16.0
    grid: float = 0.5

    citations = ("geng2025consistency", "song2023consistency")

    def asked(self, t: Tensor, t_next: Tensor) -> Tensor:
        return torch.where(t_next == 0, t, 0.0)

    def closeness(self, t: Tensor) -> Tensor:
        """n(t), from 5 at the data to 1 at the noise."""
        return 1 + 8 * torch.sigmoid(-t / (1 - t).clamp(min=1e-4))

    def jumps(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """sigma = t/(1 - t) log-normal(-1.1, 2)."""
        sigma = (torch.randn(batch_size) * 2 - 1.1).exp()
        asked = 0.5 ** torch.randint(3, (batch_size,))
        t = torch.where(torch.rand(batch_size) < self.grid, asked, sigma / (1 + sigma)).clamp(min=1e-3)
        return t, t

    def target(self, nets: Nets, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, progress: float) -> Tensor:
        return self.partial_jump(nets.ema, x_t, t, d, v, (self.closeness(t) / self.q).clamp(max=1.0))

    def weigh(self, error: Tensor, t: Tensor, d: Tensor, progress: float) -> Tensor:
        """||f - f'|| / (t - r), the paper's first weight, up to the constant q; the norm alone for the velocity."""
        return (error + 1e-6).sqrt() / torch.where(d > 0, self.closeness(t), 1.0)
