"""What several sampling seeds and several sample sizes say about a score."""

import numpy as np
from scipy.stats import t as student_t


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean of independent repetitions and half the width of its 95 % interval (Student's t; 0 for a single one)."""
    if len(values) < 2:
        return float(np.mean(values)), 0.0
    half = student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def at_infinity(counts: list[int], values: list[float]) -> float:
    """A Fréchet distance's limit for infinitely many samples: its bias falls as 1/N (arXiv:1911.07023).

    The intercept of the least-squares line through (1/N, distance).
    """
    return float(np.polyfit(1 / np.asarray(counts, np.float64), values, 1)[1])
