"""Critics: images [B, C, H, W], sampled with `nfe` [B] network calls each -> one number an image, [B], and the features
that it is a weighted sum of, [B, D], both in float32.

One net with a last layer for each NFE (arXiv:1912.01865 has one for each domain): its features are learned from all
samples, and none of them is judged by how those of another NFE fail.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from src.module import DownSample
from src.objectives.encoder import encoded
from src.utils import NFES


class ConvCritic(nn.Module):
    """A residual convolutional net without normalisation, after the critic of arXiv:2501.05441.

    Args:
        shape: (C, H, W) of an image.
        width: channels at the first resolution, doubled at each halving up to four times that.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 64):
        super().__init__()
        channels, *size = shape
        self.head = nn.Conv2d(channels, width, 3, padding=1)
        halvings = max(0, int(math.log2(max(size))) - 2)  # down to 4 x 4
        widths = [width * min(2**i, 4) for i in range(halvings + 2)]
        self.blocks = nn.ModuleList([_Block(a, b) for a, b in zip(widths, widths[1:], strict=False)])
        self.halvings = halvings
        self.tail = nn.Linear(widths[-1] * math.prod(side >> halvings for side in size), len(NFES), bias=False)

    def forward(self, x: Tensor, nfe: Tensor) -> tuple[Tensor, Tensor]:
        h = self.head(x)
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i < self.halvings:
                h = F.avg_pool2d(h, 2)
        features = F.leaky_relu(h, 0.2).flatten(1).float()
        return _judged(features, nfe, self.tail.weight), features


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)
        for conv in (self.first, self.second):
            nn.init.kaiming_normal_(conv.weight, a=0.2)
        nn.init.normal_(self.second.weight, std=self.second.weight.std().item() / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.leaky_relu(self.first(F.leaky_relu(x, 0.2)), 0.2))
        return self.skip(x) + h


class EncoderCritic(nn.Module):
    """The way down and the middle of one's own trained U-Net, a small head on each resolution's last features.

    Asked at t = 0, whose features are made for images without noise (after arXiv:2403.12015; noised images, as there,
    hide what gives few jumps away, and were worse: benchmarks/LOG.md, "The critic runs ahead").

    Args:
        model: the flow map that the U-Net is copied from.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(model.network).requires_grad_(True)
        del self.network.upblocks, self.network.tail
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        ends = [layer.main.in_channels for layer in self.network.downblocks if isinstance(layer, DownSample)]
        ends.append(self.network.middleblocks[-1].block2[-1].out_channels)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(32, width),
                nn.SiLU(),
                nn.Conv2d(width, 64, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(64, len(NFES), 1, bias=False),  # only differences of judgements matter
            )
            for width in ends
        )

    def forward(self, x: Tensor, nfe: Tensor) -> tuple[Tensor, Tensor]:
        maps = encoded(self.network, x, 0.0)
        features = torch.cat([_pooled(head, h) for head, h in zip(self.heads, maps, strict=True)], dim=1)
        return _judged(features, nfe, torch.cat([head[-1].weight.flatten(1) for head in self.heads], dim=1)), features


def _pooled(head: nn.Sequential, h: Tensor) -> Tensor:
    """Means over the image of what enters a head's last layer, [B, channels]."""
    for layer in list(head)[:-1]:
        h = layer(h)
    return h.float().mean(dim=(2, 3))


def _judged(features: Tensor, nfe: Tensor, weight: Tensor) -> Tensor:
    """Features [B, D] weighted by the row of `weight` [3, D] that belongs to each one's NFE, [B]."""
    # No matrix product: autocast would round it. No index: its gradient's sum runs in the order threads come.
    return (features * F.embedding(_place(nfe), weight)).sum(1)


def _place(nfe: Tensor) -> Tensor:
    """Where each of `nfe` [B] stands in NFES."""
    return sum((nfe > k).long() for k in NFES[:-1])


def augment(x: Tensor, draw: Tensor) -> Tensor:
    """Differentiable augmentation of what a critic sees, real and fake alike (arXiv:2006.10738).

    Flip, shift by up to an eighth (zeros beyond), contrast, saturation and brightness; all smooth functions of x.

    Args:
        x: [B, 3, H, W], about [-1, 1]; what comes back may go beyond.
        draw: [B, 6] uniform in [0, 1).
    """
    flip, right, down, contrast, saturation, brightness = (draw[:, i, None, None, None] for i in range(6))
    x = torch.where(flip < 0.5, x.flip(-1), x)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - mean) * (0.5 + contrast) + mean
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    x = x + (brightness - 0.5)
    return _shift(_shift(x, right, -1), down, -2)


def _shift(x: Tensor, amount: Tensor, dim: int) -> Tensor:
    """Move each image along an axis by a whole number of pixels, at most an eighth of the axis."""
    size = x.shape[dim]
    most = size // 8
    if most == 0:
        return x
    offset = (amount.flatten() * (2 * most + 1)).floor().long() - most
    index = torch.arange(size, device=x.device) - offset[:, None]  # [B, size]
    shape = [len(x), 1, 1, 1]
    shape[dim] = size
    inside = ((index >= 0) & (index < size)).reshape(shape)
    moved = x.gather(dim, index.clamp(0, size - 1).reshape(shape).expand_as(x))
    return torch.where(inside, moved, 0.0)


def warp(x: Tensor, displacement: Tensor) -> Tensor:
    """Each pixel of x [B, C, H, W] from where `displacement` [B, 2, H, W] points, in shares of the side (right, down).

    Bicubic, for less blur; beyond the border lies what is on it.
    """
    axes = [(2 * torch.arange(size, device=x.device) + 1) / size - 1 for size in x.shape[-2:]]
    down, right = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([right, down], dim=-1) + 2 * displacement.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
