"""Adversarial finetuning of a flow map at the samples of 1, 2 and 4 steps."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from src.errors import UserError
from src.objectives.contract import Nets, Objective, eval_mode, squared_error
from src.objectives.critics import ConvCritic, EncoderCritic, augment, warp
from src.objectives.rollout import in_turn, jump_times, sample_through, sampler_times

# Row by row, the NFE and which of its jumps the anchor holds. Six of eight rows have NFE 1, which has furthest to go,
# one 2 and one 4, in the same sequence in each eight; each jump of an NFE comes as often as its others.
DRAWN = [jump for i in range(4) for jump in ((1, 0), (2, i // 2), (1, 0), (1, 0), (1, 0), (4, i), (1, 0), (1, 0))]

# Displacements that make lines wobble: their root mean square, as a share of the side, and the nodes a side of the
# noise that they interpolate. Faces warped so are nearest to samples (benchmarks/LOG.md, "its lines wobble").
WOBBLE, NODES = 0.011, 16


@dataclass(eq=False)
class Adversarial(Objective):
    """softplus(D(real) - D(fake)) for the student and with the sign turned for the critic D, on pairs of a real and a
    generated image (arXiv:2501.05441, eq. 2), with penalties on D's gradient at both. D has a last layer for each NFE.

    Samples: 1, 2 or 4 jumps; the gradient goes through all of them (arXiv:2309.17400), divided by the root of their
    number. Student and critic are without dropout.

    Penalties: finite differences (D(x) - D(x + step z))^2 / step^2 (arXiv:2511.22475) on every fourth image, along
    noise z about as strong in each octave as natural images are (Field 1987). That is D's slope in a Sobolev norm
    (arXiv:1806.06621): it restrains how D sees grain less than white noise would, and how it sees colour more.

    Anchor: one of the jumps is held near that of the model the stage began with, less and less, and long jumps less
    than short ones, which that model takes well already.

    `matching` adds what the critic's judgement leaves out: that all its features should have the same mean over samples
    as over real images (arXiv:1606.03498, section 3.1), see `feature_gap`.

    Args:
        critic: "encoder", the way down of the stage's first model, or "conv", a small net from scratch.
        critic_rate: multiple of the run's learning rate, for the critic.
        critic_steps: critic's steps for each of the student's.
        gamma: weight of the penalties.
        anchor, anchor_end: weight of ||u - u_teacher||^2 at the stage's begin, and at its end for the jump from noise
            to data; geometric in between, in the stage's progress times the jump's length.
        augmented: whether the critic sees augmented images.
        warped: share of the samples that the critic learns from which are real images with wobbling lines instead,
            what samples have and images do not (negative data augmentation, arXiv:2102.05113; benchmarks/LOG.md,
            "its lines wobble").
        matching: weight of the `feature_gap` in the student's loss; its gradient is nearly the same on average, not
            exactly, in smaller slices of the batch or over more processes.
    """

    rate: float = 0.5
    critic: str = "encoder"
    critic_rate: float = 1.25
    critic_steps: int = 1
    gamma: float = 0.05
    anchor: float = 1.0
    anchor_end: float = 0.02
    augmented: bool = True
    warped: float = 0.0
    matching: float = 0.0

    STEP = 0.01
    needs_teacher = True
    keeps_velocity = False
    follows_progress = True
    beta1 = 0.0
    citations = (
        "huang2024gan",
        "clark2024directly",
        "lin2025adversarial",
        "choi2020stargan",
        "adler2018banach",
        "field1987relations",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.critic not in ("encoder", "conv"):
            raise UserError(f"unknown critic {self.critic!r}: choose encoder or conv")
        if self.critic == "encoder":
            self.citations += ("sauer2024fast",)
        if self.augmented:
            self.citations += ("zhao2020differentiable",)
        if self.warped:
            self.citations += ("sinha2021negative",)
        if self.matching:
            self.citations += ("salimans2016improved",)
            self.at_once = 16

    def make_critic(self, model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
        return EncoderCritic(model) if self.critic == "encoder" else ConvCritic(shape)

    def draw(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        nfe, position = in_turn(DRAWN, shape[0]).unbind(1)
        return {"nfe": nfe, "position": position, "augmentation": torch.rand(shape[0], 6)}

    def draw_for_critic(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        draw = self.draw(shape)
        draw["penalised"] = (torch.arange(shape[0]) + torch.randint(4, ())) % 4 == 0
        draw["step"] = torch.zeros(shape)
        noise = octave_noise((-(-shape[0] // 4), *shape[1:]))  # of no other rows: it is slow
        draw["step"][draw["penalised"]] = noise[: draw["penalised"].sum()] * self.STEP
        if self.warped:
            draw["warped"] = torch.rand(shape[0], 1, 1, 1) < self.warped
            draw["displacement"] = wobble(shape)
        return draw

    def loss(
        self, nets: Nets, data: Tensor, noise: Tensor, progress: float, draw: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        nfe = draw["nfe"].to(data.device, non_blocking=True)
        fake, x_t, u = sample_through(nets.student, noise, draw["nfe"], draw["position"])
        times = jump_times(sampler_times(self.scheduler, draw["nfe"]), draw["position"])
        t, s = (time.to(data.device, non_blocking=True) for time in times)
        with torch.no_grad(), eval_mode(nets.teacher):
            anchor = nets.teacher.velocity(x_t, t, s)
        real, fake = self._seen(data, fake, draw)
        (d_real, features_real), (d_fake, features_fake) = nets.critic(real, nfe), nets.critic(fake, nfe)
        adversarial = F.softplus(d_real - d_fake)
        held = squared_error(u, anchor)
        weight = self.anchor * (self.anchor_end / self.anchor) ** (progress * (t - s))
        logs = {"loss_adversarial": adversarial.detach(), "anchor": held.detach()}
        loss = adversarial / nfe.sqrt() + weight * held
        if self.matching:
            gap = feature_gap(features_real, features_fake)
            logs["feature_gap"] = gap.detach().expand(len(loss))
            loss = loss + self.matching * gap
        return loss, logs

    def critic_loss(
        self, nets: Nets, data: Tensor, noise: Tensor, progress: float, draw: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        nfe = draw["nfe"].to(data.device, non_blocking=True)
        with torch.no_grad():
            fake, *_ = sample_through(nets.student, noise, draw["nfe"], draw["position"])
            if self.warped:
                warped, displacement = (draw[k].to(data.device, non_blocking=True) for k in ("warped", "displacement"))
                fake = torch.where(warped, warp(data, displacement), fake)
            real, fake = self._seen(data, fake, draw)
        d_real, d_fake = nets.critic(torch.cat([real, fake]), nfe.repeat(2))[0].chunk(2)
        loss = F.softplus(d_fake - d_real)
        rows = draw["penalised"].nonzero().squeeze(1).to(data.device, non_blocking=True)
        step = draw["step"].to(data.device, non_blocking=True)[rows]
        steepness = loss.new_zeros(0)
        if len(rows):
            x = torch.cat([real[rows], fake[rows]])
            moved = x + torch.cat([step, step])
            with torch.autocast(data.device.type, enabled=False):  # bfloat16 would round the differences away
                before, after = nets.critic(torch.cat([x, moved]), nfe[rows].repeat(4))[0].chunk(2)
            steepness = ((after - before) / self.STEP).square().reshape(2, -1).sum(0)
            loss = loss.index_add(0, rows, 4 * self.gamma / 2 * steepness)  # of every fourth
        right = (d_real > d_fake).float()
        return loss, {"loss_critic": loss.detach(), "critic_right": right, "critic_steepness": steepness.detach()}

    def _seen(self, real: Tensor, fake: Tensor, draw: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the critic sees of real and of generated images."""
        if not self.augmented:
            return real, fake
        drawn = draw["augmentation"].to(real.device, non_blocking=True)
        return augment(real, drawn), augment(fake, drawn)


def feature_gap(real: Tensor, fake: Tensor) -> Tensor:
    """Squared distance of the mean features of real and generated images, in units of each feature's variance over the
    real ones, averaged over features.

    The differences of two halves of the batch are multiplied: the square of one would contain how much samples vary,
    and be lowered by varying less. Rows go to the halves by eights, so that both have the same NFEs (`DRAWN`); unlike
    halves could be told to differ with opposite signs. Once the means agree it is about as often negative as positive.
    (Where features are Gaussian it is on average 2 / (n (n - 1)) above, for n real images: no sample changes that.)

    Args:
        real, fake: of 16 images or more; the halves are alike in full where their number is a multiple of eight.
    """
    first = (torch.arange(len(real), device=real.device)[:, None] // 8 % 2 == 0).float()
    real = real.detach()
    halves = [((fake - real) * half).sum(0) / half.sum() for half in (first, 1 - first)]
    # Divided by n - 3, for one over a Gaussian variance to be unbiased whatever n is: a slice of the batch has fewer.
    return (halves[0] * halves[1] / real.var(0, correction=3).clamp(min=1e-12)).mean()


def octave_noise(shape: tuple[int, ...]) -> Tensor:
    """Gaussian noise of unit variance, [B, C, H, H]: white noise of H, H / 2, ..., 1 pixels a side, enlarged and added
    up. About a third is one shift of each channel, the rest about as strong in each octave of frequencies."""
    sides = [shape[-1] >> k for k in range(shape[-1].bit_length())]
    z = sum(F.interpolate(torch.randn(*shape[:2], side, side), size=shape[-2:], mode="bilinear") for side in sides)
    weights = [F.interpolate(torch.eye(side)[None], size=shape[-1], mode="linear") for side in sides]
    return z / sum(w.square().sum(1).mean() ** 2 for w in weights).sqrt()  # enlarged noise has less variance


def wobble(shape: tuple[int, ...]) -> Tensor:
    """Smooth random displacements for `warp`, [B, 2, H, W] in shares of the side."""
    z = F.interpolate(torch.randn(shape[0], 2, NODES, NODES), size=shape[-2:], mode="bicubic")
    return z * (WOBBLE / z.square().mean().sqrt())
