"""The TAs' environment: which packages a submission may import, and whether they are the ones at work here."""

import ast
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHON = (3, 10)
TOOLS = {"pip", "setuptools"}  # in every environment; torch 2.6 asks for the latter from Python 3.12 on
# Ways by which pretrained weights come into a program.
PRETRAINED = (
    "torch.hub",
    "torchvision.models",
    "lpips",
    "load_state_dict_from_url",
    "from_pretrained",
    "hf_hub_download",
)


def pins(requirements: Path) -> dict[str, str]:
    """Package -> version of a file of `name==version` lines."""
    lines = [line.split("#")[0].strip() for line in requirements.read_text().splitlines()]
    return dict(line.split("==") for line in lines if "==" in line)


def deviations(pinned: dict[str, str]) -> list[str]:
    """In which this interpreter differs from the TAs' environment."""
    found = []
    if sys.version_info[:2] != PYTHON:
        found.append(f"Python {sys.version_info[0]}.{sys.version_info[1]} instead of {PYTHON[0]}.{PYTHON[1]}")
    for name, wanted in pinned.items():
        try:
            here = version(name)
        except PackageNotFoundError:
            here = "missing"
        if here.split("+")[0] != wanted:
            found.append(f"{name} {here} instead of {wanted}")
    return found


def provided_modules(pinned: dict[str, str]) -> set[str]:
    """Top-level modules of the standard library, of the pinned packages, and of all that these need."""
    modules = set(sys.stdlib_module_names)
    known, waiting = set(), [*TOOLS, *pinned]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in known:
            continue
        known.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        tops = {path.parts[0] for path in package.files or [] if path.suffix in (".py", ".so")}
        modules |= {top.split(".")[0] for top in tops if not top.startswith("..")}
        needs = [Requirement(text) for text in package.requires or []]
        waiting += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return modules


def imported(path: Path) -> list[str]:
    """Full names of the modules that a file imports, `from a import b` as a and a.b; relative ones keep their dots."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [module, *(f"{module}.{alias.name}".replace("..", ".") for alias in node.names if node.module)]
    return found


def foreign_imports(tree: Path, provided: set[str]) -> list[str]:
    """`file: module` for each import that neither the TAs' environment nor the submission has."""
    found = []
    for path in sorted(tree.rglob("*.py")):
        name = path.relative_to(tree)
        try:
            modules = imported(path)
        except SyntaxError as error:
            found.append(f"{name}: is no valid Python (line {error.lineno})")
            continue
        for module in dict.fromkeys(module.split(".")[0] for module in modules if not module.startswith(".")):
            here = (tree / module).is_dir() or (tree / f"{module}.py").is_file()
            if not here and module not in provided:
                found.append(f"{name}: {module}")
    return found


def pretrained_uses(tree: Path) -> list[str]:
    """`file: what` for each way to pretrained weights that a submission's code has."""
    found = []
    for path in sorted(tree.rglob("*.py")):
        try:
            names = set(imported(path))
            nodes = ast.walk(ast.parse(path.read_text()))
        except SyntaxError:
            continue
        for node in nodes:
            if isinstance(node, ast.Attribute):
                names.add(ast.unparse(node))
            elif isinstance(node, ast.Name):
                names.add(node.id)
        for way in PRETRAINED:
            if any(name == way or name.endswith(f".{way}") or name.startswith(f"{way}.") for name in names):
                found.append(f"{path.relative_to(tree)}: {way}")
    return found
