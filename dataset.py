"""The Simpsons faces: dataset, loaders and download, as the challenge's scripts use them."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from src.utils import DATA_ROOT, UserError

os.environ["KAGGLEHUB_CACHE"] = "./data"  # read by kagglehub when it is imported
import kagglehub  # noqa: E402


def get_data_iterator(iterable: Iterable) -> Iterator:
    """Go over `iterable` again and again; UserError if it has nothing to give."""
    while True:
        empty = True
        for item in iterable:
            empty = False
            yield item
        if empty:
            raise UserError("the loader yields no batch: are there fewer images than the batch size?")


def download(root: str) -> None:
    """Fetch the faces with kagglehub, which puts them under ./data; UserError if that fails."""
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


class SimpsonsDataset(Dataset):
    """The images `<root>/<id>.png` of one split, as RGB through `transform`.

    Args:
        root: folder of the images.
        split: "train" or "val": the ids are the lines of `<split_dir>/<split>_split.txt`.
        transform: from a PIL image to what `__getitem__` returns; default: the image itself.
    Raises: UserError naming the split file or the image that is missing or unreadable.
    """

    def __init__(self, root: str, split: str, transform: Callable | None = None, split_dir: str = "data"):
        self.root = Path(root)
        self.split = split
        self.transform = transform
        split_file = Path(split_dir) / f"{split}_split.txt"
        if not split_file.is_file():
            raise UserError(
                f"no split file {split_file}: fetch the official one with `python -m src.submission base-code`, "
                "or name another folder (split_dir)"
            )
        self.paths = [self.root / f"{name}.png" for name in split_file.read_text().split()]
        if not self.paths:
            raise UserError(f"{split_file} names no image")
        missing = [path for path in self.paths if not path.is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(self.paths)} images of {split_file} are missing, the first is "
                f"{missing[0]}: complete the folder, or name the split that belongs to it"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        path = self.paths[index]
        try:
            image = Image.open(path).convert("RGB")
        except (OSError, SyntaxError) as error:  # a damaged PNG can raise either
            raise UserError(f"cannot read the image {path} ({error}): replace it") from error
        return self.transform(image) if self.transform else image


class SimpsonsDataModule:
    """Both splits and their loaders; downloads the images if `root` is missing.

    `transform` defaults to 64x64 tensors in [-1, 1].
    """

    def __init__(
        self,
        root: str = DATA_ROOT,
        batch_size: int = 32,
        num_workers: int = 4,
        transform: Callable[[Image.Image], Tensor] | None = None,
        split_dir: str = "data",
    ):
        self.root = root
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.transform = transform or transforms.Compose(
            [transforms.Resize((64, 64)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        )
        if not Path(root).is_dir():
            download(root)
        self.train_ds = SimpsonsDataset(root, "train", self.transform, split_dir)
        self.val_ds = SimpsonsDataset(root, "val", self.transform, split_dir)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, without the last incomplete batch."""
        return DataLoader(self.train_ds, self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """In split order, all of it."""
        return DataLoader(self.val_ds, self.batch_size, num_workers=self.num_workers)
