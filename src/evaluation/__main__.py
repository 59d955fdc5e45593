"""python -m src.evaluation score | report | compare | ablate | speed | time_grid | smoothing | ... (--help)"""

import argparse
from functools import partial
from pathlib import Path

from src.errors import UserError, one_line_errors
from src.evaluation.compare import OURS, ablate, compare
from src.evaluation.distances import frechet_distance
from src.evaluation.features import folder_features, load_features, official_inception
from src.evaluation.launch import split_flags
from src.evaluation.reference import refuse_other_size, write_reference
from src.evaluation.report import SWEEP, report
from src.evaluation.sampler import choose_grids, choose_strength
from src.evaluation.scoring import CHOOSING_SEED
from src.evaluation.speed import speed
from src.images import DATA_ROOT, ensure_root, read_rgb, split_paths, to_pixels
from src.utils import NFES, pick_device

FEATURES = "TorchScript network; left out, the official Inception network, for the FID"


def score(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    refuse_other_size(args.generated, args.reference)
    features = load_features(args.features or official_inception(), device)
    reference = folder_features(args.reference, features, device, cache=True)
    generated = folder_features(args.generated, features, device)
    distance = frechet_distance(generated, reference)
    print(f"{features.distance}: {distance:.4f}  ({len(generated)} images against {len(reference)})")


def reference(args: argparse.Namespace) -> None:
    if args.size < 1:
        raise UserError(f"--size {args.size}: at least 1 pixel")
    ensure_root(args.data_root)
    images = [read_rgb(path) for path in split_paths(args.data_root, args.split, args.split_dir)]
    write_reference(list(map(to_pixels(args.size), images)), args.out)


def time_grid(args: argparse.Namespace) -> None:
    choose_grids(args.checkpoint, args.out, args.nfe, args.count, args.seed, pick_device(args.device))


def choose(name: str, args: argparse.Namespace) -> None:
    data, device = (args.data_root, args.split_dir), pick_device(args.device)
    choose_strength(name, args.checkpoint, args.out, args.nfe, args.count, args.seed, data, args.features, device)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What every command has that samples from models and scores them."""
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--data_root", default=DATA_ROOT)
    parser.add_argument("--split_dir", default="data")
    parser.add_argument("--features", help=FEATURES)
    parser.add_argument("--samples", type=int, default=1000, help="for each NFE and sampling seed")
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds")
    parser.add_argument("--bf16", action="store_true", help="sample in bfloat16 where the chip has it: half the time")
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")


def add_comparison_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nfe", type=int, nargs="+", default=NFES, help="numbers of network calls to compare at")
    add_model_flags(parser)


def main() -> None:
    root = argparse.ArgumentParser(prog="python -m src.evaluation")
    commands = root.add_subparsers(required=True, metavar="command")

    def command(name: str, run, about: str) -> argparse.ArgumentParser:
        shown = argparse.ArgumentDefaultsHelpFormatter
        parser = commands.add_parser(name, help=about, description=about, formatter_class=shown)
        parser.set_defaults(run=run)
        return parser

    parser = command("score", score, "Fréchet distance of two image folders")
    parser.add_argument("--generated", required=True, help="folder of PNG images")
    parser.add_argument("--reference", required=True, help="folder of PNG images; its features are cached")
    parser.add_argument("--features", help=FEATURES)
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")

    parser = command("report", report, "a model's scores, memory and failures as a page")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--sweep", type=int, nargs="*", default=SWEEP, help="NFEs to score with one sampling seed")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures' noise")
    add_model_flags(parser)

    parser = command("compare", compare, "models' differences on common noise")
    parser.add_argument("runs", nargs="+", help="checkpoints, or folders of finished runs; the first is the base")
    add_comparison_flags(parser)

    parser = command("ablate", ablate, "train a base and single changes of it, and compare; train.py's flags after --")
    parser.add_argument(
        "--change", action="append", required=True, metavar="NAME:FLAG[=VALUE]", help="a name, and one flag of train.py"
    )
    add_comparison_flags(parser)

    parser = command("speed", speed, "what a sample costs")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="batch sizes to try")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")

    seed = "first of their noise: none that is scored"
    parser = command("time_grid", time_grid, "search a sampler's times for a model")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model with its times")
    parser.add_argument("--nfe", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--count", type=int, default=64, help="noise samples, one half to search and one to check on")
    parser.add_argument("--seed", type=int, default=CHOOSING_SEED, help=seed)
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")

    for name, what in (
        ("smoothing", "choose how strongly samples are smoothed: lowest distance to training images"),
        ("sharpening", "the same for sharpening; after smoothing"),
        ("asking", "the same for the part of late jumps that the network is asked for; after both"),
    ):
        parser = command(name, partial(choose, name), what)
        parser.add_argument("--checkpoint", type=Path, required=True)
        parser.add_argument("--out", type=Path, required=True, help=f"folder for the model with its {name}")
        parser.add_argument("--nfe", type=int, nargs="+", default=[2, 4] if name == "asking" else NFES)
        parser.add_argument("--count", type=int, default=128, help="samples of each")
        parser.add_argument("--seed", type=int, default=CHOOSING_SEED, help=seed)
        parser.add_argument("--data_root", default=DATA_ROOT)
        parser.add_argument("--split_dir", default="data")
        parser.add_argument("--features", help=FEATURES)
        parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")

    parser = command("reference", reference, "write a split's images as a folder")
    parser.add_argument("--out", required=True)
    parser.add_argument("--data_root", default=DATA_ROOT)
    parser.add_argument("--split_dir", default="data")
    parser.add_argument("--split", choices=("val", "train"), default="val")
    parser.add_argument("--size", type=int, default=64)

    ours, base = split_flags(OURS)
    args = root.parse_args(ours)
    args.base = base
    if args.base and args.run is not ablate:
        root.error(f"nothing of {' '.join(args.base)} is for this command")
    args.run(args)


if __name__ == "__main__":
    with one_line_errors():
        main()
