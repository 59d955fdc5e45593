"""FID between generated images and the validation images: `python measure_fid.py --generated_dir samples/nfe=1`."""

import argparse
import glob
import os
import sys
from pathlib import Path

from cleanfid import fid

from dataset import SimpsonsDataModule
from src.errors import UserError, one_line_errors
from src.evaluation.features import load_features, loading_workers, official_inception
from src.evaluation.reference import image_files, refuse_other_size, write_reference
from src.files import write_json
from src.images import DATA_ROOT
from src.utils import pick_device

REFERENCE = "./data/simpsons_64x64/val"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--generated_dir", required=True)
    parser.add_argument("--reference_dir", default=REFERENCE, help="written from the validation split if missing")
    parser.add_argument("--data_root", default=DATA_ROOT)
    parser.add_argument("--split_dir", default="data", help="folder of train_split.txt and val_split.txt")
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--output_path",
        default="./fid_results.json",
        help="the latest score; one named after the generated folder is kept beside it",
    )
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error("--batch_size must be at least 1")
    if not Path(args.output_path).name or Path(args.output_path).is_dir():
        parser.error(f"--output_path {args.output_path} names no file")
    return args


def prepare_reference(data_root: str, split_dir: str, reference_dir: str) -> None:
    """Write the validation images unless they are there; UserError if the default folder is not whole."""
    if not Path(reference_dir).exists():
        other = {} if Path(split_dir) == Path("data") else {"split_dir": split_dir}  # the official one knows no other
        write_reference(SimpsonsDataModule(root=data_root, **other).val_ds, reference_dir)
    names = {path.name for path in image_files(reference_dir)}
    split = Path(split_dir) / "val_split.txt"
    if Path(reference_dir) == Path(REFERENCE) and split.is_file():
        expected = {f"{i:04d}.png" for i in range(len(split.read_text().split()))}
        if names != expected:
            raise UserError(
                f"{reference_dir} is not the {len(expected)} validation images ({len(names & expected)} of them, and "
                f"{len(names - expected)} others): delete it, and it will be written again"
            )


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    generated = image_files(args.generated_dir)
    prepare_reference(args.data_root, args.split_dir, args.reference_dir)
    refuse_other_size(args.generated_dir, args.reference_dir)
    network = official_inception()
    if (name := load_features(network, device).distance) != "FID":  # refuses a damaged download
        print(f"warning: {network} is not the official network: the number below is {name}, no FID", file=sys.stderr)

    print(f"{len(generated)} images in {args.generated_dir} against {args.reference_dir} on {device}")
    score = fid.compute_fid(
        glob.escape(args.generated_dir),  # in whose names clean-fid would see patterns
        glob.escape(args.reference_dir),
        device=device,
        batch_size=args.batch_size,
        num_workers=loading_workers(args.batch_size),
        use_dataparallel=False,  # or it would insist on the first of several GPUs
    )
    print(f"FID Score: {score:.4f}")
    result = {"fid_score": float(score), "generated_dir": args.generated_dir, "reference_dir": args.reference_dir}
    output = Path(args.output_path)
    write_json(output, result)
    # The next NFE's score replaces that file, as the challenge has it; this one stays.
    parts = [part for part in Path(os.path.relpath(args.generated_dir)).parts if part != os.pardir]
    folder = "_".join(parts) or Path.cwd().name
    write_json(output.with_name(f"{output.stem}_{folder}{output.suffix}"), result)
    print(f"saved to {output}")


if __name__ == "__main__":
    with one_line_errors():
        main()
