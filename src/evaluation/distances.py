"""Distances between two sets of features: pure functions of arrays."""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets, [N, D] and [M, D].

    |mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)) (Heusel et al., arXiv:1706.08500, eq. 6). With
    the centred and scaled features A and B, C_a = A'A and C_b = B'B, the last trace is the sum of the singular
    values of A B': exact, without a matrix square root, and small when there are fewer images than features.

    Raises: ValueError for fewer than two rows or differing widths.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], got {a.shape} and {b.shape}")
    if min(len(a), len(b)) < 2:
        raise ValueError("need at least two images on each side")
    a, b = a.astype(np.float64), b.astype(np.float64)
    offset = a.mean(0) - b.mean(0)
    a, b = _root_of_covariance(a), _root_of_covariance(b)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(offset @ offset + np.square(a).sum() + np.square(b).sum() - 2 * cross)


def _root_of_covariance(x: np.ndarray) -> np.ndarray:
    """A matrix R, at most [D, D], with R'R the unbiased covariance of the rows of x."""
    x = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.linalg.qr(x, mode="r") if x.shape[0] > x.shape[1] else x
