"""Failures that can be measured: blur, saturation, sameness, near-duplicates, copies of training images."""

import numpy as np

from src.evaluation.distances import pairwise_distances


def sharpness(pixels: np.ndarray) -> np.ndarray:
    """Mean square of the grey image's Laplacian, [N], of uint8 images [N, H, W, 3]: the energy of fine detail."""
    grey = pixels.astype(np.float32).mean(-1) / 255
    inner = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    return np.square(laplacian).mean((1, 2))


def saturation(pixels: np.ndarray) -> np.ndarray:
    """Share of an image's values that are 0 or 255, [N], of uint8 images [N, H, W, 3]."""
    return ((pixels == 0) | (pixels == 255)).mean((1, 2, 3))


def nearest(a: np.ndarray, b: np.ndarray, same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """For each row of a, the index of the nearest row of b and the distance; same: a is b, a row is not its own."""
    distances = pairwise_distances(a, b)
    if same:
        np.fill_diagonal(distances, np.inf)
    index = distances.argmin(1)
    return index, distances[np.arange(len(a)), index]


def variety(pixels: np.ndarray, data_pixels: np.ndarray) -> float:
    """How much one pixel's colour differs from image to image, as a share of how much it does in data: 1 is as much.

    Mean over pixels and colours of the standard deviation over images, of uint8 images [N, H, W, 3].
    """
    ours, data = (np.std(one, axis=0, dtype=np.float64).mean() for one in (pixels, data_pixels))
    return float(ours / data)


def failure_rates(
    pixels: np.ndarray, features: np.ndarray, data_pixels: np.ndarray, data_features: np.ndarray
) -> dict[str, float]:
    """Shares of samples beyond what 99 % of the data keep to; data would score 0.01 each.

    Args:
        pixels, data_pixels: uint8 [N, H, W, 3] and [M, H, W, 3].
        features, data_features: [N, D] and [M, D].
    """
    count = min(len(features), len(data_features))  # nearest neighbours are nearer in larger sets
    data_gaps = nearest(data_features[:count], data_features[:count], same=True)[1]
    gaps = nearest(features[:count], features[:count], same=True)[1]
    away = nearest(features, data_features[:count])[1]
    return {
        "blurred": float((sharpness(pixels) < np.quantile(sharpness(data_pixels), 0.01)).mean()),
        "noisy": float((sharpness(pixels) > np.quantile(sharpness(data_pixels), 0.99)).mean()),
        "saturated": float((saturation(pixels) > np.quantile(saturation(data_pixels), 0.99)).mean()),
        "near-duplicates": float((gaps < np.quantile(data_gaps, 0.01)).mean()),
        "far from data": float((away > np.quantile(data_gaps, 0.99)).mean()),
    }


def copies(samples: np.ndarray, train: np.ndarray, unseen: np.ndarray) -> dict[str, float]:
    """How near samples come to training images, compared with real images that training has not seen.

    Args:
        samples, train, unseen: features or pixels of samples, training and validation images, [., D].
    Returns: the share of samples nearer than 99 % of the unseen are, and the chance that a sample is nearer than an
        unseen image. Good samples without memory have 0.01 and 0.5; bad ones are far from all images and have less.
    """
    distance, other = nearest(samples, train)[1], nearest(unseen, train)[1]
    return {
        "share of copies": float((distance < np.quantile(other, 0.01)).mean()),
        "nearer than unseen": float((distance[:, None] < other).mean()),
    }
