"""The states that a sampler of few steps passes through, and the jumps it takes from them."""

import torch
from torch import Tensor

from src.objectives.contract import eval_mode
from src.utils import NFES


def in_turn(choices: list, batch_size: int) -> Tensor:
    """One of the choices for each row, [batch_size, ...] on the CPU: in turn, from a random offset.

    So their numbers hardly change from step to step, or from slice to slice.
    """
    return torch.tensor(choices)[(torch.arange(batch_size) + torch.randint(len(choices), ())) % len(choices)]


def sampler_times(scheduler, nfe: Tensor) -> Tensor:
    """The sampler's times for each row's NFE, [B, 5], zeros after the last jump."""
    grids = {k: torch.tensor([*scheduler.time_grid(k), *[0.0] * (max(NFES) - k)]) for k in NFES}
    return torch.stack([grids[k] for k in nfe.tolist()])


def jump_times(times: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Begin t and end s, [B] each, of the jump at `position` (from 0) among each row's times [B, 5]."""
    t, s = (times.gather(1, (position + step)[:, None]).squeeze(1) for step in (0, 1))
    return t, s


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
    t, s = (time.to(noise.device, non_blocking=True) for time in jump_times(times, position))
    return x, t, s


def sample_through(model, noise: Tensor, nfe: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample from `noise` in `nfe` jumps, row by row, with the gradient through all of them (arXiv:2309.17400, eq. 2).

    A compiled network gets an eighth of the rows at once, so that its calls have one size where each eighth has the
    same NFEs; any other gets all rows that go on, for a GPU would wait for the many calls' Python.

    Args:
        noise: [B, ...].
        nfe, position: [B], on the CPU, where the rows that go on are known without waiting for the GPU.
    Returns: x_0, and of the jump at `position` (from 0) the state x_t, without gradient, and the velocity u, whose
        gradient passes through the jumps before it as well, [B, ...] each.
    """
    times = sampler_times(model.scheduler, nfe).to(noise.device, non_blocking=True)
    x, x_t, u = noise.clone(), torch.zeros_like(noise), torch.zeros_like(noise)
    x.requires_grad_(torch.is_grad_enabled())  # as it does after a jump: or the first would be another program
    at_once = len(nfe) if model.network._compiled_call_impl is None else max(1, len(nfe) // 8)
    with eval_mode(model):
        for i in range(int(nfe.max())):
            for going in (nfe > i).nonzero().squeeze(1).split(at_once):
                rows = going.to(noise.device, non_blocking=True)
                before, t, s = x[rows], times[rows, i], times[rows, i + 1]
                velocity = model.velocity(before, t, s)
                x = x.index_copy(0, rows, model.scheduler.reverse_process_step(before, velocity, t, s))
                here = (position[going] == i).nonzero().squeeze(1).to(noise.device, non_blocking=True)
                x_t = x_t.index_copy(0, rows[here], before[here].detach())
                u = u.index_copy(0, rows[here], velocity[here])
    return x, x_t, u
