"""A folder of images with its split files: `<root>/<id>.png`, and the ids of a split one a line."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision import transforms

from src.errors import UserError

DATA_ROOT = "./data/datasets/kostastokis/simpsons-faces/versions/1/cropped"  # where kagglehub puts the faces


def split_paths(root: str | os.PathLike, split: str, split_dir: str | os.PathLike) -> list[Path]:
    """The image files of a split, in its order; UserError naming the split file or the first missing image."""
    split_file = Path(split_dir) / f"{split}_split.txt"
    if not split_file.is_file():
        raise UserError(
            f"no split file {split_file}: fetch the official one with `python -m src.submission base-code`, "
            "or name another folder with --split_dir"
        )
    try:
        lines = split_file.read_text(encoding="utf-8-sig").splitlines()  # editors on Windows may begin with a mark
    except UnicodeDecodeError:
        raise UserError(f"{split_file} is not in UTF-8: save it so, or fetch it again") from None
    paths = [Path(root) / f"{name}.png" for name in filter(None, map(str.strip, lines))]
    if not paths:
        raise UserError(f"{split_file} names no image")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        again = "delete ./data/datasets, and all are downloaded again" if Path(root) == Path(DATA_ROOT) else ""
        raise UserError(
            f"{len(missing)} of the {len(paths)} images of {split_file} are missing, the first is {missing[0]}: "
            f"{again or 'complete the folder'}, or name the split that belongs to it with --split_dir"
        )
    return paths


def read_rgb(path: Path) -> Image.Image:
    """Decode an image whole; UserError if it is damaged."""
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # a damaged PNG can raise any of them
        raise UserError(f"cannot read the image {path} ({error}): replace it") from error


def resized(size: int) -> Callable[[Image.Image], Image.Image]:
    """A PIL image at 64 x 64 as the challenge makes it, and from there at an experiment's smaller size.

    In one step from the 200 x 200 files, 32 x 32 images would be sharper than references that were kept at 64 x 64. An
    image that has the size stays as it is.
    """
    sides = (64, size) if size < 64 else (size,)
    steps = transforms.Compose([transforms.Resize((side, side)) for side in sides])
    return partial(_unless_of, (size, size), steps)


def _unless_of(size: tuple[int, int], steps: Callable[[Image.Image], Image.Image], image: Image.Image) -> Image.Image:
    return image if image.size == size else steps(image)  # no closure: a loader's workers may pickle it


def to_pixels(size: int) -> Callable[[Image.Image], Tensor]:
    """From a PIL image to [3, size, size] in [-1, 1], as the challenge does it."""
    return transforms.Compose([resized(size), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])


def ensure_root(root: str | os.PathLike) -> None:
    """Download the faces with kagglehub, into ./data, if `root` is missing; UserError if that does not help."""
    if Path(root).is_dir():
        return
    import kagglehub  # here, for it takes a second

    os.environ["KAGGLEHUB_CACHE"] = "./data"  # kagglehub reads it when it downloads
    try:
        path = kagglehub.dataset_download("kostastokis/simpsons-faces")
    except Exception as error:  # whatever the network and Kaggle come up with
        raise UserError(
            f"no images at {root}, and downloading kostastokis/simpsons-faces failed ({type(error).__name__}); "
            "name a folder of your own with --data_root (and --split_dir), or draw the built-in faces: "
            "python -m src.faces data/faces, then --data_root data/faces --split_dir data/faces"
        ) from error
    if not Path(root).is_dir():
        raise UserError(f"downloaded the faces to {path}, but {root} is still missing: check --data_root")
