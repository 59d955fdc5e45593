"""Consistency trajectory models: jumps agree after both are mapped to 0 (Kim et al., arXiv:2310.02279)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from src.objectives.contract import Nets, Objective, eval_mode, heun_step, squared_error


@dataclass(eq=False)
class Trajectory(Objective):
    """||G(G(x_t, t, s), s, 0) - G(G(solver(x_t, t, t'), t', s), s, 0)||^2 (section 3.2, the match of eq. 3 mapped to
    0), plus the velocity's regression. The first G on the left is the student's jump, every other the EMA's; the solver
    is a Heun step of the teacher's.

    Without the paper's adversarial part and pretrained distances.

    Args:
        levels: t, t' and s lie on multiples of 1/levels; the solver takes one Heun step from t to t' = t - 1/levels.
        flow: weight of the velocity's regression, at most 1.
    """

    levels: int = 16
    flow: float = 1.0

    needs_teacher = True
    asks_velocity = True
    citations = ("kim2024consistency",)

    @property
    def keeps_velocity(self) -> bool:
        return self.flow > 0

    def draw(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        # Of samples of few steps: at least a quarter of the jumps start from pure noise, and half end at data.
        batch_size = shape[0]
        start = 1 + torch.randint(self.levels, (batch_size,))
        start = torch.where(torch.rand(batch_size) < 0.25, self.levels, start)
        end = (torch.rand(batch_size) * start).floor()
        end = torch.where(torch.rand(batch_size) < 0.5, 0.0, end)
        v_t = self.scheduler.sample_timesteps(batch_size, "cpu")
        return {"t": start / self.levels, "s": end / self.levels, "v_t": v_t}

    def loss(
        self, nets: Nets, data: Tensor, noise: Tensor, progress: float, draw: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        t, s, v_t = (draw[name].to(data.device, non_blocking=True) for name in ("t", "s", "v_t"))
        x_t = self.scheduler.forward_process(data, noise, t)
        zero = torch.zeros_like(t)
        with eval_mode(nets.ema):
            with torch.no_grad(), eval_mode(nets.teacher):
                middle = (t - 1 / self.levels).clamp(min=0.0)
                x_middle = heun_step(nets.teacher, x_t, t, middle)
                target = nets.ema.jump(nets.ema.jump(x_middle, middle, s), s, zero)
            x_s = nets.student.jump(x_t, t, s)
            jump = squared_error(nets.ema.jump(x_s, s, zero), target)
        x_v = self.scheduler.forward_process(data, noise, v_t)
        flow = squared_error(nets.student.predict(x_v, v_t), self.scheduler.get_target(data, noise, v_t))
        return jump + self.flow * flow, {"loss_flow": flow.detach(), "loss_jump": jump.detach()}
