"""The Simpsons faces: dataset and loaders, as the challenge's scripts use them."""

from collections.abc import Callable, Iterable, Iterator

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.errors import UserError
from src.images import DATA_ROOT, ensure_root, read_rgb, split_paths, to_pixels


def get_data_iterator(iterable: Iterable) -> Iterator:
    """Go over `iterable` again and again; UserError if it has nothing to give."""
    while True:
        empty = True
        for item in iterable:
            empty = False
            yield item
        if empty:
            raise UserError("the loader yields no batch: are there fewer images than the batch size?")


class SimpsonsDataset(Dataset):
    """The images `<root>/<id>.png` of one split, as RGB through `transform`.

    Args:
        root: folder of the images.
        split: "train" or "val": the ids are the lines of `<split_dir>/<split>_split.txt`.
        transform: from a PIL image to what `__getitem__` returns; default: the image itself.
    Raises: UserError naming the split file or the image that is missing or unreadable.
    """

    def __init__(self, root: str, split: str, transform: Callable | None = None, split_dir: str = "data"):
        self.root = root
        self.split = split
        self.transform = transform
        self.image_paths = split_paths(root, split, split_dir)

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int):
        image = read_rgb(self.image_paths[index])
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
        ensure_root(root)
        self.root = root
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.image_resolution = 64
        self.transform = transform or to_pixels(self.image_resolution)
        self.train_ds = SimpsonsDataset(root, "train", self.transform, split_dir)
        self.val_ds = SimpsonsDataset(root, "val", self.transform, split_dir)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, without the last incomplete batch."""
        return DataLoader(self.train_ds, self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """In split order, all of it."""
        return DataLoader(self.val_ds, self.batch_size, num_workers=self.num_workers)
