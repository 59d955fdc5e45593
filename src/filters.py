"""Filters of finished samples, for what few jumps get wrong: grain in even areas, and edges without contrast."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

RADIUS = 8  # how far, in pixels each way, a smoothed pixel looks
PASSES = 4


def non_local_means(x: Tensor, sigma: float) -> Tensor:
    """Images [B, C, H, W] without their grain: non-local means (Buades, Coll and Morel, CVPR 2005), four passes.

    Each pixel becomes the mean of the 17x17 around it, weighted by exp(-d / (2 sigma^2)): d is the squared difference
    of the two 3x3 patches (weighted as in `blurred`), averaged over channels. So edges are left alone, and grain is
    told from them by more than one pixel.

    Args:
        sigma: in units of x, whose range is about [-1, 1].
    """
    height, width = x.shape[-2:]
    for _ in range(PASSES):
        padded = F.pad(x, (RADIUS,) * 4, mode="replicate")
        total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for i, j in itertools.product(range(2 * RADIUS + 1), repeat=2):  # summed up: 289 images are much memory
            near = padded[..., i : i + height, j : j + width]
            weight = (-blurred((near - x).square().mean(1, keepdim=True)) / (2 * sigma**2)).exp()
            total, weights = total + weight * near, weights + weight
        x = total / weights
    return x


def unsharp_mask(x: Tensor, amount: float) -> Tensor:
    """Images [B, C, H, W] with more contrast at their edges: x + amount (x - blurred x) (Gonzalez and Woods, Digital
    Image Processing, section 3.6)."""
    return x + amount * (x - blurred(x))


def blurred(x: Tensor) -> Tensor:
    """Means of the 3x3 around each pixel with weights 1, 2, 1 each way; x and result [B, C, H, W]."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    return (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 16
