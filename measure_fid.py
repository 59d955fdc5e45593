"""FID between generated images and the validation images: `python measure_fid.py --generated_dir samples/nfe=1`."""

import argparse
import os
import sys
from pathlib import Path

from cleanfid import fid

from dataset import SimpsonsDataModule
from src.evaluation.features import load_features, official_inception
from src.evaluation.reference import image_files, write_reference
from src.images import DATA_ROOT
from src.utils import UserError, one_line_errors, pick_device, write_json

REFERENCE = "./data/simpsons_64x64/val"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--generated_dir", required=True)
    parser.add_argument("--reference_dir", default=REFERENCE, help="written from the validation split if missing")
    parser.add_argument("--data_root", default=DATA_ROOT)
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--output_path",
        default="./fid_results.json",
        help="the latest score; one named after the generated folder is kept beside it",
    )
    return parser.parse_args()


def prepare_reference(data_root: str, reference_dir: str) -> None:
    """Write the validation images unless they are there; UserError if the default folder is not whole."""
    if not Path(reference_dir).exists():
        write_reference(SimpsonsDataModule(root=data_root).val_ds, reference_dir)
    names = {path.name for path in image_files(reference_dir)}
    split = Path("data/val_split.txt")
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
    prepare_reference(args.data_root, args.reference_dir)
    network = official_inception()
    if (name := load_features(network, device).distance) != "FID":  # refuses a damaged download
        print(f"warning: {network} is not the official network: the number below is {name}, no FID", file=sys.stderr)

    print(f"{len(generated)} images in {args.generated_dir} against {args.reference_dir} on {device}")
    score = fid.compute_fid(
        args.generated_dir,
        args.reference_dir,
        device=device,
        batch_size=args.batch_size,
        num_workers=min(4, os.cpu_count() or 1),
    )
    print(f"FID Score: {score:.4f}")
    result = {"fid_score": float(score), "generated_dir": args.generated_dir, "reference_dir": args.reference_dir}
    output = Path(args.output_path)
    write_json(output, result)
    # The next NFE's score replaces that file, as the challenge has it; this one stays.
    folder = Path(args.generated_dir).resolve()
    write_json(output.with_name(f"{output.stem}_{folder.parent.name}_{folder.name}{output.suffix}"), result)
    print(f"saved to {output}")


if __name__ == "__main__":
    with one_line_errors():
        main()
