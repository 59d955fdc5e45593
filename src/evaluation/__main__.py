"""python -m src.evaluation score | reference"""

import argparse

import torch
from torchvision import transforms

from dataset import SimpsonsDataset
from src.evaluation.distances import frechet_distance
from src.evaluation.features import folder_features, load_features
from src.evaluation.reference import image_files, write_reference
from src.utils import DATA_ROOT, UserError, one_line_errors


def score(args: argparse.Namespace) -> None:
    device = torch.device(args.device if torch.cuda.is_available() else "cpu")
    for folder in (args.generated, args.reference):
        if len(image_files(folder)) < 2:
            raise UserError(f"{folder} holds a single image: a distance needs at least two")
    features = load_features(args.features, device)
    reference = folder_features(args.reference, features, device, cache=True)
    generated = folder_features(args.generated, features, device)
    distance = frechet_distance(generated, reference)
    print(f"{features.distance}: {distance:.4f}  ({len(generated)} images against {len(reference)})")


def reference(args: argparse.Namespace) -> None:
    pixels = transforms.Compose(
        [transforms.Resize((args.size, args.size)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )
    write_reference(SimpsonsDataset(args.data_root, args.split, pixels, args.split_dir), args.out)


def main() -> None:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    root = argparse.ArgumentParser(prog="python -m src.evaluation")
    commands = root.add_subparsers(required=True, metavar="command")

    parser = commands.add_parser("score", help="Fréchet distance of two image folders", formatter_class=formatter)
    parser.add_argument("--generated", required=True, help="folder of PNG images")
    parser.add_argument("--reference", required=True, help="folder of PNG images; its features are cached")
    parser.add_argument("--features", help="TorchScript network; left out, the official Inception network, for the FID")
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")
    parser.set_defaults(run=score)

    parser = commands.add_parser("reference", help="write a split's images as a folder", formatter_class=formatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data_root", default=DATA_ROOT)
    parser.add_argument("--split_dir", default="data")
    parser.add_argument("--split", choices=("val", "train"), default="val")
    parser.add_argument("--size", type=int, default=64)
    parser.set_defaults(run=reference)

    args = root.parse_args()
    args.run(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
