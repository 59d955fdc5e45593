"""Sample images from a checkpoint at each NFE: `python sampling.py --ckpt_path results/<run>/last.ckpt`."""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from custom_model import create_custom_model
from src.errors import UserError, one_line_errors
from src.files import replacing_folder
from src.utils import load_model, pick_device, seed_everything, tensor_to_pil_image


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt_path", default="./checkpoints/best_model.pt")
    parser.add_argument("--config_path", default=None, help="default: model_config.json beside the checkpoint")
    parser.add_argument("--save_dir", default="./samples")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_samples", type=int, default=1000, help="for each NFE")
    parser.add_argument("--nfe_list", type=int, nargs="+", default=[1, 2, 4], help="numbers of network calls")
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if min(args.batch_size, args.num_samples, *args.nfe_list) < 1:
        parser.error("--batch_size, --num_samples and --nfe_list must be at least 1")
    return args


def refuse_foreign(folder: Path) -> None:
    """UserError if a folder that is to be replaced holds what no earlier call wrote."""
    foreign = [path.name for path in folder.glob("[!.]*") if not (path.suffix == ".png" and path.stem.isdigit())]
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which sampling did not write: choose another --save_dir")


@torch.no_grad()
def write_samples(model, folder: Path, nfe: int, num_samples: int, batch_size: int) -> None:
    """Write `<index:04d>.png` into `folder`, replacing the images of an earlier call, whole or not at all."""
    with replacing_folder(folder) as partial, tqdm(total=num_samples, desc=f"NFE={nfe}", unit="image") as progress:
        while progress.n < num_samples:
            count = min(batch_size, num_samples - progress.n)
            shape = (count, 3, model.image_size, model.image_size)
            images = model.sample(shape, num_inference_timesteps=nfe, verbose=False)
            for index, image in enumerate(tensor_to_pil_image(images), start=progress.n):
                image.save(partial / f"{index:04d}.png")
            progress.update(count)


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    folders = [Path(args.save_dir) / f"nfe={nfe}" for nfe in args.nfe_list]
    for folder in folders:  # before hours of the first NFEs
        refuse_foreign(folder)
    # Seeded before the model is built: its initialisation draws from the same generator as the noise, and
    # so do earlier batches and NFEs. The images depend on all of that, as the challenge's do.
    seed_everything(args.seed)
    model = load_model(args.ckpt_path, create_custom_model, str(device), args.config_path)
    model.eval()
    print(f"{args.ckpt_path}: {args.num_samples} images for each NFE of {args.nfe_list} on {device}, seed {args.seed}")
    for nfe, folder in zip(args.nfe_list, folders, strict=True):
        write_samples(model, folder, nfe, args.num_samples, args.batch_size)
        print(f"saved to {folder}")


if __name__ == "__main__":
    with one_line_errors():
        main()
