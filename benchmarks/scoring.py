"""Scoring three folders of samples: three runs of clean-fid as measure_fid.py uses it, against one of ours.

    python -m benchmarks.scoring --generated samples/nfe=1 samples/nfe=2 samples/nfe=4 --reference REF --features FILE

Both take the same feature network, and the loading workers and batches of measure_fid.py. clean-fid embeds the samples
and the references in each run; we embed the references once, and from then on read them from the cache. Prints the
times, their ratio the first time and later, and the largest relative difference of a distance.
"""

import argparse
import time

import torch
from cleanfid import fid

from src.errors import one_line_errors
from src.evaluation.distances import frechet_distance
from src.evaluation.features import folder_features, load_features, loading_workers, official_inception
from src.evaluation.reference import image_files
from src.utils import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generated", nargs=3, required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--features", help="TorchScript network; left out, the official Inception network")
    parser.add_argument("--device", default="cuda", help="without CUDA: the CPU")
    args = parser.parse_args()
    device = pick_device(args.device)
    features = load_features(args.features or official_inception(), device)
    counts = [len(image_files(folder)) for folder in (*args.generated, args.reference)]

    layers = torch.jit.load(args.features or official_inception(), map_location=device).float().eval().layers

    def clean_fid(folder: str):
        network = lambda x: layers((x - 128) / 128).flatten(1)  # noqa: E731 (as clean-fid calls its own)
        return fid.get_folder_features(
            folder, network, num_workers=loading_workers(64), batch_size=64, device=device, mode="clean"
        )

    began = time.perf_counter()
    theirs = [fid.fid_from_feats(clean_fid(folder), clean_fid(args.reference)) for folder in args.generated]
    middle = time.perf_counter()
    reference = folder_features(args.reference, features, device)
    embedded = time.perf_counter()
    found = [folder_features(folder, features, device) for folder in args.generated]
    ours = [frechet_distance(one, reference) for one in found]
    ended = time.perf_counter()
    first, later = (middle - began) / (ended - middle), (middle - began) / (ended - embedded)
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    print(f"images {counts}: clean-fid {middle - began:.0f} s, ours {ended - middle:.0f} s, ratio {first:.2f}; "
          f"with the references cached {ended - embedded:.0f} s, ratio {later:.2f}")  # fmt: skip
    print(
        f"{features.distance}: {', '.join(f'{value:.4f}' for value in ours)}; largest relative difference {apart:.1e}"
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
