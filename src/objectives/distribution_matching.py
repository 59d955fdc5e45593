"""Distribution matching distillation with one's own flow as the real score (Yin et al., arXiv:2405.14867)."""

import copy
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from src.objectives.contract import Nets, Objective, eval_mode, spread, squared_error
from src.objectives.rollout import in_turn, jump_times, roll_out, sampler_times
from src.utils import NFES, expand_t


@dataclass(eq=False)
class DistributionMatching(Objective):
    """Moves a sample's last jump along the difference of two scores: the teacher's of the data, and that of the
    samples, learned beside it by a second network (arXiv:2405.14867, eq. 2 and section 4.2; weighted as in
    arXiv:2311.18828, eq. 8).

    The last jump of NFE 1, 2 or 4 starts from the student's own state there. The jumps before it are held to the
    teacher's, from noised data. With x^ = x_tau - tau v, the difference of scores is proportional to
    tau (v_teacher - v_samples). The paper's GAN loss (section 4.3) is left out.

    Args:
        critic_rate: multiple of the run's learning rate, for the samples' score.
        critic_steps: its steps for each of the student's; the paper takes five.
        told: whether that score is told the NFE, as d = 1/NFE; else one score serves the samples of all three.
        hold: share of the batch that regresses the teacher's jumps before the last.
    """

    rate: float = 0.1
    critic_rate: float = 0.5
    critic_steps: int = 1
    told: bool = False
    hold: float = 0.25

    needs_teacher = True
    asks_velocity = True
    keeps_velocity = False
    beta1 = 0.0
    citations = ("yin2024improved", "yin2024one")

    def make_critic(self, model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
        return copy.deepcopy(model).eval().requires_grad_(True)

    def draw(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        batch_size = shape[0]
        nfe = in_turn([*NFES], batch_size)
        hold = spread(batch_size, self.hold)
        # The four jumps that are not the last: one of NFE 2, three of NFE 4.
        jump = torch.randint(4, (batch_size,))
        nfe = torch.where(hold, torch.where(jump == 3, 2, 4), nfe)
        position = torch.where(hold, jump % 3, nfe - 1)
        return {
            "nfe": nfe,
            "position": position,
            "hold": hold,
            "tau": 0.02 + 0.96 * torch.rand(batch_size),
            "tau_noise": torch.randn(shape),
        }

    def draw_for_critic(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        # Its samples are of the NFEs that are moved: held jumps, which are of NFE 2 and 4 alone, do not count.
        drawn = self.draw(shape)
        return {"nfe": in_turn([*NFES], shape[0]), "tau": drawn["tau"], "tau_noise": drawn["tau_noise"]}

    def loss(
        self, nets: Nets, data: Tensor, noise: Tensor, progress: float, draw: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, t, s, held, moved = self._starts(nets.student, data, noise, draw)
        with eval_mode(nets.student):
            x_s = nets.student.jump(x_t, t, s)
        with torch.no_grad(), eval_mode(nets.teacher):
            wanted = x_s.detach().clone()
            if len(held):
                wanted[held] = nets.teacher.jump(x_t[held], t[held], s[held])
            if len(moved):
                wanted[moved] -= self._direction(nets, wanted[moved], moved, draw)
        loss = squared_error(x_s, wanted)
        # A held jump counts as its mean velocity.
        loss = torch.where(s > 0, loss / (t - s).square(), loss)
        each = loss.detach()
        return loss, {"loss_hold": each[held], "loss_matching": each[moved]}

    def critic_loss(
        self, nets: Nets, data: Tensor, noise: Tensor, progress: float, draw: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The velocity's regression on samples."""
        nfe, tau, tau_noise = (draw[name].to(data.device, non_blocking=True) for name in ("nfe", "tau", "tau_noise"))
        x_t, t, s = roll_out(nets.student, noise, draw["nfe"], draw["nfe"] - 1)
        with torch.no_grad(), eval_mode(nets.student):
            x_0 = nets.student.jump(x_t, t, s)
        x_tau = self.scheduler.forward_process(x_0, tau_noise, tau)
        v = nets.critic.predict(x_tau, tau, 1 / nfe if self.told else None)
        loss = squared_error(v, self.scheduler.get_target(x_0, tau_noise, tau))
        return loss, {"loss_critic": loss.detach()}

    def _starts(self, student, data: Tensor, noise: Tensor, draw: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """States x_t and jumps (t, s), and which rows are held and which are moved."""
        held, moved = (
            which.nonzero().squeeze(1).to(data.device, non_blocking=True) for which in (draw["hold"], ~draw["hold"])
        )
        position = torch.where(draw["hold"], 0, draw["position"])
        x_t, *_ = roll_out(student, noise, draw["nfe"], position)
        times = sampler_times(self.scheduler, draw["nfe"])
        t, s = (time.to(data.device, non_blocking=True) for time in jump_times(times, draw["position"]))
        x_t[held] = self.scheduler.forward_process(data[held], noise[held], t[held])
        return x_t, t, s, held, moved

    def _direction(self, nets: Nets, x_0: Tensor, rows: Tensor, draw: dict[str, Tensor]) -> Tensor:
        """The way from where the data's score pulls a noised sample to where the samples' score does."""
        nfe, tau, tau_noise = (
            draw[name].to(x_0.device, non_blocking=True)[rows] for name in ("nfe", "tau", "tau_noise")
        )
        x_tau = self.scheduler.forward_process(x_0, tau_noise, tau)
        v_data = nets.teacher.predict(x_tau, tau)
        v_samples = nets.critic.predict(x_tau, tau, 1 / nfe if self.told else None)
        tau = expand_t(tau, x_0)
        distance = (x_0 - (x_tau - tau * v_data)).abs().flatten(1).mean(1).clamp(min=1e-3)
        return tau * (v_data - v_samples) / expand_t(distance, x_0)
