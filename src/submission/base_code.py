"""The challenge's official base code: fetched, verified, never committed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from src.errors import UserError
from src.files import replacing

REPOSITORY = "https://github.com/KAIST-Visual-AI-Group/Diffusion-2025-Image_Challenge"
MANIFEST = json.loads((Path(__file__).parent / "base_code_sha256.json").read_text())
LOADER = "src/utils.py"  # of the official files, the one with load_model; a team may change its own


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def faults(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """What is missing from, or altered in, a folder that should be the official base code; of `names`, if given."""
    found = []
    for name in MANIFEST if names is None else names:
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif sha256(path) != MANIFEST[name]["sha256"]:
            found.append(f"{name} is not the official file")
    return found


def needed() -> list[str]:
    """The files that a submission is checked with: those that stay as they are, and the loader."""
    return [name for name, official in MANIFEST.items() if official["frozen"] or name == LOADER]


def clone(target: Path) -> None:
    """`git clone` of the public repository; UserError with git's reason if that fails."""
    command = ["git", "-c", "core.autocrlf=false", "clone", "--quiet", "--depth", "1", REPOSITORY, str(target)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"}
        )
        reason = None if result.returncode == 0 else (result.stderr.strip().split("\n")[-1] or "no reason given")
    except FileNotFoundError:
        reason = "git is not installed"
    except subprocess.TimeoutExpired:
        reason = "no answer in five minutes"
    if reason:
        raise UserError(f"could not clone {REPOSITORY} ({reason}): fetch it elsewhere and name it with --from DIR")


def bring(source: Path | None, target: Path = Path("base_code"), data: Path = Path("data")) -> list[str]:
    """Put the verified official files into `target` and the two split files into `data`.

    Args:
        source: a local clone; None: clone the public repository.
    Returns: the files' names. One that no submission is checked with may have changed, and is left out with a warning.
    Raises: UserError naming every other file that is missing or altered; then nothing is written.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if source is None:
            source = Path(temporary) / "clone"
            clone(source)
        if not source.is_dir():
            raise UserError(f"no folder {source}")
        if found := faults(source, needed()):
            raise UserError(f"{source} is not the official base code: {'; '.join(found)}")
        for fault in faults(source):
            print(f"warning: {fault}, and is left out", file=sys.stderr)
        names = [name for name in MANIFEST if not faults(source, [name])]
        for name in names:
            targets = [target / name]
            if name.startswith("data/"):
                targets.append(data / Path(name).name)
            for path in targets:
                with replacing(path) as copy:
                    shutil.copyfile(source / name, copy)
    return names
