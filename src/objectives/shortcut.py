"""Shortcut models: flow matching plus self-consistency (Frans et al., arXiv:2410.12557, algorithm 1)."""

import torch
from torch import Tensor

from src.objectives.contract import Nets, Objective, eval_mode, squared_error


class Shortcut(Objective):
    """A jump of 2d should equal two jumps of d; jumps of d = 0 are flow matching.

    Every `bootstrap_every`-th sample learns u(x_t, t, 2d) from two steps of the EMA network in eval mode,
    with 2d one of 1, 1/2, ..., 2/levels and t a multiple of 2d; the others learn the velocity at d = 0.
    The defaults are the paper's and its code's: 128 levels, a bootstrapped eighth, targets and
    intermediate states clipped to [-4, 4]. The smallest step 1/levels is asked for as d = 0.

    Args:
        levels: number of smallest steps in [0, 1], a power of two.
        bootstrap_every: one sample in so many is bootstrapped.
        clip: largest absolute value of a target's components; data lie in [-1, 1].
    """

    needs_condition = True
    learns_jumps = True

    def __init__(self, scheduler, levels: int = 128, bootstrap_every: int = 8, clip: float = 4.0):
        super().__init__(scheduler)
        self.levels = levels
        self.bootstrap_every = bootstrap_every
        self.clip = clip

    def draw(self, batch_size: int) -> dict[str, Tensor]:
        t = self.scheduler.sample_timesteps(batch_size, "cpu")
        # The bootstrapped samples are spread over the batch, so that every slice of it costs the same; the
        # random offset gives batches smaller than `bootstrap_every` their share.
        offset = torch.randint(self.bootstrap_every, ())
        bootstrapped = (torch.arange(batch_size) + offset) % self.bootstrap_every == 0
        jumps = 2 ** torch.randint(self.levels.bit_length() - 1, (batch_size,))  # in the interval: 1 .. levels/2
        position = 1 + (torch.rand(batch_size) * jumps).floor()  # t = position * d, in (0, 1]
        d = torch.where(bootstrapped, 1 / jumps, 0.0)
        return {"t": torch.where(bootstrapped, position / jumps, t), "d": d}

    def loss(
        self, nets: Nets, data: Tensor, noise: Tensor, step: int, draw: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Rows are chosen on the CPU, where their number is known without waiting for the GPU.
        rows = (draw["d"] == 0).nonzero().squeeze(1), draw["d"].nonzero().squeeze(1)
        t, d, flow, bootstrapped = (x.to(data.device, non_blocking=True) for x in (draw["t"], draw["d"], *rows))

        x_t = self.scheduler.forward_process(data, noise, t)
        target = self.scheduler.get_target(data, noise, t)
        if len(bootstrapped):
            target[bootstrapped] = self._two_steps(nets.ema, x_t[bootstrapped], t[bootstrapped], d[bootstrapped])

        loss = squared_error(nets.student.predict(x_t, t, d), target)
        each = loss.detach()
        return loss, {"loss_flow": each[flow], "loss_bootstrap": each[bootstrapped]}

    @torch.no_grad()
    def _two_steps(self, teacher, x_t: Tensor, t: Tensor, d: Tensor) -> Tensor:
        """The mean velocity over d by two teacher steps of d/2: the self-consistency target, eq. 4 and 5."""
        half = d / 2
        middle = t - half
        asked = torch.where(half > 1 / self.levels, half, 0.0)
        with eval_mode(teacher):
            first = teacher.predict(x_t, t, asked)
            x_middle = self.scheduler.reverse_process_step(x_t, first, t, middle).clamp(-self.clip, self.clip)
            second = teacher.predict(x_middle, middle, asked)
        return ((first + second) / 2).clamp(-self.clip, self.clip)
