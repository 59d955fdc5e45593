"""The exponential moving average of the weights: what is previewed, exported and scored."""

import copy

import torch
import torch.nn as nn


class EMA:
    """An averaged copy of `model`, always in eval mode.

    Args:
        decay: weight of the old average at each update. Early on it is min(decay, (1 + n) / (10 + n)) after n
            updates, so that the initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Move the average towards `model`, which has been updated `updates` times before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averages, weights = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
