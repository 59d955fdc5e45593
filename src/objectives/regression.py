"""What the objectives share that regress jumps: some samples learn the velocity at d = 0, the others a target."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from src.objectives.contract import Nets, Objective, eval_mode, spread, squared_error
from src.utils import expand_t


@dataclass(eq=False)
class JumpRegression(Objective, ABC):
    """||u(x_t, t, d) - target||^2, with the velocity as the target of a share of the batch.

    A method says which jumps it learns (`jumps`), from what (`target`), and how it weighs them (`weigh`).

    Args:
        flow: share of the batch that learns the velocity.
        clip: largest absolute value of a jump target's components; data lie in [-1, 1].
    """

    flow: float = 0.5
    clip: float = 4.0

    @property
    def keeps_velocity(self) -> bool:
        return self.flow > 0

    @abstractmethod
    def jumps(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Times t and lengths d in (0, t] of random jumps, [batch_size] each."""

    @abstractmethod
    def target(self, nets: Nets, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, progress: float) -> Tensor:
        """What u(x_t, t, d) should be; v = eps - x of the same samples. Without gradient, teachers in eval mode."""

    def weigh(self, error: Tensor, t: Tensor, d: Tensor, progress: float) -> Tensor:
        """The per-sample loss [B] of the squared errors [B]."""
        return error

    def draw(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        batch_size = shape[0]
        jumping = spread(batch_size, 1 - self.flow)
        t, d = self.jumps(batch_size)
        return {
            "t": torch.where(jumping, t, self.scheduler.sample_timesteps(batch_size, "cpu")),
            "d": torch.where(jumping, d, 0.0),
        }

    def loss(
        self, nets: Nets, data: Tensor, noise: Tensor, progress: float, draw: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Rows are chosen on the CPU, where their number is known without waiting for the GPU.
        rows = (draw["d"] == 0).nonzero().squeeze(1), draw["d"].nonzero().squeeze(1)
        t, d, flow, jump = (x.to(data.device, non_blocking=True) for x in (draw["t"], draw["d"], *rows))

        x_t = self.scheduler.forward_process(data, noise, t)
        target = self.scheduler.get_target(data, noise, t)
        if len(jump):
            with torch.no_grad(), eval_mode(nets.ema):
                wanted = self.target(nets, x_t[jump], t[jump], d[jump], target[jump], progress)
            target[jump] = wanted.clamp(-self.clip, self.clip)

        error = squared_error(nets.student.predict(x_t, t, d), target)
        each = error.detach()
        return self.weigh(error, t, d, progress), {"loss_flow": each[flow], "loss_jump": each[jump]}

    def two_jumps(self, teacher, x_t: Tensor, t: Tensor, d: Tensor) -> Tensor:
        """The mean velocity over d by two jumps of a teacher over d/2."""
        middle = t - d / 2
        first = teacher.velocity(x_t, t, middle)
        x_middle = self.scheduler.reverse_process_step(x_t, first, t, middle).clamp(-self.clip, self.clip)
        return (first + teacher.velocity(x_middle, middle, t - d)) / 2

    def partial_jump(self, model, x_t: Tensor, t: Tensor, d: Tensor, first: Tensor, alpha: Tensor) -> Tensor:
        """The mean velocity over d, made of `first` over its share `alpha` and of a model's jump over the rest."""
        middle = t - alpha * d
        x_middle = self.scheduler.reverse_process_step(x_t, first, t, middle)
        alpha = expand_t(alpha, x_t)
        return alpha * first + (1 - alpha) * model.predict(x_middle, middle, middle - (t - d))


def dyadic(batch_size: int, levels: int) -> tuple[Tensor, Tensor]:
    """Jumps of d = 1, 1/2, ..., 1/levels, equally often, from t a multiple of d: t and d, [batch_size] each."""
    inside = 2 ** torch.randint(levels.bit_length(), (batch_size,))  # jumps of this length in [0, 1]
    position = 1 + (torch.rand(batch_size) * inside).floor()
    return position / inside, 1 / inside


def adaptive(error: Tensor, power: float, floor: float = 1e-3) -> Tensor:
    """error / sg(error + floor)^power, which bounds the gradient of outliers (arXiv:2505.13447, section 4.3)."""
    return error / (error.detach() + floor) ** power
