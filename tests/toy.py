"""A two-dimensional problem that trains in seconds: a mixture of Gaussians, and an MLP in the U-Net's place."""

import copy
import math

import numpy as np
import torch
import torch.nn as nn

from custom_model import CustomGenerativeModel, CustomScheduler
from src.objectives import make_objective, parse_stages
from src.training.engine import Training
from src.training.recipe import Recipe, Stage, plan


class MLP(nn.Module):
    """u(x, t, d) for points [B, 1, 1, 2], with the U-Net's call and its times scaled by 1000."""

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
        parts = [x.flatten(1), self.embed(timestep)]
        if self.use_additional_condition:
            parts.append(self.embed(condition))
        return self.layers(torch.cat(parts, dim=-1)).reshape(x.shape)


class GaussianField(nn.Module):
    """The exact velocity for data N(0, SIGMA^2): the flow keeps x_t in proportion to its spread."""

    SIGMA = 0.5
    use_additional_condition = False

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))  # a model asks its parameters for the device

    def forward(self, x, timestep):
        t = (timestep / 1000).reshape(-1, *[1] * (x.ndim - 1))
        variance = ((1 - t) * self.SIGMA).square() + t.square()
        return (t - (1 - t) * self.SIGMA**2) / variance * x


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


def one_stage(model: CustomGenerativeModel, steps: int = 100, name: str = "only") -> list[Stage]:
    """All of a training with the model's own objective."""
    return [Stage(name, model.objective, steps)]


def as_images(points: torch.Tensor) -> np.ndarray:
    """Points in [-1, 1], [N, 2], as the engine wants its data: uint8 [N, 1, 1, 2]. Its flips exchange x and y."""
    return ((points.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()[:, None, None]


BEGUN = {}  # how runs on the mixture stood after their first stage, which many have in common


def train_on_mixture(
    stages: str, steps: int = 2000, batch: int = 512, lr: float = 2e-3, time_scale=1000
) -> CustomGenerativeModel:
    """The engine's EMA model after `steps` with `stages`, everything from seed 0."""
    torch.manual_seed(0)
    model = CustomGenerativeModel(
        MLP(use_additional_condition=True), CustomScheduler(time_scale), objective="rectified_flow"
    )
    recipe = Recipe(batch, steps, lr, warmup=0, lr_decay_start=steps // 4, weight_decay=0.0, ema_decay=0.99, seed=0)
    planned = plan(parse_stages(stages), lambda name: make_objective(name, model.scheduler), steps)
    images = as_images(mixture(20_000, torch.Generator().manual_seed(3)))
    training = Training(model, images, recipe, planned)
    training.bf16 = False
    first = steps, batch, lr, time_scale, planned[0].name, planned[0].steps
    if first in BEGUN:
        training.restore(BEGUN[first])
    while training.steps < steps:
        training.step()
        if training.steps == planned[0].steps:
            BEGUN[first] = copy.deepcopy({"training": training.state(), "state_dict": training.ema.model.state_dict()})
    return training.ema.model


def distances(model: CustomGenerativeModel, nfes=(1, 2, 4), count: int = 4000) -> dict[int, float]:
    """Sliced Wasserstein distance of samples to fresh points of the mixture, from the same noise at each NFE."""
    target = mixture(count, torch.Generator().manual_seed(7))
    found = {}
    for nfe in nfes:
        samples = model.sample((count, 1, 1, 2), nfe, generator=torch.Generator().manual_seed(1))
        found[nfe] = sliced_wasserstein(samples.flatten(1), target)
    return found
