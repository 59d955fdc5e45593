"""What every training objective offers, and what it is given.

An objective is a loss on the flow map u(x_t, t, d), the mean velocity from time t down to t - d, so that
x_{t-d} = x_t - d * u(x_t, t, d). d = 0 is the instantaneous velocity. A class in a file of its own, its options
being dataclass fields, with `draw` and `loss`:

    @dataclass(eq=False)
    class Name(Objective):
        option: float = 0.5

An objective with a critic also has `make_critic`, and `critic_loss` like `loss`; the engine steps the critic's own
optimizer `critic_steps` times before each step of the student.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from src.errors import UserError


class Nets(NamedTuple):
    """The models an objective may ask for. Student, EMA and teacher have `predict(xt, t, d)` and `jump(xt, t, t_next)`;
    a critic has what its objective gives it."""

    student: nn.Module
    ema: nn.Module
    teacher: nn.Module | None = None  # the frozen model that the stage began with
    critic: nn.Module | None = None


@dataclass(eq=False)
class Objective(ABC):
    """A loss on the flow map, and what the engine must know of it; a subclass overrides what differs.

    Args:
        rate: multiple of the run's learning rate.
        steady: share of the stage after which the rates, a critic's too, fall with the inverse square root of the step
            (on top of the run's own schedule).
        muon: whether Muon (`src/training/muon.py`), with a momentum of its own, trains the weight matrices of the
            student's blocks, not AdamW.
    """

    scheduler: nn.Module
    rate: float = 1.0
    steady: float = 1.0
    muon: bool = False

    # What options of these names must be, in every objective that has them.
    SHARES = ("flow", "keep", "grid", "real", "hold", "warped", "t")
    COUNTS = ("levels", "pairs", "solver_steps", "critic_steps")
    POSITIVE = ("rate", "critic_rate", "alpha", "q", "anchor", "anchor_end", "steady")
    NOT_NEGATIVE = ("gamma", "power", "anneal", "matching")

    needs_condition = True  # does the network embed d?
    needs_teacher = False
    asks_velocity = False  # does it ask the teacher for the velocity, u(x_t, t, 0)?
    keeps_velocity = True  # is u(x_t, t, 0) still the velocity when it has trained?
    follows_progress = False  # does the loss change over the stage?
    at_once = 1  # images that `loss` must be given at once
    pairs = 0  # (noise, image) pairs that the teacher generates before the stage begins
    critic_steps = 0
    beta1 = None  # of AdamW, for student and critic, where the run's will not do
    citations = ()  # keys of references.bib

    def __post_init__(self):
        for names, fits, wish in (
            (self.SHARES, lambda value: 0 <= value <= 1, "lie in [0, 1]"),
            (self.COUNTS, lambda value: value >= 1, "be at least 1"),
            (self.POSITIVE, lambda value: 0 < value < math.inf, "be positive"),
            (self.NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "not be negative"),
            (("clip",), lambda value: value > 0, "be positive"),  # or infinite
        ):
            for field in fields(self):
                if field.name in names and not fits(getattr(self, field.name)):
                    raise UserError(f"the option {field.name} must {wish}, got {getattr(self, field.name)}")

    @abstractmethod
    def draw(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Every random choice of one global batch of `shape` [B, ...]: tensors [B, ...] on the CPU.

        The engine slices them along with the data, so neither accumulation nor the number of processes changes what is
        learned from a sample (but where a loss compares a slice's images with one another: `matching`, `drifting`).
        """

    @abstractmethod
    def loss(
        self, nets: Nets, data: Tensor, noise: Tensor, progress: float, draw: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The per-sample loss [B], unreduced, and logs: 1-d tensors of any length, which the engine averages.

        Args:
            data, noise: images in [-1, 1] and Gaussian noise, [B, 3, H, W].
            progress: the share of the stage that is done, in [0, 1].
            draw: rows of what `draw` made.
        """

    def draw_for_critic(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """As `draw`, for a batch of the critic's."""
        return self.draw(shape)

    @classmethod
    def defaults(cls) -> dict:
        """All options and their defaults. An option that is added later must change nothing by default: a run from
        before it goes on with that."""
        return {field.name: field.default for field in fields(cls) if field.name != "scheduler"}

    def options(self) -> dict:
        """All options and their values."""
        return {name: getattr(self, name) for name in self.defaults()}

    def fall(self, progress: float) -> float:
        """What the rates are multiplied with at this share of the stage."""
        return math.sqrt(self.steady / max(self.steady, progress))

    @classmethod
    def unfold(cls, options: dict) -> list[dict]:
        """The options of each of the stages that one stage of this objective stands for."""
        return [options]

    def asked(self, t: Tensor, t_next: Tensor) -> Tensor | None:
        """The d that the network is asked for to jump from t to t_next; None: the instantaneous velocity."""
        return t - t_next

    def make_critic(self, model: nn.Module, shape: tuple[int, ...]) -> nn.Module | None:
        """A new critic of samples [B, *shape] for a stage that begins with `model`."""
        return None


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate inside (no dropout), leave every submodule in the mode it was found in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def heun_step(model, x_t: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """One step of Heun's method along the model's velocity, two network calls; x_t [B, ...], times [B] or scalars."""
    step = model.scheduler.reverse_process_step
    v = model.predict(x_t, t)
    return step(x_t, (v + model.predict(step(x_t, v, t, t_next), t_next)) / 2, t, t_next)


def spread(batch_size: int, share: float) -> Tensor:
    """True for a share of the rows, [batch_size] on the CPU, spread evenly so that every slice of it costs the same.

    The random offset gives small batches their share.
    """
    position = torch.arange(batch_size) * share + torch.rand(())
    return (position + share).floor() > position.floor()


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample: [B, ...] and [B, ...] -> [B]."""
    return (pred - target).square().flatten(1).mean(1)
