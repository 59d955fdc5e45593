"""What a sampler may choose for a frozen model: its times (after Tong et al., arXiv:2405.15506), and its filters."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from custom_model import blurred, create_custom_model
from src.evaluation.scoring import draw_samples, evenly
from src.images import read_rgb, split_paths, to_pixels
from src.objectives import make_objective
from src.utils import UserError, load_model, objective_of, read_checkpoint, save_model, tensor_to_pil_image

REFERENCE_STEPS = 64  # Euler steps to the ends that few steps should reach as well
SIGMAS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 10, 12, 16)  # of smoothing, in 8-bit levels
APART = (1, 2, 4, 8)  # pixels whose differences are compared
AMOUNTS = tuple(round(0.05 * i, 2) for i in range(41))  # of sharpening
MOST_IMAGES = 1000  # of the training images, evenly spaced: their pixels' differences are sorted in memory


def search_grid(model, nfe: int, count: int = 64, seed: int = 0) -> tuple[list[float], dict[str, float]]:
    """Times from 1 to 0 in `nfe` jumps whose samples end nearest to those of the model's ODE from the same noise
    (the paper's eq. 5).

    The paper descends the gradient through the solver; for a handful of times, Nelder and Mead's method needs no more
    network calls. It searches the logarithms of the jumps' lengths on half of the noise; the other half tells whether
    what it found holds beyond it.

    Args:
        count: noise samples.
    Returns: the grid, and mean squared errors on the other half: "uniform", "found".
    Raises: UserError if there are no times to search.
    """
    if nfe < 2 or count < 4:
        raise UserError(f"times are searched from NFE 2 on, with 4 noise samples or more, got NFE {nfe} and {count}")
    if not model.objective.keeps_velocity:
        raise UserError(f"{type(model.objective).__name__} leaves no velocity to follow: search the model before it")
    model, path = copy.deepcopy(model), copy.deepcopy(model)
    path.objective = make_objective("rectified_flow", path.scheduler)  # its samples follow the velocity
    half = count // 2

    def samples(sampler, steps: int, first: int) -> Tensor:
        noise = [torch.Generator().manual_seed(seed + i) for i in range(first, first + half)]
        return sampler.sample((half, 3, model.image_size, model.image_size), steps, generator=noise)

    wanted = {first: samples(path, REFERENCE_STEPS, first) for first in (0, half)}

    def error(grid: list[float], first: int) -> float:
        if sorted(set(grid), reverse=True) != grid:  # two times that are the same after rounding
            return math.inf
        model.scheduler.time_grids[nfe] = grid
        return (samples(model, nfe, first) - wanted[first]).square().mean().item()

    def grid_of(logs: np.ndarray) -> list[float]:
        lengths = np.exp(np.concatenate([logs, [0.0]]))
        return [1.0, *(1 - lengths.cumsum() / lengths.sum())[:-1].round(4).tolist(), 0.0]

    start = np.zeros(nfe - 1)
    simplex = np.vstack([start, 0.5 * np.eye(nfe - 1)])
    with tqdm(desc=f"times for NFE {nfe}", unit=" grids") as progress:

        def searched(logs: np.ndarray) -> float:
            progress.update()
            return error(grid_of(logs), 0)

        options = {"initial_simplex": simplex, "xatol": 0.02, "fatol": 1e-5}
        found = grid_of(minimize(searched, start, method="Nelder-Mead", options=options).x)
    return found, {"uniform": error(grid_of(start), half), "found": error(found, half)}


def pixel_differences(pixels: np.ndarray) -> np.ndarray:
    """Quantiles of log(1 + |difference|) of pixels 1, 2, 4 and 8 apart, in a row or a column; uint8 [N, H, W, 3].

    Returns: [4, 199].
    """
    x, found = pixels.astype(np.int16), []
    for apart in APART:
        both = np.abs(x[:, apart:] - x[:, :-apart]).ravel(), np.abs(x[:, :, apart:] - x[:, :, :-apart]).ravel()
        found.append(np.quantile(np.log1p(np.concatenate(both)), np.linspace(0.005, 0.995, 199)))
    return np.stack(found)


def search_smoothing(model, nfe: int, pixels: np.ndarray, count: int = 128, seed: int = 0) -> dict[float, float]:
    """How far near pixels of `count` smoothed samples differ otherwise than those of real images do.

    The distance is the mean difference of `pixel_differences`, a Wasserstein distance for each distance of pixels; no
    network takes part.

    Args:
        pixels: training images, uint8 [N, H, W, 3].
    Returns: the distance for each sigma, 0 for samples as they are.
    """
    model = copy.deepcopy(model)
    model.scheduler.smoothing.clear()
    model.scheduler.sharpening.clear()  # which comes after smoothing
    samples = draw_samples(model, nfe, seed, count)
    wanted, found = pixel_differences(pixels), {}
    for sigma in (0.0, *(round(level / 127.5, 4) for level in SIGMAS)):
        model.scheduler.smoothing = {nfe: sigma} if sigma else {}
        images = tensor_to_pil_image(model.scheduler.smooth(samples, nfe))
        made = pixel_differences(np.stack([np.asarray(image) for image in images]))
        found[sigma] = float(np.abs(made - wanted).mean())
    return found


def detail(pixels: np.ndarray) -> float:
    """Root mean square of what unsharp masking adds to images, uint8 [N, H, W, 3]."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    return (x - blurred(x)).square().mean().sqrt().item()


def search_sharpening(model, nfe: int, pixels: np.ndarray, count: int = 128, seed: int = 0) -> dict[float, float]:
    """How far the `detail` of `count` samples, smoothed as the model does and then sharpened, is from real images'.

    Args:
        pixels: training images, uint8 [N, H, W, 3].
    Returns: the logarithm of their ratio, without its sign, for each amount, 0 for samples as they are.
    """
    model = copy.deepcopy(model)
    model.scheduler.sharpening.clear()
    samples = draw_samples(model, nfe, seed, count)
    wanted, found = detail(pixels), {}
    for amount in AMOUNTS:
        model.scheduler.sharpening = {nfe: amount} if amount else {}
        images = tensor_to_pil_image(model.scheduler.sharpen(samples, nfe))
        found[amount] = abs(math.log(detail(np.stack([np.asarray(image) for image in images])) / wanted))
    return found


# What a filter's strength is called, how it is searched, and the key of references.bib for the filter.
FILTERS = {
    "smoothing": ("sigma", search_smoothing, "buades2005nonlocal"),
    "sharpening": ("amount", search_sharpening, "gonzalez2018digital"),
}


def choose_filter(
    name: str,
    checkpoint: Path,
    out: Path,
    nfes: list[int],
    count: int,
    seed: int,
    data: tuple[str, str],
    device: torch.device,
) -> None:
    """Write a checkpoint's weights to `out`, with a config of the filter that suits its samples at each NFE.

    Args:
        name: one of `FILTERS`.
        data: folder of the images, and of the split files.
    """
    strength, search, citation = FILTERS[name]
    if min(nfes) < 1 or count < 1:
        raise UserError(f"{name} takes NFEs and samples of at least 1, got NFE {min(nfes)} and {count} samples")
    model = load_model(checkpoint, create_custom_model, device)
    resized = to_pixels(model.image_size)
    paths = split_paths(data[0], "train", data[1])
    paths = [paths[i] for i in evenly(len(paths), MOST_IMAGES)]
    images = [tensor_to_pil_image(resized(read_rgb(path))) for path in tqdm(paths, desc="training images")]
    pixels = np.stack([np.asarray(image) for image in images])
    chosen = {}
    for nfe in nfes:
        found = search(model, nfe, pixels, count, seed)
        best = min(found, key=found.get)
        chosen[str(nfe)] = best or None
        print(f"NFE {nfe}: {strength} {best:g}, distance {found[best]:.4f}, without {found[0.0]:.4f}")
    save_chosen(model, checkpoint, out, (citation,), **{name: chosen})


def choose_grids(checkpoint: Path, out: Path, nfes: list[int], count: int, seed: int, device: torch.device) -> None:
    """Search a checkpoint's grids; write its weights to `out`, with a config of the grids that hold on other noise.

    In a folder of their own, because a grid belongs to the weights it was searched for.
    """
    if min(nfes) < 2:
        raise UserError(f"NFE {min(nfes)} has no times to choose: search from NFE 2 on")
    model = load_model(checkpoint, create_custom_model, device)
    model.scheduler.time_grids.clear()
    chosen = {}
    for nfe in nfes:
        grid, errors = search_grid(model, nfe, count, seed)
        better = errors["found"] < errors["uniform"]
        chosen[str(nfe)] = grid if better else None
        print(f"NFE {nfe}: {grid}, error {errors['found']:.5f}, uniform {errors['uniform']:.5f}"
              f"{'' if better else ': no gain on other noise, left uniform'}")  # fmt: skip
    save_chosen(model, checkpoint, out, ("tong2025learning",), time_grids=chosen)


def save_chosen(model, checkpoint: Path, out: Path, citations: tuple[str, ...], **settings: dict) -> None:
    """Write a checkpoint's weights to `out`; in its config these settings by NFE go over its own, None unsets."""
    saved = read_checkpoint(checkpoint)
    provenance = dict(saved.get("provenance", {}))
    provenance["citations"] = list(dict.fromkeys([*provenance.get("citations", []), *citations]))
    config = json.loads(checkpoint.with_name("model_config.json").read_text()) | objective_of(saved)
    for name, chosen in settings.items():
        merged = {**(config.get(name) or {}), **chosen}
        config[name] = {nfe: value for nfe, value in merged.items() if value is not None}
    save_model(model, out / checkpoint.name, config, provenance=provenance)
    print(f"written to {out}")
