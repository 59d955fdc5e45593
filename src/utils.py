"""Seeds, images and checkpoints: what the challenge's scripts and all rooms share."""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from src.errors import UserError
from src.files import replacing, write_json

NFES = (1, 2, 4)  # network calls, at which the challenge scores


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on every device.

    Raises: UserError outside of NumPy's range.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"a seed must lie in 0 to {2**32 - 1}, got {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def pick_device(name: str) -> torch.device:
    """The device of that name, or the CPU where there is no CUDA. A GPU with a number is the current one from then on,
    which is what PyTorch asks about bfloat16, and where it keeps pinned memory."""
    try:
        device = torch.device(name if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise UserError(f"no device {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"no device {name!r}: this machine has {torch.cuda.device_count()} GPUs, from cuda:0 on")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def get_current_time() -> str:
    """Now, as the challenge names its result folders: MM-DD-HHMMSS."""
    return datetime.now().strftime("%m-%d-%H%M%S")


def expand_t(t: Tensor | float, x: Tensor) -> Tensor:
    """View t, [B] or a number, as [B, 1, ..., 1] or [1, ..., 1], with as many dimensions as x."""
    return torch.as_tensor(t, device=x.device).reshape(-1, *[1] * (x.ndim - 1))


def tensor_to_pil_image(tensor: Tensor) -> Image.Image | list[Image.Image]:
    """Images in [-1, 1] as 8-bit RGB (clamped, halves rounded to even).

    A tensor [3, H, W] gives one image; a batch [B, 3, H, W] always gives a list, of one if B is 1.
    """
    if tensor.ndim not in (3, 4):
        raise ValueError(f"expected [3, H, W] or [B, 3, H, W], got {list(tensor.shape)}")
    if tensor.ndim == 3:
        return tensor_to_pil_image(tensor[None])[0]
    pixels = (tensor.detach().float().cpu() * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in (pixels * 255).round().astype("uint8")]


def labelled_grid(rows: dict[str, list[Image.Image]], scale: int = 2) -> Image.Image:
    """Rows of equally large images, each row with its label on the left, pixels enlarged `scale` times."""
    size = next(iter(rows.values()))[0].width * scale
    font = ImageFont.load_default(size=max(12, size // 6))
    margin = 16 + max(round(font.getlength(label)) for label in rows)
    grid = Image.new("RGB", (margin + size * max(map(len, rows.values())), size * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for y, (label, images) in enumerate(rows.items()):
        draw.text((8, (y + 0.5) * size), label, fill="black", font=font, anchor="lm")
        for x, image in enumerate(images):
            grid.paste(image.resize((size, size), Image.Resampling.NEAREST), (margin + x * size, y * size))
    return grid


@contextmanager
def writing_checkpoint(path: str | os.PathLike) -> Iterator[Path]:
    """`replacing`, around a `torch.save`, whose report of a full disk is an odd RuntimeError."""
    with replacing(path) as temporary:
        try:
            yield temporary
        except RuntimeError as error:
            if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
                raise
            raise UserError(f"could not write {path}: is the disk full? Make room, run again") from error


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Load a file of tensors and JSON types onto the CPU; UserError if it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: train one first, or name another")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and EOF errors of many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}: {reason})") from error
    if not isinstance(saved, dict):
        raise UserError(f"{path} is no checkpoint, it holds a {type(saved).__name__}: name one that train.py saved")
    return saved


def weights_of(checkpoint: dict, path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict of the checkpoint read from `path`, which may be a bare one; UserError if it is none."""
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no weights of a model: name a checkpoint that train.py saved")
    return state


def save_model(
    model: nn.Module, checkpoint_path: str, model_config: dict, config_path: str | None = None, **extra
) -> None:
    """Write {"state_dict": ..., "model_config": ..., **extra}, and the config as JSON beside it.

    Args:
        model_config: the arguments of `create_custom_model`, JSON types.
        config_path: default: `model_config.json` beside the checkpoint.
        extra: further tensors and JSON types to keep in the checkpoint.
    """
    save_weights(model.state_dict(), checkpoint_path, model_config, config_path, **extra)


def save_weights(
    state: dict[str, Tensor], path: str | os.PathLike, model_config: dict, config_path: str | None = None, **extra
) -> None:
    """`save_model` of a state dict."""
    with writing_checkpoint(path) as temporary:
        torch.save({"state_dict": state, "model_config": model_config, **extra}, temporary)
        # Not before: a save that fails must not leave the weights of before with another config.
        write_json(config_path or Path(path).with_name("model_config.json"), model_config)


def weights_hash(state: dict[str, Tensor]) -> str:
    """What tells a model's weights from all others: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_config(path: Path) -> dict:
    """A `model_config.json`; UserError if it is missing or damaged."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no model config at {path}: copy there the one that was saved with the checkpoint") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    return config


def refuse_others_folder(out: Path, name: str, *sources: Path) -> None:
    """UserError if a model of this name, made of these checkpoints, would be written to `out` over another model, or
    over another's config."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    for checkpoint in sources:
        if out.resolve() == checkpoint.parent.resolve():
            raise UserError(f"--out {out} is the folder of {checkpoint}, which would be lost: choose another")
    others = sorted(path.name for path in out.glob("*") if path.suffix in (".pt", ".ckpt") and path.name != name)
    if (out / "training_config.json").exists() or others:
        raise UserError(f"--out {out} holds other models, whose config would be lost: choose another")


def objective_of(checkpoint: dict) -> dict[str, str]:
    """The part of a config that differs between the checkpoints of one run: a stage's objective, if they tell it."""
    config = checkpoint.get("model_config", {})
    return {"objective": config["objective"]} if "objective" in config else {}


def load_model(
    checkpoint_path: str,
    create_model_fn: Callable[..., nn.Module],
    device: str = "cpu",
    config_path: str | None = None,
) -> nn.Module:
    """Rebuild a model from its config and load its weights, strictly.

    Args:
        checkpoint_path: {"state_dict": ...}, or a bare state dict.
        create_model_fn: called as `create_model_fn(device=device, **config)`.
        config_path: default: `model_config.json` beside the checkpoint, with the objective that the checkpoint tells.
    Raises: UserError if a file is missing or damaged, or the weights do not fit the config.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    beside = config_path is None
    config_path = Path(config_path or Path(checkpoint_path).with_name("model_config.json"))
    config = read_config(config_path)
    if beside:
        config |= objective_of(checkpoint)

    try:
        model = create_model_fn(device=device, **config)
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # what a number in a dict's place leads to
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"no model can be made with the settings of {config_path} ({told}): mend them") from error
    try:
        model.load_state_dict(weights_of(checkpoint, checkpoint_path), strict=True)
    except RuntimeError as error:
        reason = str(error).split("\n\t", 1)[-1].split("\n")[0][:200]
        raise UserError(f"{checkpoint_path} does not fit the model of {config_path}: {reason}") from None
    return model
