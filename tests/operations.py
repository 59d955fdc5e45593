"""What PyTorch is asked to do: for tests of what a step costs where each operation is waited for."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Inside of it, the name of each operation and the id of its first argument, backward passes' as well."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, int | None]] = []

    def __torch_dispatch__(self, function: torch._ops.OpOverload, types, args=(), kwargs=None):
        self.calls.append((function.overloadpacket.__name__, id(args[0]) if args else None))
        return function(*args, **(kwargs or {}))
