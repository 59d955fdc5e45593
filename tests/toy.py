"""A two-dimensional problem that trains in seconds: a mixture of Gaussians, and an MLP in the U-Net's place."""

import math

import torch
import torch.nn as nn

from custom_model import CustomGenerativeModel, CustomScheduler
from src.objectives import OBJECTIVES
from src.training.ema import EMA
from src.training.engine import Loss, accumulate_gradient


class MLP(nn.Module):
    """u(x, t, d) for points [B, 2], with the U-Net's call and its times scaled by 1000."""

    def __init__(self, use_additional_condition: bool, width: int = 128):
        super().__init__()
        self.use_additional_condition = use_additional_condition
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-2, 6) / 1000)
        inputs = 2 + 16 * (1 + use_additional_condition)
        self.layers = nn.Sequential(
            nn.Linear(inputs, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def embed(self, t):
        angles = t[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def forward(self, x, timestep, condition=None):
        parts = [x, self.embed(timestep)]
        if self.use_additional_condition:
            parts.append(self.embed(condition))
        return self.layers(torch.cat(parts, dim=-1))


def mixture(count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Points of eight Gaussians (standard deviation 0.05) on a circle of radius 0.8, [count, 2]."""
    angle = torch.randint(8, (count,), generator=generator) * math.pi / 4
    centre = 0.8 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    return centre + 0.05 * torch.randn(count, 2, generator=generator)


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = 64) -> float:
    """Sliced 2-Wasserstein distance between as many points, [N, 2] and [N, 2]."""
    angle = torch.arange(directions) * math.pi / directions
    onto = torch.stack([angle.cos(), angle.sin()])
    difference = (a @ onto).sort(dim=0).values - (b @ onto).sort(dim=0).values
    return difference.square().mean().sqrt().item()


def train_on_mixture(name: str, steps: int = 2000, batch: int = 512, lr: float = 2e-3) -> CustomGenerativeModel:
    """The EMA model of an objective after `steps` of Adam with linear decay, everything from seed 0."""
    torch.manual_seed(0)
    network = MLP(use_additional_condition=OBJECTIVES[name].needs_condition)
    model = CustomGenerativeModel(network, CustomScheduler(), objective=name)
    ema = EMA(model, decay=0.99)
    loss_module = Loss(model, ema.model)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        data = mixture(batch)
        accumulate_gradient(loss_module, data, torch.randn_like(data), model.objective.draw(batch), step)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step + 1)
    return ema.model


def distances(model: CustomGenerativeModel, nfes=(1, 2, 4), count: int = 4000) -> dict[int, float]:
    """Sliced Wasserstein distance of samples to fresh points of the mixture, from the same noise at each NFE."""
    target = mixture(count, torch.Generator().manual_seed(7))
    return {
        nfe: sliced_wasserstein(model.sample((count, 2), nfe, generator=torch.Generator().manual_seed(1)), target)
        for nfe in nfes
    }
