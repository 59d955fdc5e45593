"""Most of a GPU's memory traffic, fused: group norm with its activation, and attention.

Compiling the whole network takes a minute or more for each of its uses in a stage. This takes a second each, and serves
batches of any size.
"""

from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from src.module import AttnBlock, Swish


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
        x = _compiled()(x, norm.num_groups, norm.weight, norm.bias, norm.eps, True)
        for layer in rest:
            x = layer(x)
        return x


class FlashAttention(AttnBlock):
    """Attention whose weights are never written to memory (arXiv:2205.14135)."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.group_norm
        h = _compiled()(x, norm.num_groups, norm.weight, norm.bias, norm.eps, False)
        q, k, v = (proj(h).flatten(2).transpose(1, 2)[:, None] for proj in (self.proj_q, self.proj_k, self.proj_v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h[:, 0].transpose(1, 2).reshape(x.shape))


def normalised(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activated: bool) -> Tensor:
    """Group norm of x [B, C, H, W], and SiLU of that, in x's precision: the convolution after it computes in that."""
    y = F.group_norm(x.float(), groups, weight, bias, eps)
    return (F.silu(y) if activated else y).to(x.dtype)


@cache
def _compiled():
    """`normalised`, where a network first needs it: importing the compiler takes seconds."""
    return torch.compile(normalised, dynamic=True)
