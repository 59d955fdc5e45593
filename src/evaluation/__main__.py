"""python -m src.evaluation score | report | reference | time_grid"""

import argparse
from pathlib import Path

from src.evaluation.distances import frechet_distance
from src.evaluation.features import folder_features, load_features, official_inception
from src.evaluation.reference import image_files, write_reference
from src.evaluation.report import SWEEP, report
from src.evaluation.time_grid import choose_grids
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


def time_grid(args: argparse.Namespace) -> None:
    choose_grids(args.checkpoint, args.nfe, args.count, args.seed, pick_device(args.device))


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

    parser = commands.add_parser(
        "report", help="a model's scores, memory and failures as a page", formatter_class=formatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", required=True, help="folder of report.json and report.html")
    parser.add_argument("--data_root", default=DATA_ROOT)
    parser.add_argument("--split_dir", default="data")
    parser.add_argument("--features", help="TorchScript network; left out, the official Inception network, for the FID")
    parser.add_argument("--samples", type=int, default=1000, help="for each NFE and sampling seed")
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds at NFE 1, 2, 4")
    parser.add_argument("--sweep", type=int, nargs="*", default=SWEEP, help="NFEs to score with one sampling seed")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures' noise")
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")
    parser.set_defaults(run=report)

    parser = commands.add_parser("reference", help="write a split's images as a folder", formatter_class=formatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data_root", default=DATA_ROOT)
    parser.add_argument("--split_dir", default="data")
    parser.add_argument("--split", choices=("val", "train"), default="val")
    parser.add_argument("--size", type=int, default=64)
    parser.set_defaults(run=reference)

    parser = commands.add_parser("time_grid", help="search a sampler's times for a model", formatter_class=formatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="its model_config.json gets the times")
    parser.add_argument("--nfe", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--count", type=int, default=64, help="noise samples, one half to search and one to check on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")
    parser.set_defaults(run=time_grid)

    args = root.parse_args()
    args.run(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
