"""Files and folders written whole or not at all, and the cache of arrays."""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

CACHE = Path("data/cache")  # arrays named by their content; may be deleted at any time


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not with the process's number: machines that share a disk may share it.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file whole or not at all: yields a temporary name beside `path`, renamed on success."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Write a folder whole or not at all: yields an empty one beside `folder`, which takes its place on success."""
    folder = Path(folder)
    temporary = _temporary(folder)
    before = temporary.with_suffix(".old")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
            folder.rename(before)
        temporary.rename(folder)
    finally:
        if before.exists() and not folder.exists():
            before.rename(folder)
        for leftover in (temporary, before):
            shutil.rmtree(leftover, ignore_errors=True)


def cached_array(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of this name in data/cache, made and kept there if it is not; memory-mapped, writes stay private."""
    path = CACHE / f"{name}.npy"
    try:
        return np.load(path, mmap_mode="c")
    except FileNotFoundError:
        pass
    except (EOFError, ValueError):
        print(f"warning: {path} is damaged, and made again", file=sys.stderr)
    array = make()
    # Plain file writes raise on a full disk, where writing to a new memory map would kill the process.
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)
    return np.load(path, mmap_mode="c")


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
