"""Rectified flow: regress the velocity of the straight path (Liu et al., arXiv:2209.03003, eq. 1)."""

from torch import Tensor

from src.objectives.contract import Nets, Objective, squared_error


class RectifiedFlow(Objective):
    """||u(x_t, t, 0) - (eps - x)||^2. A jump is then an Euler step with the instantaneous velocity."""

    needs_condition = False
    learns_jumps = False

    def draw(self, batch_size: int) -> dict[str, Tensor]:
        return {"t": self.scheduler.sample_timesteps(batch_size, "cpu")}

    def loss(
        self, nets: Nets, data: Tensor, noise: Tensor, step: int, draw: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        t = draw["t"].to(data.device, non_blocking=True)
        x_t = self.scheduler.forward_process(data, noise, t)
        target = self.scheduler.get_target(data, noise, t)
        return squared_error(nets.student.predict(x_t, t), target), {}
