"""Gather on a CPU what a rented GPU needs, so that none of its seconds go into set-up: faces, feature network, wheels.

    python -m benchmarks.prepare --data_root ROOT --split_dir SPLIT --features FILE --python 3.12 --start CHECKPOINT

Writes gpu/env.sh, which each step of benchmarks/gpu_plan.md begins with; gpu/train, what training needs: the training
faces at the training size, wheels of the packages that the machine lacks, and the checkpoint to go on from (with its
model_config.json) in 8 bits, compressed; gpu/score, what scores need beside it: the validation faces, the feature
network in half precision.
"""

import argparse
import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from src.errors import UserError, one_line_errors
from src.files import replacing_folder
from src.images import DATA_ROOT, ensure_root, read_rgb, split_paths, to_pixels
from src.training.export import export
from src.utils import tensor_to_pil_image

# What our code imports beyond PyTorch, torchvision, NumPy, SciPy, Pillow and matplotlib, with what that needs in turn.
# Pinned, because a newer one may need a package that is not here.
WHEELS = """clean-fid==0.1.35 kagglehub==0.3.13 tqdm==4.70.1 packaging==26.3 requests==2.34.2 urllib3==2.8.0 idna==3.20
    certifi==2026.10.18 charset-normalizer==3.5.2 pyyaml==6.0.3""".split()
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
ENVIRONMENT = """\
# Begins every step: packages, faces, the start, where evidence goes. OUT is what is brought back.
set -e -o pipefail
mkdir -p results/faces
needed='import cleanfid.fid, kagglehub, matplotlib.figure, scipy.stats, tqdm, PIL.Image'
if ! python3 -c "$needed" 2>/dev/null; then
  site=results/site
  if [ ! -d $site ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target $site.part gpu/train/wheels/*.whl
    mv $site.part $site
  fi
  export PYTHONPATH="$PWD/$site${{PYTHONPATH:+:$PYTHONPATH}}"
  python3 -c "$needed"
fi
for part in gpu/*/faces; do
  if [ -d $part ]; then cp -r $part/. results/faces; fi
done
if [ -f gpu/train/start.pt.gz ]; then
  cp gpu/train/model_config.json results
  gunzip -c gpu/train/start.pt.gz > results/start.part
  mv results/start.part results/start.pt
fi
mkdir -p results/compiled
export TORCHINDUCTOR_CACHE_DIR="$PWD/results/compiled"
FACES="--data_root results/faces --split_dir results/faces"
FEATURES="--features gpu/score/{features}"
OUT=${{OUT:-results/out}}
mkdir -p "$OUT"
"""


def write_faces(data_root: str, split_dir: str, split: str, size: int, folder: Path) -> None:
    """A split as <id>.png at the training size, which training then reads unchanged, and its file."""
    ensure_root(data_root)
    folder.mkdir(parents=True)
    pixels = to_pixels(size)
    for path in tqdm(split_paths(data_root, split, split_dir), desc=split):
        tensor_to_pil_image(pixels(read_rgb(path))).save(folder / path.name, optimize=True)
    shutil.copyfile(Path(split_dir) / f"{split}_split.txt", folder / f"{split}_split.txt")


def write_features(source: Path, folder: Path) -> str:
    """The TorchScript network in half precision, unless it is already: scoring turns it to single precision again."""
    if not source.is_file():
        raise UserError(f"no feature network at {source}")
    try:
        network = torch.jit.load(source, map_location="cpu")
    except RuntimeError as error:
        raise UserError(f"{source} is no TorchScript network: {str(error).strip().splitlines()[0]}") from error
    folder.mkdir(parents=True, exist_ok=True)
    if all(p.dtype != torch.float32 for p in [*network.parameters(), *network.buffers()]):
        shutil.copyfile(source, folder / source.name)
        return source.name
    name = f"{source.stem}-fp16.pt"
    network.half().save(str(folder / name))
    return name


def download_wheels(python: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    result = subprocess.run([*command, *WHEELS], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"no wheels for Python {python}: {result.stderr.strip().splitlines()[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", default=DATA_ROOT)
    parser.add_argument("--split_dir", default="data")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--features", type=Path, required=True, help="TorchScript network to score with")
    parser.add_argument("--python", help="of the machine with the GPU: tried with 3.12; left out: no wheels")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / "env.sh").exists():
        raise UserError(f"{args.out} holds other files, and would be replaced: name another --out")
    with replacing_folder(args.out) as folder:
        train, score = folder / "train", folder / "score"
        features = write_features(args.features, score)
        for split, part in (("train", train), ("val", score)):
            write_faces(args.data_root, args.split_dir, split, args.size, part / "faces")
        if args.python:
            download_wheels(args.python, train / "wheels")
        if args.start:
            export(args.start.parent, args.start.name, "int8", train / "start.pt")
            with open(train / "start.pt", "rb") as plain, gzip.open(train / "start.pt.gz", "wb") as packed:
                shutil.copyfileobj(plain, packed)
            (train / "start.pt").unlink()
        (folder / "env.sh").write_text(ENVIRONMENT.format(features=features))
    for part in ("train", "score"):
        size = sum(path.stat().st_size for path in (args.out / part).rglob("*") if path.is_file()) / 2**20
        print(f"{args.out / part}: {size:.1f} MiB")


if __name__ == "__main__":
    with one_line_errors():
        main()
