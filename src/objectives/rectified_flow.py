"""Rectified flow and its second round: regress the velocity of the straight path (arXiv:2209.03003)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from src.errors import UserError
from src.objectives.contract import Nets, Objective, squared_error


@dataclass(eq=False)
class RectifiedFlow(Objective):
    """||u(x_t, t, 0) - (eps - x)||^2 (eq. 1). A jump is then an Euler step with the instantaneous velocity."""

    needs_condition = False
    citations = ("liu2023flow",)

    def asked(self, t: Tensor, t_next: Tensor) -> None:
        return None

    def draw(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"t": self.scheduler.sample_timesteps(shape[0], "cpu")}

    def loss(
        self, nets: Nets, data: Tensor, noise: Tensor, progress: float, draw: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        t = draw["t"].to(data.device, non_blocking=True)
        x_t = self.scheduler.forward_process(data, noise, t)
        target = self.scheduler.get_target(data, noise, t)
        return squared_error(nets.student.predict(x_t, t), target), {}


@dataclass(eq=False)
class Reflow(RectifiedFlow):
    """Rectified flow on (noise, image) pairs of the teacher's ODE, whose paths cross less (algorithm 1).

    The engine generates the pairs before the stage begins and lays them in the rows that `draw` names.

    Args:
        pairs: how many.
        solver: of the teacher's ODE: "heun" (two network calls a step) or "euler".
        solver_steps: from t = 1 to t = 0.
        real: share of the batch that is data with independent noise instead.
    """

    pairs: int = 20_000
    solver: str = "heun"
    solver_steps: int = 16
    real: float = 0.0

    needs_teacher = True
    asks_velocity = True

    def __post_init__(self):
        super().__post_init__()
        if self.solver not in ("heun", "euler"):
            raise UserError(f"unknown solver {self.solver!r}: choose heun or euler")

    def draw(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        real = torch.rand(shape[0]) < self.real
        pair = torch.randint(max(1, self.pairs), (shape[0],))  # an estimate has none
        return {**super().draw(shape), "pair": torch.where(real, -1, pair)}
