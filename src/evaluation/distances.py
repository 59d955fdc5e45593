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


def kernel_distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Squared MMD with the kernel (x.y/D + 1)^3, unbiased, and its standard error (KID, arXiv:1801.01401).

    Over all pairs of [N, D] and [M, D], where clean-fid averages the same estimate over random subsets. The standard
    error is that of the estimate's first-order part, sums over one image (arXiv:1511.04581).
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    width = a.shape[1]
    k_aa, k_bb, k_ab = (((x @ y.T) / width + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n, m = k_ab.shape
    own_a = (k_aa.sum(1) - np.diag(k_aa)) / (n - 1)
    own_b = (k_bb.sum(1) - np.diag(k_bb)) / (m - 1)
    across_a, across_b = k_ab.mean(1), k_ab.mean(0)
    distance = own_a.mean() + own_b.mean() - 2 * k_ab.mean()
    error = 2 * np.sqrt(np.var(own_a - across_a, ddof=1) / n + np.var(own_b - across_b, ddof=1) / m)
    return float(distance), float(error)


def manifold_scores(real: np.ndarray, fake: np.ndarray, k: int = 5) -> dict[str, float]:
    """Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797) of [N, D] against [M, D].

    An image's ball reaches to its k-th neighbour in its own set. Precision: share of the fakes in some real ball;
    recall: of the reals in some fake ball; density: real balls around a fake, as a multiple of k; coverage: share of
    the reals with a fake in their ball.
    """
    real_radius, fake_radius = (np.partition(pairwise_distances(x, x), k, axis=1)[:, k] for x in (real, fake))
    across = pairwise_distances(real, fake)
    in_real = across < real_radius[:, None]
    return {
        "precision": float(in_real.any(0).mean()),
        "recall": float((across < fake_radius).any(1).mean()),
        "density": float(in_real.sum(0).mean() / k),
        "coverage": float(in_real.any(1).mean()),
    }


def pairwise_distances(x: np.ndarray, y: np.ndarray, block: int = 2048) -> np.ndarray:
    """Euclidean distances of all pairs of rows, in float64: those of near copies are differences of large numbers."""
    x = x.astype(np.float64)
    found = np.empty((len(x), len(y)))
    for start in range(0, len(y), block):
        part = y[start : start + block].astype(np.float64)
        squares = np.square(x).sum(1)[:, None] + np.square(part).sum(1) - 2 * x @ part.T
        found[:, start : start + block] = np.sqrt(np.maximum(squares, 0))
    return found
