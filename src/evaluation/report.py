"""A model's scores with their intervals, its memory of training images and its failures: report.json, report.html."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import custom_model
from custom_model import create_custom_model
from src.errors import UserError
from src.evaluation.distances import frechet_distance, kernel_distance, manifold_scores
from src.evaluation.failures import copies, failure_rates, nearest, variety
from src.evaluation.features import Features, load_features, official_inception
from src.evaluation.intervals import at_infinity, mean_interval
from src.evaluation.page import Figures, write_page
from src.evaluation.scoring import Data, draw_samples, evenly, floor_of, kept_features
from src.files import cached_array, replacing, write_json
from src.utils import (
    NFES,
    has_bf16,
    labelled_grid,
    load_model,
    pick_device,
    read_checkpoint,
    read_config,
    tensor_to_pil_image,
    weights_hash,
)

# Keys of references.bib for what the scores are.
CITATIONS = (
    "heusel2017gans",
    "parmar2022aliased",
    "binkowski2018demystifying",
    "bounliphone2016test",
    "kynkaanniemi2019improved",
    "naeem2020reliable",
    "chong2020effectively",
)
SWEEP = (1, 2, 3, 4, 5, 8, 10, 20, 50, 100, 250)


class Model:
    """A checkpoint's samples and their features, each made once and kept in data/cache.

    Samples are kept as they are before smoothing and sharpening, so that models which differ in these alone share them.

    Args:
        count: samples of one set; set `seed` starts from noise seeds seed * 1,000,000 and on.
        bf16: sample in bfloat16 where the chip computes in it; elsewhere that takes many times as long as float32.
    """

    def __init__(self, checkpoint: str, features: Features, device: torch.device, count: int, bf16: bool = False):
        self.net = load_model(checkpoint, create_custom_model, device)
        self.net.network.to(memory_format=torch.channels_last)  # samples an eighth faster on CPUs, too
        self.features, self.device, self.count, self.bf16 = features, device, count, bf16 and has_bf16(device)
        config = read_config(Path(checkpoint).with_name("model_config.json"))
        for name in ("smoothing", "sharpening", "objective"):  # a checkpoint tells its own objective
            config.pop(name, None)
        digest = hashlib.sha256(json.dumps([config, self.bf16], sort_keys=True).encode())
        objective = self.net.objective  # it says what jumps are asked for
        code = [inspect.getsource(part) for part in (custom_model, draw_samples, type(objective).asked)]
        digest.update(repr([objective, *code]).encode())  # code that draws other samples
        digest.update(weights_hash(self.net.state_dict()).encode())
        self.key = digest.hexdigest()[:16]
        self.filtered: dict[tuple[int, int], np.ndarray] = {}  # a tenth of a second an image and core

    def autocast(self) -> torch.autocast:
        """The precision to sample in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def pixels(self, nfe: int, seed: int) -> np.ndarray:
        """uint8 [count, H, W, 3]."""
        scheduler = self.net.scheduler

        def draw() -> np.ndarray:
            with unfiltered(scheduler), self.autocast():
                return draw_samples(self.net, nfe, seed * 1_000_000, self.count).numpy()

        if (nfe, seed) not in self.filtered:
            samples = torch.from_numpy(cached_array(f"samples-{self.key}-{nfe}-{seed}-{self.count}", draw))
            images = [_images(scheduler.filtered(some.to(self.device), nfe)) for some in samples.split(64)]
            self.filtered[nfe, seed] = np.concatenate(images)
        return self.filtered[nfe, seed]

    def embedded(self, nfe: int, seed: int) -> np.ndarray:
        """Features [count, D]."""
        return kept_features(self.pixels(nfe, seed), self.features, self.device)


@contextmanager
def unfiltered(scheduler) -> Iterator[None]:
    """Sample as the network draws, neither smoothed nor sharpened."""
    filters = scheduler.smoothing, scheduler.sharpening
    scheduler.smoothing, scheduler.sharpening = {}, {}
    try:
        yield
    finally:
        scheduler.smoothing, scheduler.sharpening = filters


def flattened(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] as vectors of values in [0, 1], [N, D]."""
    return pixels.reshape(len(pixels), -1).astype(np.float32) / 255


def check_counts(args, nfes: list[int]) -> None:
    """UserError for numbers of samples, seeds and network calls that give no distances or no intervals."""
    if args.samples < 16:
        raise UserError(f"--samples must be at least 16, got {args.samples}")
    if args.seeds < 2:
        raise UserError(f"--seeds must be at least 2, got {args.seeds}: one seed has no interval")
    if any(nfe < 1 for nfe in nfes):
        raise UserError(f"an image takes at least 1 network call, not {min(nfes)}")


def scores(model: Model, nfe: int, seeds: int, real: np.ndarray) -> dict:
    """Every distance at one NFE for each sampling seed, and the Fréchet distance's limit for infinite samples."""
    sets = [model.embedded(nfe, seed) for seed in range(seeds)]
    rows = []
    for found in sets:
        kernel, error = kernel_distance(found, real)
        rows.append(
            {"frechet": frechet_distance(found, real), "kernel": kernel, "kernel_error": error}
            | manifold_scores(real, found)
        )
    together = np.concatenate(sets)
    counts = [len(together) // parts for parts in (1, 2, 4)]
    by_count = [
        float(np.mean([frechet_distance(part, real) for part in np.array_split(together, parts)]))
        for parts in (1, 2, 4)
    ]
    intervals = {name: mean_interval([row[name] for row in rows]) for name in rows[0]}
    limit = {"counts": counts, "frechet": by_count, "at infinity": at_infinity(counts, by_count)}
    return {"seeds": rows, "intervals": intervals, "samples": limit}


def report(args) -> None:
    """Carry out `python -m src.evaluation report`, whose flags `args` holds."""
    check_counts(args, args.sweep)
    device = pick_device(args.device)
    features = load_features(args.features or official_inception(), device)
    model = Model(args.checkpoint, features, device, args.samples, args.bf16)
    size = model.net.image_size
    train, val = (Data(args.data_root, args.split_dir, split, size, features, device) for split in ("train", "val"))
    chosen = evenly(len(train.pixels), args.samples)
    floor = floor_of(train.features[chosen], val.features)

    content = {
        "checkpoint": str(args.checkpoint),
        "weights": weights_hash(model.net.state_dict())[:16],
        "distance": features.distance,
        "features": features.key,
        "citations": list(CITATIONS),
        "size": size,
        "picture seed": args.seed,
        "provenance": read_checkpoint(args.checkpoint).get("provenance", {}),
        "sampler": {
            name: getattr(model.net.scheduler, name) for name in ("time_grids", "asking", "smoothing", "sharpening")
        },
        "bf16": model.bf16,
        "samples": args.samples,
        "sampling seeds": args.seeds,
        "training images": len(train.pixels),
        "validation images": len(val.pixels),
        "floor": {
            "frechet": floor,
            "training images": len(chosen),
            **manifold_scores(val.features, train.features[chosen]),
        },
        "nfe": {},
        "sweep": {},
    }
    seen_pixels, seen = train.either_way()
    for nfe in tqdm(NFES, desc="scores"):
        found = scores(model, nfe, args.seeds, val.features)
        first = model.pixels(nfe, 0), model.embedded(nfe, 0)
        found["failures"] = failure_rates(*first, val.pixels, val.features)
        found["variety"] = variety(first[0], val.pixels)
        found["memory"] = {
            "features": copies(first[1], seen, val.features),
            "pixels": copies(flattened(first[0]), flattened(seen_pixels), flattened(val.pixels)),
        }
        found["ratio"] = found["intervals"]["frechet"][0] / floor
        content["nfe"][str(nfe)] = found
    for nfe in tqdm(args.sweep, desc="sweep"):
        content["sweep"][str(nfe)] = frechet_distance(model.embedded(nfe, 0), val.features)
    out = Path(args.out)
    with model.autocast():
        pictures = figures(model, seen_pixels, seen, val, args.seed)
    write_json(out / "report.json", content)
    write_page(out, content, pictures)
    rows = {f"NFE {nfe}": images[:8] for nfe, images in pictures.samples.items()}
    for name, shown in (("samples", rows), ("farthest", {f"NFE {NFES[-1]}": pictures.farthest[0]})):
        with replacing(out / f"{name}.png") as temporary:
            labelled_grid({label: [Image.fromarray(one) for one in row] for label, row in shown.items()}).save(
                temporary, format="png"
            )
    print(f"{out / 'report.html'} and {out / 'report.json'}")
    for nfe, found in content["nfe"].items():
        mean, half = found["intervals"]["frechet"]
        print(
            f"NFE {nfe}: {features.distance} {mean:.3f} ± {half:.3f}, {found['ratio']:.2f} times the floor {floor:.3f}"
        )


def figures(model: Model, seen_pixels: np.ndarray, seen: np.ndarray, val: Data, seed: int) -> Figures:
    """The pictures of the page, all chosen by seed or by a measure, none by eye.

    Args:
        seen_pixels, seen: training images and their mirror images, and their features.
    """
    net, size = model.net, model.net.image_size
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(32, 3, size, size, generator=generator)
    samples = {nfe: _images(net.sample(noise.shape, nfe, noise=noise)) for nfe in NFES}
    states = net.sample(noise[:6].shape, NFES[-1], return_traj=True, noise=noise[:6])
    angle = torch.linspace(0, torch.pi / 2, 8)[:, None, None, None]
    between = [angle.cos() * noise[2 * i] + angle.sin() * noise[2 * i + 1] for i in range(3)]
    interpolated = [_images(net.sample(one.shape, NFES[-1], noise=one)) for one in between]

    nfe = NFES[-1]
    pixels, embedded = model.pixels(nfe, 0), model.embedded(nfe, 0)
    index, distance = nearest(embedded, seen)
    closest = np.argsort(distance)[:8]
    by_pixel, pixel_distance = nearest(flattened(pixels), flattened(seen_pixels))
    closest_by_pixel = np.argsort(pixel_distance)[:8]
    away = nearest(embedded, np.concatenate([seen, val.features]))[1]
    return Figures(
        samples=samples,
        trajectory=[list(row) for row in zip(*(_images(state) for state in states), strict=True)],
        interpolated=interpolated,
        closest=[list(pixels[closest]), list(seen_pixels[index[closest]])],
        closest_by_pixel=[list(pixels[closest_by_pixel]), list(seen_pixels[by_pixel[closest_by_pixel]])],
        farthest=[list(pixels[np.argsort(-away)[:8]])],
        distances=distance,
        unseen_distances=nearest(val.features, seen)[1],
    )


def _images(batch: torch.Tensor) -> list[np.ndarray]:
    return [np.asarray(image) for image in tensor_to_pil_image(batch)]
