"""Progressive distillation: one jump equals two of a frozen teacher's (arXiv:2202.00512, algorithm 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from src.errors import UserError
from src.objectives.contract import Nets
from src.objectives.shortcut import Shortcut, must_be_power_of_two


@dataclass(eq=False)
class Progressive(Shortcut):
    """The student takes one of `steps` equal jumps where the teacher, who began the stage, takes two.

    The paper keeps one model for each number of steps. Here one model serves them all: a share of the jumps are the
    shorter ones of the stages before, so that they are not forgotten.

    Args:
        levels: steps of the first stage's teacher, a power of two; the first of them is a rectified flow.
        steps: jumps from t = 1 to t = 0 in this stage; 0 stands for a stage each of levels/2, levels/4, ..., 1.
        keep: share of the jumps that are shorter ones.
    """

    levels: int = 16
    flow: float = 0.25
    steps: int = 0
    keep: float = 0.5

    needs_teacher = True
    citations = ("salimans2022progressive",)

    def __post_init__(self):
        super().__post_init__()
        if self.steps and (self.steps < 0 or self.levels // 2 % self.steps):
            raise UserError(f"the option steps must divide levels/2 = {self.levels // 2}, got {self.steps}")

    @property
    def asks_velocity(self) -> bool:
        # The first stage, and kept jumps, ask the teacher for 1/levels: the velocity of one with as many levels, and
        # nothing that one without a velocity need have learned.
        return self.keep > 0 or self.steps == self.levels // 2

    @classmethod
    def unfold(cls, options: dict) -> list[dict]:
        if options.get("steps"):
            return [options]
        levels = options.get("levels", cls.levels)
        must_be_power_of_two(levels)
        most = levels // 2
        return [{**options, "steps": most >> i} for i in range(most.bit_length())]

    def jumps(self, batch_size: int) -> tuple[Tensor, Tensor]:
        shorter = (self.levels // 2 // self.steps).bit_length() - 1  # levels that the stages before have taught
        level = 1 + torch.randint(max(1, shorter), (batch_size,))
        kept = (torch.rand(batch_size) < self.keep) & (shorter > 0)
        inside = self.steps * 2 ** torch.where(kept, level, 0)
        position = 1 + (torch.rand(batch_size) * inside).floor()
        return position / inside, 1 / inside

    def target(self, nets: Nets, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, progress: float) -> Tensor:
        return self.two_jumps(nets.teacher, x_t, t, d)
