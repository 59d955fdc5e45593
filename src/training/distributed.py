"""Several processes under `torchrun`, or one: the engine asks the same questions of both."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from src.errors import UserError, one_line_errors
from src.utils import pick_device


class World(NamedTuple):
    """This process among `size` of them. Only rank 0 writes and prints.

    Decisions travel between the hosts (gloo), so that agreeing at every step never waits for a GPU.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    hosts: dist.ProcessGroup | None = None

    def wrap(self, module: nn.Module) -> nn.Module:
        """Synchronise gradients through the module's forward pass; with one process, the module itself."""
        # Without device_ids: the inputs stay where the engine put them, the objectives' draws on the CPU.
        return DistributedDataParallel(module) if self.size > 1 else module

    def synchronised(self, module: nn.Module, last: bool) -> AbstractContextManager:
        """Around one slice of a batch: only the last slice's backward pass exchanges gradients."""
        return nullcontext() if last or self.size == 1 else module.no_sync()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process. All processes must ask together."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags, group=self.hosts)
        return flags.item() > 0

    def mean(self, values: Tensor) -> float | None:
        """Mean of 1-d tensors of any length over all processes; None if all are empty."""
        total = torch.tensor([values.sum().item(), len(values)], dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total, group=self.hosts)
        total, count = total.tolist()
        return total / count if count else None

    def from_rank_0(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, on every process; an error there is raised on all, a user's told by rank 0."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        if self.size > 1:  # tensors one by one: a pickled checkpoint would take several times its size on every process
            outline = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), box)
            dist.broadcast_object_list(outline, src=0, group=self.hosts)
            if self.rank > 0:
                box = tree_map_only(Tensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype), outline)
            for tensor in filter(torch.is_tensor, tree_leaves(box)):
                dist.broadcast(tensor.contiguous(), src=0, group=self.hosts)
        if box[1] is not None:
            if self.rank > 0 and isinstance(box[1], UserError):
                sys.exit(1)  # rank 0 says why
            raise box[1]
        return box[0]

    @contextmanager
    def one_a_machine_first(self) -> Iterator[None]:
        """Run the body on one process of each machine before the others, which then find its files.

        All end if it fails on one.
        """
        if self.local_rank > 0 and self.any(False):
            sys.exit(1)  # the machine's first process says why
        try:
            yield
        except (UserError, OSError):
            if self.local_rank == 0:
                self.any(True)
            raise
        if self.local_rank == 0 and self.any(False):
            sys.exit(1)


ALONE = World()


@contextmanager
def joined(device_name: str) -> Iterator[tuple[World, torch.device]]:
    """Join the other processes if `torchrun` started this one (gloo on CPUs, NCCL on GPUs).

    Yields this process's place among them and its device: under torchrun the GPU of its local rank. There the process
    ends with the body: nothing after it runs, and a user's error is told by the first process of each machine.
    """
    device = pick_device(device_name)
    if "RANK" not in os.environ:
        yield ALONE, device
        return
    try:
        rank, local_rank, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    except (KeyError, ValueError) as error:
        fault = "RANK is set, but RANK, LOCAL_RANK and WORLD_SIZE are not all numbers"
        raise UserError(f"{fault} ({error}): start with torchrun, or unset it") from None
    if device.type == "cuda":
        device = pick_device(f"cuda:{local_rank}")
    # The others wait while rank 0 downloads, decodes, scores or saves.
    patience = timedelta(hours=6)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    code = 1
    try:
        with one_line_errors():
            try:
                yield World(rank, local_rank, size, dist.new_group(backend="gloo", timeout=patience)), device
            except UserError:
                if local_rank > 0:
                    sys.exit(1)  # the machine's first process says why: a fault may be of one machine alone
                raise
        # Not after an error: it may wait for processes that wait for this one. torchrun ends them.
        dist.destroy_process_group()
        code = 0
    except SystemExit as told:
        if isinstance(told.code, int):
            code = told.code
        else:
            print(told.code, file=sys.stderr)
        if local_rank > 0:
            time.sleep(2)  # torchrun ends all when one has ended: let the one that says why be the first
    except Exception:
        traceback.print_exc()
    finally:
        # At once: an interpreter that is taken down beside gloo's threads, which may still let go of tensors, aborts or
        # hangs now and then (beside other work 5 of 260 ends; PyTorch's issue 190489).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
