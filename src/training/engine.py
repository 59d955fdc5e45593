"""The training loop that every objective shares."""

import math
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from src.objectives.contract import Nets
from src.training.data import batch_indices, to_batch
from src.training.ema import EMA
from src.training.record import Metrics, plot_curves, provenance, save_previews
from src.utils import UserError, read_checkpoint, save_model, write_json


@dataclass
class Recipe:
    """How to train. What a resumed run may change is listed in `FREE`.

    Args:
        batch_size: images of one optimizer step.
        num_iterations: optimizer steps in all.
        lr: AdamW's learning rate, after `warmup` steps of linear increase from 0.
        weight_decay: AdamW's; 0.1 is the shortcut paper's (arXiv:2410.12557, appendix).
        grad_clip: largest norm of the gradient.
        ema_decay: weight of the old average at each step.
        accumulate: slices a batch is computed in; changes the memory needed, not the gradient.
        seed: of weights, data order, noise, times and dropout.
        log_interval, save_interval: in steps.
        max_minutes: stop (and export) after this time; None: never.
    """

    batch_size: int = 32
    num_iterations: int = 100_000
    lr: float = 1e-4
    warmup: int = 200
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    accumulate: int = 1
    seed: int = 42
    log_interval: int = 100
    save_interval: int = 10_000
    max_minutes: float | None = None

    def __post_init__(self):
        for name in ("batch_size", "num_iterations", "accumulate", "log_interval", "save_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise UserError(f"--batch_size {self.batch_size} does not split into {self.accumulate} equal slices")
        if self.seed < 0 or self.lr <= 0 or not 0 <= self.ema_decay < 1:
            raise UserError("--seed must not be negative, --lr must be positive, and --ema_decay in [0, 1)")


FREE = ("num_iterations", "accumulate", "log_interval", "save_interval", "max_minutes")


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed all of a step's randomness from these three alone, so that resuming needs no stored generator."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0]))


def accumulate_gradient(
    model, ema, data: Tensor, noise: Tensor, step: int, slices: int, bf16: bool
) -> dict[str, list[Tensor]]:
    """Add the gradient of the batch's mean loss to `model`'s, computed slice by slice.

    Returns: the per-sample losses ("loss") and the objective's logs, a list of 1-d tensors for each.
    """
    objective = model.objective
    draw = objective.draw(len(data))
    logs = {}
    for rows in torch.arange(len(data)).chunk(slices):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        part = {name: value[rows] for name, value in draw.items()}
        with torch.autocast(data.device.type, torch.bfloat16, enabled=bf16):
            loss, parts = objective.loss(Nets(student=model, ema=ema), data[rows], noise[rows], step, part)
        (loss.sum() / len(data)).backward()
        for name, value in {"loss": loss.detach(), **parts}.items():
            logs.setdefault(name, []).append(value)
    return logs


def train(
    model, model_config: dict, images: np.ndarray, data_hash: str, recipe: Recipe, save_dir: Path, arguments: dict
) -> None:
    """Train `model` on uint8 `images` [N, 3, H, W]; go on from `save_dir`/last.ckpt if it is there.

    Writes checkpoints (the EMA's weights), `model_config.json` (what rebuilds the model), `training_config.json`
    (`arguments`), previews, metrics and curves.
    Raises: UserError if the loss is no longer finite, the run is stopped by a signal (after saving), or `last.ckpt`
        belongs to another run (which is left as it is).
    """
    device = model.device
    bf16 = has_bf16(device)
    batch_indices(len(images), recipe.batch_size, recipe.seed, 0)  # refuses a data set smaller than a batch
    ema = EMA(model, recipe.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    identity = {"model": model_config, "data": data_hash} | {
        name: value for name, value in asdict(recipe).items() if name not in FREE
    }
    last = save_dir / "last.ckpt"
    start = _resume(last, model, ema, optimizer, identity) if last.exists() else 0
    write_json(save_dir / "training_config.json", arguments)
    write_json(save_dir / "model_config.json", model_config)
    metrics = Metrics(save_dir / "metrics.jsonl", start)
    origin = provenance(device, seed=recipe.seed, data=data_hash, images=len(images), bf16=bf16)

    def save(step: int, *exports: str) -> None:
        facts = {"provenance": {**origin, "step": step}}
        for name in exports:
            save_model(ema.model, save_dir / name, model_config, **facts)
        state = {"step": step, "student": model.state_dict(), "optimizer": optimizer.state_dict(), "identity": identity}
        save_model(ema.model, last, model_config, training=state, **facts)
        plot_curves(metrics.rows, save_dir / "training_curves.png")

    model.train()
    logs: dict[str, list[Tensor]] = {}
    step = interval_start = start
    began = interval_began = time.monotonic()
    with (
        _stop_signals() as stop_received,
        tqdm(total=recipe.num_iterations, initial=start, desc="training") as progress,
    ):
        finished = stopped = False
        while not (finished or stopped):
            if step < recipe.num_iterations:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * min(1.0, (step + 1) / max(1, recipe.warmup))
                seed_step(recipe.seed, 0, step)
                data = to_batch(images, batch_indices(len(images), recipe.batch_size, recipe.seed, step), device)
                noise = torch.randn_like(data)
                parts = accumulate_gradient(model, ema.model, data, noise, step, recipe.accumulate, bf16)
                for name, values in parts.items():
                    logs.setdefault(name, []).extend(values)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                ema.update(model, step)
                step += 1

            out_of_time = recipe.max_minutes is not None and time.monotonic() - began > 60 * recipe.max_minutes
            finished = step >= recipe.num_iterations or out_of_time
            stopped = stop_received()
            saving = finished or stopped or step % recipe.save_interval == 0
            if logs and (saving or step % recipe.log_interval == 0):
                row = _means(logs) | {"gradient_norm": norm.item()}
                if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
                    kept = f"{last} is still good" if last.exists() else "nothing was saved yet"
                    raise UserError(
                        f"the loss or its gradient is not finite around iteration {step}; {kept}; "
                        "start again with a lower --lr in a new --save_dir"
                    )
                speed = (step - interval_start) * recipe.batch_size / (time.monotonic() - interval_began)
                row |= {"lr": optimizer.param_groups[0]["lr"], "images_per_second": speed}
                metrics.add({"step": step, "images": step * recipe.batch_size, **row})
                progress.update(step - progress.n)
                progress.set_postfix(loss=f"{row['loss']:.4f}", img_s=f"{speed:.1f}")
                logs, interval_start = {}, step
            if saving:
                at_interval = finished or step % recipe.save_interval == 0
                save(step, *[f"checkpoint_iter_{step}.pt"] * at_interval, *["final_model.pt"] * finished)
                if at_interval:
                    save_previews(ema.model, save_dir, step, recipe.seed)
            if step == interval_start:  # the time that saving took is not training time
                interval_began = time.monotonic()
    if not finished:
        raise UserError(
            f"stopped at iteration {step}, all saved: go on with the same command and --save_dir {save_dir}"
        )


def _means(logs: dict[str, list[Tensor]]) -> dict[str, float | None]:
    joined = {name: torch.cat(values) for name, values in logs.items()}
    return {name: values.mean().item() if len(values) else None for name, values in joined.items()}


def _resume(last: Path, model, ema: EMA, optimizer, identity: dict) -> int:
    checkpoint = read_checkpoint(last)
    if "training" not in checkpoint:
        raise UserError(f"{last} holds a model but no training state: choose another --save_dir")
    state = checkpoint["training"]
    changed = [
        f"{name} was {state['identity'].get(name)!r} and is now {value!r}"
        for name, value in identity.items()
        if state["identity"].get(name) != value
    ]
    if changed:
        raise UserError(f"{last} belongs to another run ({'; '.join(changed)}): choose another --save_dir")
    model.load_state_dict(state["student"])
    ema.model.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


@contextmanager
def _stop_signals():
    """Yield a function that tells whether SIGINT or SIGTERM has come, so that the loop can save first."""
    received = []
    note = lambda number, frame: received.append(number)  # noqa: E731
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
