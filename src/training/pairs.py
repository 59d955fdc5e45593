"""(noise, image) pairs of a teacher's ODE: generated once, kept as a memory-mapped array, checked by regenerating."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from src.errors import UserError, on_stop
from src.files import CACHE, replacing, write_json
from src.objectives.contract import Objective, eval_mode, heun_step
from src.training.distributed import ALONE, World
from src.utils import weights_hash

PAIRS = "pairs.npy"
CHUNK = 64  # pairs that are generated and written together
VERIFIED = 16  # pairs that are generated once more, to see whether they are the teacher's
FIRST_NOISE = 2**31  # to 2**32, all that a generator tells apart: far from the seeds of samples that are scored


class TimeUp(Exception):
    """`--max_minutes` ended a session while pairs were made: what is missing of them, the next one makes."""


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
    teacher, shape: tuple[int, ...], objective: Objective, seed: int, world: World = ALONE, ends: float = math.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Noise and images, float16 [pairs, *shape] each, memory-mapped: what is missing of them is generated first.

    A folder in data/cache, named by all that the pairs depend on (its manifest.json). Processes share the work and
    write a file for each chunk, of which rank 0 makes one; what was interrupted goes on where it was.

    Args:
        objective: says `pairs`, `solver` and `solver_steps`.
        ends: when to stop, by `time.monotonic`; a chunk is made in any case.
    Raises: TimeUp; UserError if they are stopped, or the pairs there are not what the teacher makes of their noise.
    """
    count = objective.pairs
    manifest = {
        "teacher": weights_hash(teacher.state_dict()),
        "solver": objective.solver,
        "steps": objective.solver_steps,
        "first_noise": FIRST_NOISE + seed * 1_000_003 % max(1, FIRST_NOISE - count),
        "pairs": count,
        "shape": list(shape),
    }
    folder = CACHE / f"pairs-{hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:16]}"
    missing = world.from_rank_0(lambda: _missing(folder, manifest))
    if world.any(not (folder / "manifest.json").exists()):
        raise UserError(f"{folder} is not on all machines: several machines need one data/cache on a shared disk")

    def generated(indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        own = [torch.Generator().manual_seed(manifest["first_noise"] + i) for i in indices]
        eps = torch.stack([torch.randn(shape, generator=one) for one in own]).half().float().to(teacher.device)
        return eps, solve(teacher, eps, objective.solver, objective.solver_steps)

    own = missing[world.rank :: world.size]

    def stop(number, frame):  # there is nothing to save
        raise UserError(
            "stopped while generating pairs: the same command, with its --save_dir, goes on where they were"
        )

    cut = False
    with on_stop(stop):
        for chunk in tqdm(own, desc=f"pairs -> {folder}", unit=f"x{CHUNK}", disable=world.rank > 0 or not own):
            if cut := chunk != own[0] and time.monotonic() > ends:
                break
            made = generated(range(chunk * CHUNK, min((chunk + 1) * CHUNK, count)))
            with replacing(folder / f"{chunk}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, torch.stack(made).half().cpu().numpy())
        if world.any(cut):  # having waited for each other
            raise TimeUp
        world.from_rank_0(lambda: _join(folder, (2, count, *shape)))
    noise, images = np.load(folder / PAIRS, mmap_mode="r")
    some = np.random.default_rng(seed).choice(count, min(VERIFIED, count), replace=False)
    with torch.compiler.set_stance("force_eager"):  # their number is another than a batch's
        again = [x.cpu().numpy() for x in generated(some.tolist())]
    for row, eps, image in zip(some, *again, strict=True):
        # Batch sizes and chips round images differently; another teacher's differ by far more.
        if not (np.array_equal(noise[row], eps) and np.abs(images[row] - image).mean() < 0.03):
            raise UserError(f"pair {row} of {folder} is not what the teacher makes of its noise: delete that folder")
    return noise, images


def _missing(folder: Path, manifest: dict) -> list[int]:
    """The chunks that are to be generated; UserError if there is no room for them."""
    if (folder / PAIRS).exists():
        return []
    # Listed, because shared disks remember for a while what was not there.
    there = {int(path.stem) for path in folder.glob("*.npy") if path.stem.isdigit()}
    needed = 4 * math.prod(manifest["shape"]) * (2 * manifest["pairs"] - CHUNK * len(there))  # as chunks, and joined
    if shutil.disk_usage(folder.parent if folder.parent.exists() else ".").free < needed:
        raise UserError(
            f"{folder} needs {needed / 1e9:.1f} GB for the pairs: make room, or ask for fewer (reflow/pairs=N)"
        )
    write_json(folder / "manifest.json", manifest)
    return [i for i in range(_chunks(manifest["pairs"])) if i not in there]


def _chunks(pairs: int) -> int:
    return -(-pairs // CHUNK)


def _join(folder: Path, shape: tuple[int, ...]) -> None:
    """All chunks as one array, which is there whole or not at all; then they are deleted.

    Raises: UserError if a chunk is damaged, after deleting it.
    """
    parts = [folder / f"{i}.npy" for i in range(_chunks(shape[1]))]
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    try:
        if not (folder / PAIRS).exists():
            with replacing(folder / PAIRS) as temporary, temporary.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for which in range(2):
                    for part in parts:
                        file.write(_chunk(part)[which].tobytes())
    except FileNotFoundError:  # another run with the same teacher, which has joined them
        if not (folder / PAIRS).exists():
            raise
    for path in (*parts, *folder.glob(f".{PAIRS}.*.tmp")):  # and what killed processes left
        path.unlink(missing_ok=True)


def _chunk(part: Path) -> np.ndarray:
    try:
        return np.load(part, mmap_mode="r")
    except ValueError as error:  # shorter than it says, after a power cut
        part.unlink()
        raise UserError(f"{part} was damaged and is deleted: the same command goes on") from error
