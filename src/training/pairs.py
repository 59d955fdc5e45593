"""(noise, image) pairs of a teacher's ODE: generated once, kept as memory-mapped arrays, checked by regenerating."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from src.objectives.contract import Objective, eval_mode, heun_step
from src.training.distributed import World
from src.utils import CACHE, UserError, on_stop, weights_hash, write_json

CHUNK = 64  # pairs that are generated, written and marked as done together
VERIFIED = 16  # pairs that are generated once more, to see whether they are the teacher's
FIRST_NOISE = 2**31  # to 2**32, all that a generator tells apart: far from the seeds of samples that are scored


@torch.no_grad()
def solve(teacher, noise: Tensor, solver: str, steps: int) -> Tensor:
    """Images [B, ...] at t = 0 of the teacher's ODE dx/dt = u(x, t, 0) from `noise` at t = 1, in equal steps.

    Heun's method calls the network twice a step, Euler's once.
    """
    x = noise
    times = torch.linspace(1, 0, steps + 1, device=noise.device)
    with eval_mode(teacher):
        for t, t_next in zip(times, times[1:], strict=False):
            if solver == "heun":
                x = heun_step(teacher, x, t, t_next)
            else:
                x = teacher.scheduler.reverse_process_step(x, teacher.predict(x, t), t, t_next)
    return x


def load_pairs(
    teacher,
    shape: tuple[int, ...],
    objective: Objective,
    seed: int,
    world: World = World(),  # noqa: B008
) -> tuple[np.ndarray, np.ndarray]:
    """Noise and images, float16 [pairs, *shape] each, memory-mapped: what is missing of them is generated first.

    A folder in data/cache, named by all that the pairs depend on (its manifest.json); processes share the work, and
    an interrupted one goes on where it was.

    Args:
        objective: says `pairs`, `solver` and `solver_steps`.
    Raises: UserError if the pairs there are not what the teacher makes of their noise.
    """
    manifest = {
        "teacher": weights_hash(teacher),
        "solver": objective.solver,
        "steps": objective.solver_steps,
        "first_noise": FIRST_NOISE + seed * 1_000_003 % FIRST_NOISE,
        "pairs": objective.pairs,
        "shape": list(shape),
    }
    folder = CACHE / f"pairs-{hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:16]}"
    missing = world.from_rank_0(lambda: _allocate(folder, manifest))
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder} is not on this machine: several machines need one data/cache on a shared disk")
    noise, images, done = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("noise", "images", "done"))

    def generated(indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        own = [torch.Generator().manual_seed(manifest["first_noise"] + i) for i in indices]
        eps = torch.stack([torch.randn(shape, generator=one) for one in own]).half().float().to(teacher.device)
        return eps, solve(teacher, eps, objective.solver, objective.solver_steps)

    own = missing[world.rank :: world.size]

    def stop(number, frame):  # there is nothing to save
        raise UserError("stopped while generating pairs: the same command goes on where they were")

    with on_stop(stop):
        for chunk in tqdm(own, desc=f"pairs -> {folder}", unit=f"x{CHUNK}", disable=world.rank > 0 or not own):
            rows = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, objective.pairs))
            noise[rows], images[rows] = (x.half().cpu().numpy() for x in generated(range(rows.start, rows.stop)))
            noise.flush(), images.flush()
            done[chunk] = True
            done.flush()
    world.any(False)  # wait for each other
    if not done.all():
        raise UserError(f"{folder} is incomplete ({int(done.sum())} of {len(done)} parts): the same command goes on")
    some = np.random.default_rng(seed).choice(objective.pairs, min(VERIFIED, objective.pairs), replace=False)
    with torch.compiler.set_stance("force_eager"):  # their number is another than a batch's
        again = [x.cpu().numpy() for x in generated(some.tolist())]
    for row, eps, image in zip(some, *again, strict=True):
        # Batch sizes and chips round images differently; another teacher's differ by far more.
        if not (np.array_equal(noise[row], eps) and np.abs(images[row] - image).mean() < 0.03):
            raise UserError(f"pair {row} of {folder} is not what the teacher makes of its noise: delete that folder")
    return noise, images


def _allocate(folder: Path, manifest: dict) -> list[int]:
    """The chunks that are missing, after making room for them."""
    if (folder / "manifest.json").exists():
        return np.flatnonzero(~np.load(folder / "done.npy")).tolist()
    folder.mkdir(parents=True, exist_ok=True)
    shape = (manifest["pairs"], *manifest["shape"])
    needed = 2 * 2 * math.prod(shape)
    if shutil.disk_usage(folder).free < needed:  # a memory map on a full disk would kill the process
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB for the pairs: make room, or ask for fewer (reflow/pairs=N)"
        )
    for name, kind, size in (
        ("noise", np.float16, shape),
        ("images", np.float16, shape),
        ("done", np.bool_, (-(-manifest["pairs"] // CHUNK),)),
    ):
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, size).flush()
    write_json(folder / "manifest.json", manifest)
    return list(range(-(-manifest["pairs"] // CHUNK)))
