"""The folder of validation images that generated ones are compared with."""

import os
import shutil
from pathlib import Path

from torch.utils.data import Dataset
from tqdm import tqdm

from src.utils import UserError, tensor_to_pil_image


def write_reference(dataset: Dataset, folder: str | os.PathLike) -> None:
    """Write the images of `dataset` (tensors in [-1, 1]) as `<index:04d>.png`, the whole folder or nothing."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty: name another folder, or delete it first")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for index in tqdm(range(len(dataset)), desc=f"writing {folder}", unit="image"):
        tensor_to_pil_image(dataset[index]).save(partial / f"{index:04d}.png")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def image_files(folder: str | os.PathLike) -> list[Path]:
    """The PNG images of a folder, sorted; UserError if it is missing, empty, or has images further down.

    clean-fid searches folders recursively, so leftovers below would silently count.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: write its images first")
    files = sorted(folder.rglob("*.png"))
    if not files:
        raise UserError(f"{folder} holds no PNG images")
    nested = [path for path in files if path.parent != folder]
    if nested:
        raise UserError(f"{nested[0]} lies below {folder} and would be counted too: name the folder that holds it")
    return files
