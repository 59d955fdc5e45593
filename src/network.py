"""The challenge's frozen U-Net: 58,753,283 parameters, or 59,934,979 with the extra condition."""

import torch
import torch.nn as nn
from torch import Tensor

from src.module import DownSample, ResBlock, Swish, TimeEmbedding, UpSample


class UNet(nn.Module):
    """DDPM U-Net over [B, 3, H, W], H and W divisible by 2 ** (len(ch_mult) - 1).

    Args:
        ch: base width, a multiple of 32.
        ch_mult: width of each level as a multiple of `ch`.
        attn: levels whose residual blocks carry attention.
        num_res_blocks: residual blocks a level on the way down (one more on the way up).
        dropout: rate inside the residual blocks.
        use_additional_condition: embed a second scalar and fuse it with the time embedding.
    """

    def __init__(
        self,
        ch=128,
        ch_mult=[1, 2, 2, 2],
        attn=[1],
        num_res_blocks=4,
        dropout=0.1,
        use_additional_condition=False,
    ):
        super().__init__()
        if any(level >= len(ch_mult) for level in attn):
            raise ValueError(f"attn {attn} names a level that ch_mult {ch_mult} does not have")
        tdim = ch * 4
        self.use_additional_condition = use_additional_condition
        self.time_embedding = TimeEmbedding(tdim)
        if use_additional_condition:
            self.condition_embedding = TimeEmbedding(tdim)
            self.condition_fusion = nn.Sequential(nn.Linear(tdim * 2, tdim), nn.SiLU(), nn.Linear(tdim, tdim))

        self.head = nn.Conv2d(3, ch, 3, padding=1)
        self.downblocks = nn.ModuleList()
        now = ch
        skips = [now]  # widths of the feature maps that the way up concatenates
        for level, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                self.downblocks.append(ResBlock(now, ch * mult, tdim, dropout, attn=level in attn))
                now = ch * mult
                skips.append(now)
            if level != len(ch_mult) - 1:
                self.downblocks.append(DownSample(now))
                skips.append(now)

        self.middleblocks = nn.ModuleList(
            [ResBlock(now, now, tdim, dropout, attn=True), ResBlock(now, now, tdim, dropout, attn=False)]
        )

        self.upblocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(ch_mult))):
            for _ in range(num_res_blocks + 1):
                self.upblocks.append(ResBlock(skips.pop() + now, ch * mult, tdim, dropout, attn=level in attn))
                now = ch * mult
            if level != 0:
                self.upblocks.append(UpSample(now))

        self.tail = nn.Sequential(nn.GroupNorm(32, now), Swish(), nn.Conv2d(now, 3, 3, padding=1))
        for conv, gain in ((self.head, 1.0), (self.tail[-1], 1e-5)):
            nn.init.xavier_uniform_(conv.weight, gain=gain)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [B, 3, H, W], timestep [B] and (with the extra condition) condition [B] to [B, 3, H, W].

        Both scalars are embedded as they come: scale them to roughly [0, 1000] first. `condition` is
        ignored by a network built without it, and required (ValueError) by one built with it.
        """
        temb = self.time_embedding(timestep)
        if self.use_additional_condition:
            if condition is None:
                raise ValueError("this U-Net was built with use_additional_condition=True: pass condition")
            temb = self.condition_fusion(torch.cat([temb, self.condition_embedding(condition)], dim=-1))

        h = self.head(x)
        skips = [h]
        for layer in self.downblocks:
            h = layer(h, temb)
            skips.append(h)
        for layer in self.middleblocks:
            h = layer(h, temb)
        for layer in self.upblocks:
            if isinstance(layer, ResBlock):
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, temb)
        return self.tail(h)
