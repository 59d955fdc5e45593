"""MeanFlow: the mean velocity by its differential identity (Geng et al., arXiv:2505.13447 and 2512.02012)."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.objectives.contract import Nets, eval_mode
from src.objectives.regression import JumpRegression, adaptive
from src.utils import expand_t


@dataclass(eq=False)
class MeanFlow(JumpRegression):
    """u(x_t, t, d) <- v - d * du/dt along the path, r = t - d held (2505.13447, eqs. 6 and 10).

    du/dt is a Jacobian-vector product of the student, taken in float32 in eval mode. It holds the derivative of the
    time embedding, so the times want a mild scale: `num_train_timesteps` of 16 or so, not 1000.

    Args:
        improved: take du/dt along the model's own velocity instead of the sample's (2512.02012, eq. 12),
            whose loss ||u + d sg(du/dt) - v||^2 has the same gradient.
        power: of the adaptive weight; 0 is the plain squared error.
    """

    flow: float = 0.25
    clip: float = math.inf  # the target is noisy, and cutting its tails would move its mean
    improved: bool = False
    power: float = 0.75

    citations = ("geng2025mean",)

    def __post_init__(self):
        super().__post_init__()
        if self.improved:
            self.citations += ("geng2025improved",)
        if self.scheduler.num_train_timesteps > 100:
            warnings.warn(
                "mean_flow differentiates the time embedding, which is steep at this scale of the times: train all "
                f"stages with --num_train_timesteps 16 or so, not {self.scheduler.num_train_timesteps}",
                stacklevel=2,
            )

    def jumps(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """t and r in order, from logit-normals (-0.6, 1.6) and (-4, 1.6), the means of the authors' code for
        CIFAR-10 (github.com/Gsunshine/py-meanflow), which makes a pair in the wrong order r = t instead."""
        t, r = ((torch.randn(batch_size) * 1.6 + mean).sigmoid() for mean in (-0.6, -4.0))
        t, r = torch.maximum(t, r), torch.minimum(t, r)
        t = t.clamp(min=1e-4)  # so that no jump, of 1e-4 at least, ends below 0
        return t, (t - r).clamp(min=1e-4)

    def target(self, nets: Nets, x_t: Tensor, t: Tensor, d: Tensor, v: Tensor, progress: float) -> Tensor:
        student = nets.student
        with eval_mode(student), torch.autocast(x_t.device.type, enabled=False):
            along = student.predict(x_t, t, torch.zeros_like(d)) if self.improved else v
            ones = torch.ones_like(t)
            # Forward-mode differentiation does not compile, nor does fused attention have it.
            with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), without_tf32():
                _, slope = torch.func.jvp(student.predict, (x_t, t, d), (along, ones, ones))
        return v - expand_t(d, x_t) * slope

    def weigh(self, error: Tensor, t: Tensor, d: Tensor, progress: float) -> Tensor:
        return adaptive(error, self.power)


@contextmanager
def without_tf32() -> Iterator[None]:
    """All of float32's digits in matrix products and convolutions on GPUs, where training gets by with fewer."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
