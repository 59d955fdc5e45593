"""The states that a sampler of few steps passes through, and the jumps it takes from them."""

import torch
from torch import Tensor

from src.objectives.contract import eval_mode
from src.utils import NFES

# Each NFE as often as the others, and each of its jumps; rows that lie four apart differ in NFE.
DRAWN = [(nfe, i * nfe // 4) for nfe in NFES for i in range(4)]


def draw_jumps(batch_size: int) -> tuple[Tensor, Tensor]:
    """NFE and position (from 0) of a jump for each row, [batch_size] on the CPU: spread evenly from a random offset.

    So their numbers hardly change from step to step, or from slice to slice, and GPUs meet few sizes of roll-outs.
    """
    rows = (torch.arange(batch_size) + torch.randint(len(DRAWN), ())) % len(DRAWN)
    nfe, position = torch.tensor(DRAWN)[rows].unbind(1)
    return nfe, position


def sampler_times(scheduler, nfe: Tensor) -> Tensor:
    """The sampler's times for each row's NFE, [B, 5], zeros after the last jump."""
    grids = {k: torch.tensor([*scheduler.time_grid(k), *[0.0] * (max(NFES) - k)]) for k in NFES}
    return torch.stack([grids[k] for k in nfe.tolist()])


@torch.no_grad()
def roll_out(model, noise: Tensor, nfe: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample from `noise` up to the jump at `position` (from 0) of `nfe` jumps, row by row.

    Args:
        noise: [B, ...].
        nfe, position: [B], on the CPU, where the rows that go on are known without waiting for the GPU.
    Returns: the state x_t [B, ...], its time t and the jump's end s, [B] each.
    """
    times = sampler_times(model.scheduler, nfe)
    on_device = times.to(noise.device, non_blocking=True)
    x = noise.clone()
    # Uncompiled: each number of rows would be another program.
    with eval_mode(model), torch.compiler.set_stance("force_eager"):
        for i in range(int(position.max())):
            rows = (position > i).nonzero().squeeze(1).to(noise.device, non_blocking=True)
            x[rows] = model.jump(x[rows], on_device[rows, i], on_device[rows, i + 1])
    t, s = (times.gather(1, (position + step)[:, None]).squeeze(1) for step in (0, 1))
    return x, t.to(noise.device, non_blocking=True), s.to(noise.device, non_blocking=True)
