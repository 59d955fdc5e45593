"""The official base code: verified against its hashes, never written half."""

import hashlib
import subprocess
import sys

import pytest

from src.submission import base_code
from src.utils import UserError


@pytest.fixture
def official(workdir, monkeypatch):
    """A stand-in for a clone of the base code, and a manifest that fits it."""
    clone = workdir / "clone"
    manifest = {}
    for name in ("src/network.py", "data/train_split.txt", "data/val_split.txt", "sampling.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(f"{name}\n")
        manifest[name] = {"sha256": hashlib.sha256(f"{name}\n".encode()).hexdigest()}
    monkeypatch.setattr(base_code, "MANIFEST", manifest)
    return clone


def test_base_code_is_brought_with_its_splits(official, workdir):
    base_code.bring(official)
    assert (workdir / "base_code/src/network.py").read_text() == "src/network.py\n"
    assert (workdir / "data/val_split.txt").read_text() == "data/val_split.txt\n"
    assert base_code.faults(workdir / "base_code") == []


def test_altered_or_missing_files_are_named_and_nothing_is_written(official, workdir):
    (official / "sampling.py").write_text("altered\n")
    (official / "data/val_split.txt").unlink()
    message = "data/val_split.txt is missing; sampling.py is not the official file"
    with pytest.raises(UserError, match=message):
        base_code.bring(official)
    assert not (workdir / "base_code").exists() and not (workdir / "data").exists()


def test_without_a_connection_there_is_one_line(workdir, script_env):
    env = {**script_env, "https_proxy": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-m", "src.submission", "base-code"], cwd=workdir, env=env, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1 and "--from DIR" in result.stderr


def test_the_official_splits_match_the_table(shared):
    for split in ("train", "val"):
        digest = hashlib.sha256((shared / f"data/split/{split}_split.txt").read_bytes()).hexdigest()
        assert digest == base_code.MANIFEST[f"data/{split}_split.txt"]["sha256"]


def test_no_official_file_is_ours():
    """Our files of the same name are written afresh."""
    root = base_code.Path(base_code.__file__).resolve().parents[2]
    ours = [name for name in base_code.MANIFEST if (root / name).is_file() and name.endswith(".py")]
    assert len(ours) > 8
    for name in ours:
        digest = hashlib.sha256((root / name).read_bytes()).hexdigest()
        empty = hashlib.sha256(b"").hexdigest()
        assert digest == empty or digest != base_code.MANIFEST[name]["sha256"], name
