"""Imports run one way, and what a submission runs imports nothing beyond the TAs' environment."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"src", "custom_model", "dataset", "sampling", "measure_fid", "train", "writeup"}
SHARED = {"src.errors", "src.files", "src.utils"}
# Who may import whom, of our own rooms; a file not named here is checked by its folder.
ALLOWED = {
    "src/module.py": set(),
    "src/network.py": {"src.module"},
    "src/base_model.py": set(),
    "src/errors.py": set(),
    "src/files.py": set(),
    "src/utils.py": SHARED,
    "src/objectives": {"src.objectives", "src.module", *SHARED},
    "src/filters.py": set(),
    "src/quantise.py": SHARED,
    "src/images.py": SHARED,
    "src/faces.py": SHARED,
    "src/training/fusing.py": {"src.module"},
    "src/training": {"src.objectives.contract", "src.training", "src.images", "src.quantise", *SHARED},
    "src/evaluation": {"src.evaluation", "src.images", "src.objectives", "custom_model", *SHARED},
    "src/submission": {
        "src.submission",
        "src.evaluation",
        "src.training.export",
        "src.faces",
        "src.images",
        "writeup.pages",
        *SHARED,
    },
    "src/submission/probe.py": {"custom_model", "src.network", *SHARED},
    "writeup": set(),
    "custom_model.py": {"src.base_model", "src.filters", "src.network", "src.objectives", "src.quantise", *SHARED},
    "dataset.py": {"src.images", *SHARED},
    "sampling.py": {"custom_model", *SHARED},
    "measure_fid.py": {"dataset", "src.evaluation", "src.images", *SHARED},
    "train.py": OURS,
}
PROVIDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "scipy": "scipy",
    "PIL": "pillow",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
    "cleanfid": "clean-fid",
    "kagglehub": "kagglehub",
}
FILES = [*ROOT.glob("*.py"), *(ROOT / "src").rglob("*.py"), *(ROOT / "writeup").glob("*.py")]
# What checks and packs a submission is not in it.
PACKED = [path for path in FILES if not {"submission", "writeup"} & set(path.parts)]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    name = path.relative_to(ROOT).as_posix()
    if name == "src/__init__.py":
        return
    key = max((key for key in ALLOWED if name == key or name.startswith(f"{key}/")), key=len)
    allowed = ALLOWED[key]
    for imported in imports(path):
        if imported.split(".")[0] in OURS:
            assert any(imported == room or imported.startswith(f"{room}.") for room in allowed), f"{name}: {imported}"


def test_only_the_tas_environment_is_imported():
    pinned = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}
    for path in PACKED:
        for imported in {name.split(".")[0] for name in imports(path)} - OURS - set(sys.stdlib_module_names):
            assert PROVIDED[imported] in pinned, f"{path}: {imported}"
