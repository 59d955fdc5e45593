"""The optimizer Muon, for the weight matrices of hidden layers; AdamW for all else."""

import torch
import torch.nn as nn
from torch import Tensor

from src.errors import UserError

CITATIONS = ("jordan2024muon", "liu2025muon")  # keys of references.bib
MOMENTUM = 0.95  # Jordan's


class Muon(torch.optim.AdamW):
    """Momentum whose matrix is made orthogonal, so that a step goes as far in each of its directions (Jordan 2024).

    W -= lr (0.2 sqrt(max(rows, columns)) O + weight_decay W), O `orthogonal` of the gradient with Nesterov's momentum:
    as long a step as AdamW's usually is, so that its rate serves for both (arXiv:2502.16982, section 2.2).
    A convolution's matrix has a row for each output channel. Hidden layers are those in a network's lists of blocks.

    Args:
        settings: AdamW's, of the other parameters; `weight_decay` is that of all.
    Raises: UserError if the network has no blocks.
    """

    def __init__(self, module: nn.Module, **settings):
        hidden = {name for name, p in module.named_parameters() if p.ndim > 1 and "blocks." in name}
        if not hidden:
            raise UserError("this network has no blocks for Muon to train: leave out muon=true")
        groups = [
            {"params": [p for name, p in module.named_parameters() if (name in hidden) == matrices], "muon": matrices}
            for matrices in (True, False)
        ]
        super().__init__(groups, **settings)

    @torch.no_grad()
    def step(self) -> None:
        """As AdamW's; the gradients of the matrices are used up."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}  # made orthogonal together: a GPU would wait for Python
            for p in group["params"] if group["muon"] else ():
                alike.setdefault(p.shape, []).append(p)
            for shape, same in alike.items():
                for p in same:
                    if p not in self.state:  # AdamW looks for a step when it loads a state
                        self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
                momenta = [self.state[p]["momentum"] for p in same]
                gradients = [p.grad for p in same]
                torch._foreach_mul_(momenta, MOMENTUM)
                torch._foreach_add_(momenta, gradients)
                torch._foreach_add_(gradients, momenta, alpha=MOMENTUM)
                steps = orthogonal(torch.stack([g.flatten(1) for g in gradients])).unflatten(2, shape[1:])
                reach = 0.2 * max(shape[0], shape[1:].numel()) ** 0.5
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, list(steps), alpha=-group["lr"] * reach)
                for p in same:
                    p.grad = None  # AdamW passes over what has none
        super().step()


def orthogonal(x: Tensor) -> Tensor:
    """About the nearest matrices with orthogonal rows, or columns if there are fewer, of x [N, rows, columns].

    Five steps of Newton and Schulz with Jordan's coefficients, which bring singular values to between 0.68 and 1.2, but
    for those below about a thousandth of the norm.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        y = x @ x.mT
        x = 3.4445 * x + (-4.775 * y + 2.0315 * y @ y) @ x
    return x.mT if tall else x
