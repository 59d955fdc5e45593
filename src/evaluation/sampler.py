"""What a sampler may choose for a frozen model: its times (after Tong et al., arXiv:2405.15506), what it asks the
network for, and its filters."""

import copy
import math
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from custom_model import CustomScheduler, create_custom_model
from src.errors import UserError
from src.evaluation.distances import frechet_distance
from src.evaluation.features import load_features, official_inception
from src.evaluation.scoring import CHOOSING_SEED, Data, draw_samples, image_features
from src.objectives import make_objective
from src.utils import (
    load_model,
    objective_of,
    read_checkpoint,
    read_config,
    refuse_others_folder,
    save_weights,
    tensor_to_pil_image,
    weights_of,
)

REFERENCE_STEPS = 64  # Euler steps to the ends that few steps should reach as well
# What a setting's strength is called, and those to choose from.
SETTINGS = {
    # 8-bit levels
    "smoothing": ("sigma", tuple(round(v / 127.5, 4) for v in (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 8, 12))),
    "sharpening": ("amount", (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0)),
    "asking": ("part", (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)),
}
ORDER = ("time_grids", *SETTINGS)  # in which they are searched, each with the samples that those before it give
MOST_IMAGES = 1000  # of the training images, evenly spaced, to compare with


def without(model, name: str):
    """A copy of the model without its setting `name`, and without what is searched after it."""
    model = copy.deepcopy(model)
    for one in ORDER[ORDER.index(name) :]:
        getattr(model.scheduler, one).clear()
    return model


def search_grid(model, nfe: int, count: int = 64, seed: int = CHOOSING_SEED) -> tuple[list[float], dict[str, float]]:
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
    model = without(model, "time_grids")
    path = copy.deepcopy(model)
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


def search_strength(
    name: str, model, nfe: int, training: Data, count: int = 128, seed: int = CHOOSING_SEED
) -> dict[float, float]:
    """The Fréchet distance of `count` samples to training images, by the strength of a setting.

    Samples to smooth are not sharpened yet; those to sharpen are smoothed as the model does, and those of another
    asking, for which the network is called anew, smoothed and sharpened.

    Args:
        name: one of `SETTINGS`.
        training: of the model's image size.
    Returns: the distance for each strength, 0 for samples without the setting.
    """
    model = without(model, name)
    if name != "asking":
        samples = draw_samples(model, nfe, seed, count).to(training.device)
    found = {}
    for strength in tqdm((0.0, *SETTINGS[name][1]), desc=f"{name} for NFE {nfe}", leave=False):
        chosen = {nfe: strength} if strength else {}
        if name == "asking":
            model.scheduler.asking = chosen
            images = tensor_to_pil_image(draw_samples(model, nfe, seed, count))
        else:
            images = tensor_to_pil_image(CustomScheduler(**{name: chosen}).filtered(samples, nfe))
        found[strength] = frechet_distance(image_features(images, training.network, training.device), training.features)
    return found


def choose_strength(
    name: str,
    checkpoint: Path,
    out: Path,
    nfes: list[int],
    count: int,
    seed: int,
    data: tuple[str, str],
    features: str | None,
    device: torch.device,
) -> None:
    """Write a checkpoint's weights to `out`, with a config of the strength that suits its samples at each NFE.

    Args:
        name: one of `SETTINGS`.
        data: folder of the images, and of the split files.
        features: a TorchScript network; None: the official one, of the FID.
    """
    refuse_others_folder(out, checkpoint.name, checkpoint)
    strength = SETTINGS[name][0]
    least = 2 if name == "asking" else 1  # one jump goes all the way from t = 1
    if min(nfes) < least or count < 8:
        raise UserError(f"{name} takes NFEs of at least {least} and 8 samples or more, got NFE {min(nfes)} and {count}")
    model = load_model(checkpoint, create_custom_model, device)
    asked = model.objective.asked(torch.tensor(0.5), torch.tensor([0.0625, 0.125]))  # two parts of the last jump
    if name == "asking" and (asked is None or asked[0] == asked[1]):
        raise UserError(f"{type(model.objective).__name__} is not asked for parts of jumps: leave this step out")
    network = load_features(features or official_inception(), device)
    training = Data(*data, "train", model.image_size, network, device, most=MOST_IMAGES)
    chosen = {}
    for nfe in nfes:
        found = search_strength(name, model, nfe, training, count, seed)
        best = min(found, key=found.get)
        chosen[str(nfe)] = best or None
        strongest = (min if name == "asking" else max)(SETTINGS[name][1])
        beyond = ": the strongest tried, the best may lie beyond" if best == strongest else ""
        distances = f"{network.distance} to training images {found[best]:.4f}, without {found[0.0]:.4f}"
        print(f"NFE {nfe}: {strength} {best:g}, {distances}{beyond}")
    save_chosen(checkpoint, out, name, chosen)


def choose_grids(checkpoint: Path, out: Path, nfes: list[int], count: int, seed: int, device: torch.device) -> None:
    """Search a checkpoint's grids; write its weights to `out`, with a config of the grids that hold on other noise.

    In a folder of their own, because a grid belongs to the weights it was searched for.
    """
    refuse_others_folder(out, checkpoint.name, checkpoint)
    if min(nfes) < 2:
        raise UserError(f"NFE {min(nfes)} has no times to choose: search from NFE 2 on")
    model = load_model(checkpoint, create_custom_model, device)
    chosen = {}
    for nfe in nfes:
        grid, errors = search_grid(model, nfe, count, seed)
        better = errors["found"] < errors["uniform"]
        chosen[str(nfe)] = grid if better else None
        print(f"NFE {nfe}: {grid}, error {errors['found']:.5f}, uniform {errors['uniform']:.5f}"
              f"{'' if better else ': no gain on other noise, left uniform'}")  # fmt: skip
    save_chosen(checkpoint, out, "time_grids", chosen)


def save_chosen(checkpoint: Path, out: Path, name: str, chosen: dict) -> None:
    """Write a checkpoint's weights to `out`, as they are, with a config where `chosen` goes over the setting `name`.

    What is searched after it (`ORDER`) is unset at the NFEs where it has changed: that was for other samples. The
    checkpoint cites what the settings that it has build on.

    Args:
        chosen: the values by NFE, as JSON has it; None unsets one.
    """
    saved = read_checkpoint(checkpoint)
    provenance = dict(saved.get("provenance", {}))
    config = read_config(checkpoint.with_name("model_config.json")) | objective_of(saved)
    settings = {one: config.get(one) or {} for one in ORDER}
    before = CustomScheduler(**settings).citations
    merged = {nfe: value for nfe, value in {**settings[name], **chosen}.items() if value is not None}
    changed = {nfe for nfe in chosen if merged.get(nfe) != settings[name].get(nfe)}
    settings[name] = merged
    for later in ORDER[ORDER.index(name) + 1 :]:
        if old := sorted(changed & settings[later].keys()):
            settings[later] = {nfe: value for nfe, value in settings[later].items() if nfe not in changed}
            print(f"its {later} at NFE {', '.join(old)} was for other samples and is left out: search it anew")
    if "citations" in provenance or any(settings.values()):
        trained = [key for key in provenance.get("citations", []) if key not in before]
        provenance["citations"] = [*trained, *CustomScheduler(**settings).citations]
    config |= {one: values for one, values in settings.items() if values or one in config}
    save_weights(weights_of(saved, checkpoint), out / checkpoint.name, config, provenance=provenance)
    print(f"written to {out}")
