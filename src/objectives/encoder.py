"""A trained U-Net's way down as an encoder of images."""

import torch
from torch import Tensor

from src.module import DownSample


def encoded(network, x: Tensor, time: float) -> list[Tensor]:
    """The last feature map at each resolution of a `UNet`'s way down, the lowest after its middle, [B, C, H, W] each.

    Args:
        x: images [B, 3, H, W] in [-1, 1].
        time: what the network is told, in its own units; the extra condition is 0.
    """
    time = x.new_full((len(x),), time)
    temb = network.time_embedding(time)
    if network.use_additional_condition:
        temb = network.condition_fusion(torch.cat([temb, network.condition_embedding(torch.zeros_like(time))], dim=-1))
    h, levels = network.head(x), []
    for layer in network.downblocks:
        if isinstance(layer, DownSample):
            levels.append(h)
        h = layer(h, temb)
    for layer in network.middleblocks:
        h = layer(h, temb)
    return [*levels, h]
