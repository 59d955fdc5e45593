"""For GPUs where nothing is compiled: less memory traffic, which is most of what these networks cost them.

Autocast computes group norms in float32, and so writes what they give, and what the activations after them give, twice
as wide as the convolutions read it. Half the memory, a quarter faster; torch.compile gains more, for minutes of
compiling (benchmarks/LOG.md, "the third GPU").
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from src.module import AttnBlock, Swish

CITATIONS = ("dao2022flashattention",)  # keys of references.bib


def fuse(network: nn.Module) -> None:
    """In place: state-dict keys stay, and results but for rounding; copies of the network are fused as well."""
    for part in network.modules():
        if type(part) is nn.Sequential and isinstance(part[0], nn.GroupNorm) and isinstance(part[1], (Swish, nn.SiLU)):
            part.__class__ = NormFirst
        elif type(part) is AttnBlock:
            part.__class__ = FlashAttention


class NormFirst(nn.Sequential):
    """Group norm, SiLU, and what follows."""

    def forward(self, x: Tensor) -> Tensor:
        norm, _, *rest = self
        x = F.silu(normalised(x, norm))
        for layer in rest:
            x = layer(x)
        return x


class FlashAttention(AttnBlock):
    """Attention whose weights are never written to memory (arXiv:2205.14135)."""

    def forward(self, x: Tensor) -> Tensor:
        h = normalised(x, self.group_norm)
        q, k, v = (proj(h).flatten(2).transpose(1, 2)[:, None] for proj in (self.proj_q, self.proj_k, self.proj_v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h[:, 0].transpose(1, 2).reshape(x.shape))


def normalised(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm` of x [B, C, H, W] in x's precision, the statistics in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
