"""For GPUs where nothing is compiled: less memory traffic and fewer kernels, each of which waits for Python.

Autocast computes group norms in float32, and so writes what they give, and what the activations after them give, twice
as wide as the convolutions read it. Half the memory, a quarter faster; torch.compile gains more, for minutes of
compiling (benchmarks/LOG.md, "the third GPU").
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from src.module import AttnBlock, ResBlock, Swish

CITATIONS = ("dao2022flashattention",)  # keys of references.bib


def fuse(network: nn.Module) -> None:
    """In place: state-dict keys stay, and results but for rounding; copies of the network are fused as well."""
    for part in network.modules():
        if type(part) is nn.Sequential and isinstance(part[0], nn.GroupNorm) and isinstance(part[1], (Swish, nn.SiLU)):
            part.__class__ = NormFirst
        elif type(part) in INSTEAD:
            part.__class__ = INSTEAD[type(part)]


class NormFirst(nn.Sequential):
    """Group norm, SiLU, and what follows."""

    def forward(self, x: Tensor) -> Tensor:
        norm, _, *rest = self
        x = F.silu(normalised(x, norm))
        for layer in rest:
            x = layer(x)
        return x


class FusedSwish(Swish):
    """One kernel instead of two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class FlashAttention(AttnBlock):
    """Attention whose weights are never written to memory (arXiv:2205.14135)."""

    def forward(self, x: Tensor) -> Tensor:
        h = normalised(x, self.group_norm)
        projections = self.proj_q, self.proj_k, self.proj_v
        q, k, v = (proj(h).flatten(2).transpose(1, 2).unsqueeze(1) for proj in projections)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class UnindexedResBlock(ResBlock):
    """The embedding gets its axes without an index, whose gradient would be copied into zeros."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.block1(x) + self.temb_proj(temb).unflatten(1, (-1, 1, 1))
        return self.attn(self.block2(h) + self.shortcut(x))


INSTEAD = {Swish: FusedSwish, AttnBlock: FlashAttention, ResBlock: UnindexedResBlock}


def normalised(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm` of x [B, C, H, W] in x's precision, the statistics in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
