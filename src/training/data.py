"""The training images as one memory-mapped array, and the batches of a step."""

import hashlib

import numpy as np
import torch
from torch import Tensor
from torchvision import transforms
from tqdm import tqdm

from src.files import cached_array
from src.images import ensure_root, read_rgb, resized, split_paths


def load_images(root: str, split_dir: str, size: int) -> tuple[np.ndarray, str]:
    """The training split, decoded and resized once, and the hash that names its content.

    Downloads the images if `root` is missing. The array is cached under the hash of the image files in split order
    and of the size, so a changed image or split makes another array.

    Returns: uint8 [N, 3, size, size], memory-mapped, and the hash.
    Raises: UserError if the split or an image is missing or unreadable.
    """
    ensure_root(root)
    paths = split_paths(root, "train", split_dir)
    digest = hashlib.sha256(f"{size}x{size} RGB{' of 64x64, or as it is' if size < 64 else ''}".encode())
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    key = digest.hexdigest()[:16]
    resize = transforms.Compose([resized(size), transforms.PILToTensor()])

    def decode() -> np.ndarray:
        return np.stack([resize(read_rgb(path)).numpy() for path in tqdm(paths, desc="decoding", unit="image")])

    return cached_array(f"images-{key}", decode), key


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which of `count` images step `step` (from 0) takes: epochs of random order, laid end to end.

    A function of its arguments alone, so a resumed run goes on with the same images.
    """
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = {e: np.random.default_rng([seed, e]).permutation(count) for e in np.unique(position // count).tolist()}
    return np.array([epochs[p // count][p % count] for p in position.tolist()])


def to_batch(images: Tensor, indices: np.ndarray) -> Tensor:
    """Gather images, flip each left to right with probability 1/2: float32 [B, 3, H, W] in [-1, 1].

    `images` is uint8 [N, 3, H, W], on the device of the result. The flips come from the CPU's global generator.
    """
    rows = torch.from_numpy(indices).to(images.device, non_blocking=True)
    flip = (torch.rand(len(rows)) < 0.5).to(images.device, non_blocking=True)[:, None, None, None]
    data = images[rows].float() / 127.5 - 1
    return torch.where(flip, data.flip(-1), data)
