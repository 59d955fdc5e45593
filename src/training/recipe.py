"""What is trained: the recipe, and the plan of its stages."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from src.errors import UserError
from src.objectives.contract import Objective
from src.training import muon
from src.training.distributed import World


@dataclass
class Recipe:
    """How to train. A resumed run may change only what `FREE` lists.

    Args:
        batch_size: images of one optimizer step, over all processes.
        num_iterations: optimizer steps in all.
        lr: learning rate: linear from 0 over `warmup` steps, then constant, and falling with the inverse square
            root of the step from `lr_decay_start` on. Steps are counted in each stage; a later one warms up for at most
            a tenth of its steps.
        grad_clip: largest norm of the gradient.
        ema_decay: weight of the old average at each step.
        micro_batch: most images a process computes at once, in equal slices of its share of the batch; changes the
            memory, not the gradient (but for dropout's masks, and adversarial's `matching`, whose means are a
            slice's). 0: the whole share.
        seed: of weights, data order, noise, times and dropout.
        log_interval, save_interval, eval_interval: in steps; eval_interval 0: never.
        max_minutes: stop (and export) after this time in one session; None: never.
    """

    batch_size: int = 32  # the challenge's
    num_iterations: int = 100_000  # the challenge's
    lr: float = 1e-4  # the challenge's, and arXiv:2410.12557's
    warmup: int = 200
    lr_decay_start: int = 50_000  # inverse square root: arXiv:2312.02696
    beta1: float = 0.9
    beta2: float = 0.999  # arXiv:1412.6980
    weight_decay: float = 0.1  # arXiv:2410.12557
    grad_clip: float = 1.0  # arXiv:2209.03003's code
    ema_decay: float = 0.999  # arXiv:2410.12557
    micro_batch: int = 0
    seed: int = 42
    log_interval: int = 100
    save_interval: int = 10_000
    eval_interval: int = 0
    max_minutes: float | None = None

    def __post_init__(self):
        for name in ("batch_size", "num_iterations", "lr_decay_start", "log_interval", "save_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "micro_batch", "eval_interval"):
            if not 0 <= getattr(self, name) < math.inf:  # nor not a number
                raise UserError(f"--{name} must not be negative or infinite, got {getattr(self, name)}")
        for name in ("ema_decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr must be positive and finite, got {self.lr}")
        if not self.grad_clip > 0:
            raise UserError(f"--grad_clip must be positive, got {self.grad_clip}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UserError(f"--max_minutes must be positive, got {self.max_minutes}")

    def slices(self, count: int, world: World, stages: "list[Stage] | tuple" = ()) -> int:
        """How many equal slices a process's share of a batch is computed in; UserError if there are no such.

        Args:
            count: images in the data set.
            stages: what is trained; some want a number of images at once.
        """
        share, rest = divmod(self.batch_size, world.size)
        if rest:
            raise UserError(f"--batch_size {self.batch_size} does not split over {world.size} processes")
        if self.batch_size > count:
            raise UserError(f"{count} training images do not fill one batch of {self.batch_size}: lower --batch_size")
        most = self.micro_batch or share
        slices = next(slices for slices in range(1, share + 1) if share % slices == 0 and share // slices <= most)
        for stage in stages:
            least = stage.objective.at_once
            if share // slices < least:
                fewer = " or take fewer processes" if world.size > 1 else ""
                remedy = "raise --micro_batch" if share >= least else f"raise --batch_size{fewer}"
                raise UserError(f"{stage.name} wants {least} images at once or more, not {share // slices}: {remedy}")
        return slices

    def learning_rate(self, step: int, most_warmup: int | None = None) -> float:
        """Of the step after `step` steps."""
        warmup = self.warmup if most_warmup is None else min(self.warmup, most_warmup)
        return self.lr * min(1.0, (step + 1) / max(1, warmup)) / math.sqrt(max(1.0, step / self.lr_decay_start))


FREE = ("num_iterations", "micro_batch", "log_interval", "save_interval", "eval_interval", "max_minutes")


# Keys of references.bib for what every run builds on, beside its objectives and its path.
CITATIONS = (
    "challenge2025",
    "simpsons2018",
    "ho2020denoising",
    "paszke2019pytorch",
    "kingma2015adam",
    "loshchilov2019decoupled",
    "karras2024analyzing",
)


class Teacher(NamedTuple):
    """Where the weights that a run starts from were trained."""

    weights: str  # their hash
    stages: list[dict]  # as a run's record lists them
    seed: int | None = None  # of that run; None: an older version did not tell
    data: dict | None = None  # its images' hash and number


class Stage(NamedTuple):
    """A share of the training with one objective; each stage starts from the EMA of the one before."""

    name: str  # as `--stages` writes it
    objective: Objective
    steps: int


def plan(
    shares: list[tuple[str, float]],
    make: Callable[[str], Objective],
    num_iterations: int,
    started_from: Objective | None = None,
) -> list[Stage]:
    """Stages of whole steps from their names and shares.

    Args:
        make: the objective of a name.
        started_from: what the model before the first stage was trained with.
    Raises: UserError if a stage would have no step, or asks for a velocity that was not kept.
    """
    ends = np.cumsum([0.0] + [share for _, share in shares])
    ends = [round(end * num_iterations) for end in ends.tolist()]
    stages = [Stage(name, make(name), b - a) for (name, _), a, b in zip(shares, ends, ends[1:], strict=False)]
    for stage in stages:
        if stage.steps < 1:
            raise UserError(
                f"stage {stage.name} has no step of the {num_iterations}: raise --num_iterations or its share"
            )
    before = started_from
    for stage in stages:
        if stage.objective.asks_velocity and before is not None and not before.keeps_velocity:
            raise UserError(
                f"{stage.name} learns from the velocity of its teacher, which kept only its jumps: "
                f"name an earlier checkpoint with --teacher, or put the stage before the one that gave the velocity up"
            )
        before = stage.objective
    return stages


def history(stages: list[Stage], done: int, recipe: Recipe) -> list[dict]:
    """What the first `done` steps have trained, as run records and checkpoints list it."""
    trained = []
    for name, objective, planned in stages:
        if steps := min(planned, done):
            trained.append(
                {
                    "objective": name,
                    "steps": steps,
                    "batch_size": recipe.batch_size,
                    "lr": recipe.lr * objective.rate,
                    "lr_decay_start": recipe.lr_decay_start,
                    "options": objective.options(),
                    "citations": [*objective.citations, *(muon.CITATIONS if objective.muon else ())],
                }
            )
        done -= steps
    return trained
