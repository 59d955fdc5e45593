"""Inception features of image folders, through clean-fid's own loading and resizing."""

import hashlib
import multiprocessing
import os
import platform
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from cleanfid import fid
from cleanfid.downloads_helper import inception_url
from torch import Tensor

from src.errors import UserError
from src.evaluation.reference import image_files
from src.files import cached_array, replacing

# Where clean-fid keeps, and looks for, its network.
OFFICIAL = Path("." if platform.system() == "Windows" else "/tmp", "inception-2015-12-05.pt")
# What the Fréchet distance of a network's features is called, by the SHA-256 of its file. FID: the official one's.
DISTANCES = {
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "FID",
    "9d6c9dddc364b2cff25ccb30eb775927eae752c68d5d9af1f6b701f86d9d0476": "FD-mid",
    "9ec0c12a5db9528612870ca142f250cca8fcccb7a3214ad572437d7408dbf0c9": "FD-mid",
}


class Features(NamedTuple):
    """A network from images [B, 3, 299, 299] in [0, 255] to features [B, D]."""

    network: Callable[[Tensor], Tensor]
    distance: str  # what the Fréchet distance of these features is called
    key: str  # the hash of the network's file


def official_inception() -> Path:
    """The file of clean-fid's Inception network, downloaded whole or not at all if it is not there."""
    if not OFFICIAL.is_file():
        try:
            with replacing(OFFICIAL) as temporary, urllib.request.urlopen(inception_url, timeout=60) as response:
                with temporary.open("wb") as file:
                    shutil.copyfileobj(response, file)
                size, whole = temporary.stat().st_size, response.headers["Content-Length"]
                if whole is not None and size != int(whole):  # which reading to the end does not tell
                    raise OSError(f"{size:,} of {int(whole):,} bytes came")
        except OSError as error:
            raise UserError(
                f"the FID's Inception network could not be downloaded ({error}): put {inception_url} at {OFFICIAL}, "
                "or score with another network: python -m src.evaluation score --features FILE"
            ) from error
    return OFFICIAL


def load_features(path: str | os.PathLike, device: torch.device) -> Features:
    """A TorchScript file with `layers(x)`, x in [-1, 1]. Its distance is named by the file's hash, or after it.

    Raises: UserError if the file is missing or no such network.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no feature network at {file}")
    key = hashlib.sha256(file.read_bytes()).hexdigest()
    try:
        layers = torch.jit.load(file, map_location="cpu").float().eval().to(device).layers
    except (RuntimeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{file} is not a TorchScript feature network with `layers`: {reason}") from error

    def network(x: Tensor) -> Tensor:
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)  # on CPUs almost twice as fast
        with torch.jit.optimized_execution(False):  # on GPUs, profiling and fusing would take seconds for every shape
            return layers(x).flatten(1)

    return Features(network, DISTANCES.get(key, f"FD[{file.stem}]"), key)


def loading_workers(batch_size: int) -> int:
    """Processes that load images for clean-fid, at most four; none where they are not forked, as on macOS and Windows,
    for clean-fid's data set cannot be pickled, nor where the batches that they hold ready would not fit into shared
    memory, of which a Docker container has 64 MB."""
    workers, shared = min(4, os.cpu_count() or 1), Path("/dev/shm")
    if multiprocessing.get_start_method() != "fork":
        return 0
    ready = 2 * workers * batch_size * 4 * 3 * 299 * 299
    return 0 if shared.is_dir() and shutil.disk_usage(shared).free < ready else workers


def folder_features(
    folder: str | os.PathLike, features: Features, device: torch.device, batch_size: int = 64, cache: bool = False
) -> np.ndarray:
    """Features of a folder's images in the order of their names, [N, D].

    Args:
        cache: keep them in data/cache, named by the content of the images and of the network.
    """
    files = image_files(folder)
    digest = hashlib.sha256(features.key.encode())
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())

    def compute() -> np.ndarray:
        return fid.get_files_features(  # not of the folder, in whose name clean-fid would see patterns
            list(map(str, files)),
            features.network,
            num_workers=loading_workers(batch_size),
            batch_size=batch_size,
            device=device,
            mode="clean",
            description=f"features of {folder}",
        )

    return cached_array(f"features-{digest.hexdigest()[:16]}", compute) if cache else compute()
