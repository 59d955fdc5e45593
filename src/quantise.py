"""Weights in 8 bits: how a model small enough to release is written, and read again."""

import torch
from torch import Tensor

from src.errors import UserError

SCALE = "::scale"  # what the name of an 8-bit weight's scales ends with


def quantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as int8 with one scale an output channel, everything one-dimensional as float16: a quarter of the size.

    w = q * s, s [C, 1, ...] = max|w| / 127 over each channel of the first dimension. What rounding takes from a weight
    the channel's next one gets (error diffusion: Floyd and Steinberg, Proc. SID 17, 1976): sums are rounded,
    not weights, and those that were in 8 bits before keep even changes of less than half a step, on average.
    """
    small = {}
    for name, value in state.items():
        if value.ndim < 2:
            small[name] = value.half() if value.is_floating_point() else value
            continue
        scale = value.float().abs().amax(dim=tuple(range(1, value.ndim)), keepdim=True).clamp(min=1e-12) / 127
        sums = (value.double() / scale).flatten(1).cumsum(1).round()  # in double: thousands of terms
        small[name] = sums.diff(prepend=torch.zeros_like(sums[:, :1])).reshape(value.shape)
        small[name] = small[name].clamp(-127, 127).to(torch.int8)  # what is carried may lift the largest to 128
        small[name + SCALE] = scale
    return small


def restore_quantised(state: dict[str, Tensor], *_) -> None:
    """Turn the int8 weights in `state` to float32 again, in place: a module's hook before it loads a state dict.

    Raises: UserError if scales are without weights or weights without scales.
    """
    for name in [name for name in state if name.endswith(SCALE)]:
        weight = name.removesuffix(SCALE)
        if weight not in state:
            raise UserError(f"{weight} is missing, its scales alone are there: export the model again")
        state[weight] = state[weight].float() * state.pop(name)
    if bare := [name for name, value in state.items() if value.dtype == torch.int8]:
        raise UserError(f"{bare[0]} has 8 bits and no scales: export the model again")
