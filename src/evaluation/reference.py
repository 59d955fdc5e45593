"""Folders of images to compare: writing a split as one, and listing what clean-fid will count."""

import os
from collections.abc import Sequence
from pathlib import Path

from cleanfid.utils import EXTENSIONS
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from src.errors import UserError
from src.files import replacing_folder
from src.utils import tensor_to_pil_image


def write_reference(dataset: Sequence[Tensor] | Dataset, folder: str | os.PathLike) -> None:
    """Write the images of `dataset` (tensors in [-1, 1]) as `<index:04d>.png`, the whole folder or nothing."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty: name another folder, or delete it first")
    with replacing_folder(folder) as partial:
        for index in tqdm(range(len(dataset)), desc=f"writing {folder}", unit="image"):
            tensor_to_pil_image(dataset[index]).save(partial / f"{index:04d}.png")


def image_files(folder: str | os.PathLike) -> list[Path]:
    """The images of a folder that clean-fid would count (hidden files it does not), sorted.

    Raises: UserError if the folder is missing, holds fewer than two images (a distance needs two), has images further
    down (clean-fid searches recursively, so leftovers there would silently count), or one that cannot be read, is not
    RGB, or has another size than the rest (all of which clean-fid would convert and count, or fail on with a trace).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: write its images first")
    seen = (path for path in folder.rglob("*") if not any(part[0] == "." for part in path.relative_to(folder).parts))
    files = sorted(path for path in seen if path.suffix[1:] in EXTENSIONS)
    nested = [path for path in files if path.parent != folder]
    if nested:
        raise UserError(f"{nested[0]} lies below {folder} and would be counted too: name the folder that holds it")
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} images: a distance needs at least two")
    first = None
    for path in files:
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
            raise UserError(f"{path} cannot be read ({error}): write it again") from error
        first = first or image.size
        if image.mode != "RGB" or image.size != first:
            raise UserError(
                f"{path} is {image.mode}, {image.width} x {image.height}: all images must be RGB and, like the first, "
                f"{first[0]} x {first[1]}"
            )
    return files


def refuse_other_size(generated: str | os.PathLike, reference: str | os.PathLike) -> None:
    """UserError if two folders hold images of different size, or `image_files` refuses one of them."""
    sizes = []
    for folder in (generated, reference):
        with Image.open(image_files(folder)[0]) as image:
            sizes.append(image.size)
    if sizes[0] != sizes[1]:  # both would be enlarged for the network, and one be blurred by it
        (a, b), (c, d) = sizes
        raise UserError(
            f"{generated} holds images of {a} x {b}, {reference} of {c} x {d}: write a reference of the samples' size, "
            "python -m src.evaluation reference --size"
        )
