"""python -m src.evaluation score | reference"""

import argparse

from src.evaluation.distances import frechet_distance
from src.evaluation.features import folder_features, load_features, official_inception
from src.evaluation.reference import image_files, write_reference
from src.images import DATA_ROOT, read_rgb, split_paths, to_pixels
from src.utils import one_line_errors, pick_device


def score(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    for folder in (args.generated, args.reference):
        image_files(folder)
    features = load_features(args.features or official_inception(), device)
    reference = folder_features(args.reference, features, device, cache=True)
    generated = folder_features(args.generated, features, device)
    distance = frechet_distance(generated, reference)
    print(f"{features.distance}: {distance:.4f}  ({len(generated)} images against {len(reference)})")


def reference(args: argparse.Namespace) -> None:
    images = [read_rgb(path) for path in split_paths(args.data_root, args.split, args.split_dir)]
    write_reference(list(map(to_pixels(args.size), images)), args.out)


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
