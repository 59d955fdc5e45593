"""Building blocks of the challenge's U-Net (DDPM, arXiv:2006.11239, appendix B).

Numerically interchangeable with the challenge's own file: same parameters, same order of random draws at
construction, same arithmetic. Quirks are kept on purpose (see `ResBlock._initialize`): this network is the
contestants' common ground.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn import init


def _xavier(layer: nn.Module, gain: float = 1.0) -> None:
    init.xavier_uniform_(layer.weight, gain=gain)
    init.zeros_(layer.bias)


class Swish(nn.Module):
    """x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of a scalar, then Linear-SiLU-Linear to `hidden_size`."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(t: Tensor, dim: int, max_period: int = 10000) -> Tensor:
        """[cos, sin] of t times dim/2 geometric frequencies from 1 down to about 1/max_period.

        Args:
            t: [B], in roughly [0, 1000]; fractions are fine.
            dim: width of the result (an odd one is padded with a zero).
        Returns: [B, dim], float32.
        """
        half = dim // 2
        freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half)
        freqs = freqs.to(t.device, non_blocking=True)
        args = t[:, None].float() * freqs[None]
        embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)
        if dim % 2:
            embedding = torch.cat([embedding, torch.zeros_like(embedding[:, :1])], dim=-1)
        return embedding

    def forward(self, t: Tensor) -> Tensor:
        if t.ndim == 0:
            t = t[None]
        return self.mlp(self.timestep_embedding(t, self.frequency_embedding_size))


class DownSample(nn.Module):
    """Halve height and width with a strided 3x3 convolution. The embedding `temb` is ignored."""

    def __init__(self, in_ch: int):
        super().__init__()
        self.main = nn.Conv2d(in_ch, in_ch, 3, stride=2, padding=1)
        _xavier(self.main)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        return self.main(x)


class UpSample(nn.Module):
    """Double height and width: nearest neighbour, then a 3x3 convolution. `temb` is ignored."""

    def __init__(self, in_ch: int):
        super().__init__()
        self.main = nn.Conv2d(in_ch, in_ch, 3, stride=1, padding=1)
        _xavier(self.main)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        return self.main(F.interpolate(x, scale_factor=2, mode="nearest"))


class AttnBlock(nn.Module):
    """Single-head self-attention over all H*W positions, with a residual connection."""

    def __init__(self, in_ch: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, in_ch)
        self.proj_q = nn.Conv2d(in_ch, in_ch, 1)
        self.proj_k = nn.Conv2d(in_ch, in_ch, 1)
        self.proj_v = nn.Conv2d(in_ch, in_ch, 1)
        self.proj = nn.Conv2d(in_ch, in_ch, 1)
        for layer in (self.proj_q, self.proj_k, self.proj_v, self.proj):
            _xavier(layer)
        # The output projection is drawn twice: the same seed must give the challenge's weights.
        init.xavier_uniform_(self.proj.weight, gain=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.group_norm(x)
        q = self.proj_q(h).permute(0, 2, 3, 1).reshape(B, H * W, C)
        k = self.proj_k(h).reshape(B, C, H * W)
        v = self.proj_v(h).permute(0, 2, 3, 1).reshape(B, H * W, C)

        weight = F.softmax(torch.bmm(q, k) * C**-0.5, dim=-1)
        h = torch.bmm(weight, v).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return x + self.proj(h)


class ResBlock(nn.Module):
    """GN-swish-conv, plus the projected embedding, GN-swish-dropout-conv, shortcut, then attention.

    `temb` is [B, tdim]; the output has `out_ch` channels and the input's height and width.
    """

    def __init__(self, in_ch: int, out_ch: int, tdim: int, dropout: float, attn: bool = False):
        super().__init__()
        self.block1 = nn.Sequential(nn.GroupNorm(32, in_ch), Swish(), nn.Conv2d(in_ch, out_ch, 3, padding=1))
        self.temb_proj = nn.Sequential(Swish(), nn.Linear(tdim, out_ch))
        self.block2 = nn.Sequential(
            nn.GroupNorm(32, out_ch), Swish(), nn.Dropout(dropout), nn.Conv2d(out_ch, out_ch, 3, padding=1)
        )
        self.shortcut = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.attn = AttnBlock(out_ch) if attn else nn.Identity()
        self._initialize()

    def _initialize(self) -> None:
        # This walks into the attention block as well, so its output projection, drawn nearly zero a moment
        # ago, ends at gain 1. The challenge's network is like that.
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                _xavier(layer)
        init.xavier_uniform_(self.block2[-1].weight, gain=1e-5)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.block1(x)
        h = h + self.temb_proj(temb)[:, :, None, None]
        h = self.block2(h)
        return self.attn(h + self.shortcut(x))
