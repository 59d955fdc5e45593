"""Scores of a model in memory: what training watches."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from cleanfid.resize import build_resizer
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from src.errors import UserError
from src.evaluation.distances import frechet_distance
from src.evaluation.features import Features, load_features, official_inception
from src.files import cached_array
from src.images import ensure_root, read_rgb, split_paths, to_pixels
from src.utils import NFES, tensor_to_pil_image

# First noise seed of what a model, or its sampler, is chosen by: reports score those of 0, 1,000,000, ... and on.
CHOOSING_SEED = 500_000


def image_features(
    images: Sequence[Image.Image] | np.ndarray, features: Features, device: torch.device, batch_size: int = 64
) -> np.ndarray:
    """Features of RGB images, or of uint8 [N, H, W, 3], resized as clean-fid does, [N, D]."""
    resize = build_resizer("clean")
    found = []
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.no_grad():
        for start in range(0, len(images), batch_size):
            pixels = np.stack(list(pool.map(lambda image: resize(np.array(image)), images[start : start + batch_size])))
            found.append(features.network(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)).cpu().numpy())
    return np.concatenate(found)


def kept_features(pixels: np.ndarray, features: Features, device: torch.device) -> np.ndarray:
    """Features of uint8 [N, H, W, 3], [N, D], made once and kept in data/cache under the pixels' hash."""
    digest = hashlib.sha256(features.key.encode() + pixels.tobytes()).hexdigest()[:16]
    return cached_array(f"features-{digest}", lambda: image_features(pixels, features, device))


def draw_samples(model, nfe: int, first_seed: int, count: int) -> Tensor:
    """Samples [count, 3, H, W] on the CPU, about [-1, 1], each from the noise of its own seed: first_seed and on."""
    at_once = 64 if model.device.type == "cuda" else 8  # a CPU's caches hold no more
    samples = []
    with tqdm(total=count, desc=f"samples of NFE {nfe}", leave=False) as progress:
        for start in range(first_seed, first_seed + count, at_once):
            noise = [torch.Generator().manual_seed(i) for i in range(start, min(start + at_once, first_seed + count))]
            shape = (len(noise), 3, model.image_size, model.image_size)
            samples.append(model.sample(shape, nfe, generator=noise).cpu())
            progress.update(len(noise))
    return torch.cat(samples)


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` indices, evenly spaced."""
    return np.linspace(0, count - 1, min(most, count)).astype(int)


class Data:
    """A split's images as the model should make them: `pixels`, uint8 [N, H, W, 3], and `features`, [N, D].

    Downloads the images if their folder is missing.

    Args:
        most: take so many at most, evenly from the split; None: all.
    """

    def __init__(
        self,
        data_root: str,
        split_dir: str,
        split: str,
        size: int,
        features: Features,
        device: torch.device,
        most: int | None = None,
    ):
        pixels = to_pixels(size)
        ensure_root(data_root)
        paths = split_paths(data_root, split, split_dir)
        if len(paths) < 8:
            raise UserError(f"the {split} split has {len(paths)} images: scores need at least 8")
        if most is not None:
            paths = [paths[i] for i in evenly(len(paths), most)]
        images = [tensor_to_pil_image(pixels(read_rgb(path))) for path in tqdm(paths, desc=split, leave=False)]
        self.pixels = np.stack([np.asarray(image) for image in images])
        self.network, self.device = features, device
        self.features = kept_features(self.pixels, features, device)

    def either_way(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [2N, H, W, 3] and features [2N, D] of the images and of their mirror images, which training sees."""
        mirrored = np.ascontiguousarray(self.pixels[:, :, ::-1])
        features = kept_features(mirrored, self.network, self.device)
        return np.concatenate([self.pixels, mirrored]), np.concatenate([self.features, features])


def floor_of(train: np.ndarray, val: np.ndarray) -> float:
    """The Fréchet distance of training images' features to those of validation images; UserError if it is none."""
    floor = frechet_distance(train, val)
    if not floor > 1e-6:
        raise UserError("the validation images are the training images, by their features: name another split")
    return floor


class Scorer:
    """Fréchet distances of a model's samples at NFE 1, 2 and 4 to the validation images, and to the floor.

    `key` names all that its numbers depend on beside the model.

    Args:
        count: samples for each NFE, always from the same noise, and training images for the floor.
        features_path: a TorchScript network; None: the official one, for the FID.
    """

    def __init__(
        self,
        data_root: str,
        split_dir: str,
        size: int,
        count: int,
        features_path: str | None,
        device: torch.device,
        seed: int,
    ):
        self.features = load_features(features_path or official_inception(), device)
        self.device, self.count, self.seed = device, count, seed
        source = data_root, split_dir
        val = Data(*source, "val", size, self.features, device)
        some = Data(*source, "train", size, self.features, device, most=count)
        self.reference = val.features
        self.floor = floor_of(some.features, self.reference)
        # Images by their pixels, which no chip computes: a run may go on elsewhere.
        images = hashlib.sha256(val.pixels.tobytes() + some.pixels.tobytes()).hexdigest()[:16]
        self.key = f"{self.features.key[:16]} {size} px, {count} samples, seed {seed}, images {images}"

    def __call__(self, model) -> dict[str, float]:
        """The distance at each NFE, and "ratio": their mean as a multiple of the floor."""
        distances = {}
        for nfe in NFES:
            images = tensor_to_pil_image(draw_samples(model, nfe, self.seed, self.count))
            found = image_features(images, self.features, self.device)
            distances[nfe] = frechet_distance(found, self.reference)
        named = {f"{self.features.distance} NFE {nfe}": distance for nfe, distance in distances.items()}
        return {**named, "floor": self.floor, "ratio": sum(distances.values()) / len(NFES) / self.floor}
