"""What a submission holds, in the challenge's structure, laid out in a folder of its own."""

import json
import shutil
from pathlib import Path

from src.errors import UserError
from src.files import write_json
from src.submission.base_code import MANIFEST, faults, needed, sha256
from src.training.export import TARGET
from src.utils import NFES, objective_of, read_checkpoint, read_config

SCRIPTS = ("custom_model.py", "train.py", "dataset.py", "sampling.py", "measure_fid.py")
FROZEN = [name for name, official in MANIFEST.items() if official["frozen"]]
# Our own files under the frozen names, and the list of packages, as this project ships them.
SHIPPED = json.loads((Path(__file__).parent / "shipped_sha256.json").read_text())
CONFIG = TARGET.with_name("model_config.json")
REQUIRED = (*SCRIPTS, "requirements.txt", *FROZEN, str(TARGET), str(CONFIG))
WRITEUP = "writeup.pdf"
SHOWN = 32  # sample images of each NFE that a final submission carries


def lay_out(root: Path, tree: Path, checkpoint: Path, writeup: Path | None) -> bool:
    """Copy what will be zipped from the project `root` into the new folder `tree`.

    The root's scripts, `src/` without the packer itself, the splits, the checkpoint and its config; where `base_code/`
    is there, its frozen files over ours. A final submission also has its write-up and sample images.

    Args:
        checkpoint: becomes checkpoints/best_model.pt; its config is the `model_config.json` beside it.
        writeup: a PDF, for a final submission; None: a mid-term one.
    Returns: whether the frozen files are the official ones.
    Raises: UserError if base_code/ is there, but not the official base code.
    """
    packer = root / "src/submission"
    for path in [*root.glob("*.py"), *(root / "src").rglob("*")]:
        parts = path.relative_to(root).parts
        hidden = any(part == "__pycache__" or part.startswith(".") for part in parts)
        if path.is_file() and not hidden and packer not in path.parents:
            _copy(path, tree / path.relative_to(root))
    copied = {
        "requirements.txt": root / "requirements.txt",
        "references.bib": root / "references.bib",
        **{name: root / name for name in FROZEN if name.startswith("data/")},
        str(TARGET): checkpoint,
        str(CONFIG): checkpoint.with_name("model_config.json"),
    }
    if writeup:
        copied[WRITEUP] = writeup
        for nfe in NFES:
            images = sorted((root / f"samples/nfe={nfe}").glob("[!.]*.png"))[:SHOWN]
            copied |= {f"samples/nfe={nfe}/{image.name}": image for image in images}
    for name, path in copied.items():
        if path.is_file():
            _copy(path, tree / name)

    config = tree / CONFIG
    if config.is_file() and checkpoint.is_file() and checkpoint.resolve() != (root / TARGET).resolve():
        write_json(config, read_config(config) | objective_of(read_checkpoint(checkpoint)))
        shutil.copystat(checkpoint.with_name("model_config.json"), config)  # samples must not be older than it either

    official = root / "base_code"
    if not official.is_dir():
        return False
    if altered := faults(official, needed()):
        raise UserError(
            f"base_code/ is not the official base code ({'; '.join(altered)}): delete it, and fetch it again with "
            "`python -m src.submission base-code`"
        )
    for name in FROZEN:
        _copy(official / name, tree / name)
    return True


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)  # with its date: samples must not be older than the checkpoint


def altered_files(root: Path) -> list[str]:
    """The project's frozen files that are neither the official ones nor as this project ships them, and its changed
    list of the TAs' packages (the official one pins nothing)."""
    fits = {name: {SHIPPED.get(name), MANIFEST[name]["sha256"]} for name in FROZEN}
    fits["requirements.txt"] = {SHIPPED["requirements.txt"]}
    return [name for name, known in fits.items() if (root / name).is_file() and sha256(root / name) not in known]


def write_manifest(tree: Path, **facts) -> None:
    """`manifest.json` in `tree`: the facts, and every file's hash and size."""
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    listed = {str(path.relative_to(tree)): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in files}
    write_json(tree / "manifest.json", {**facts, "files": listed})
