"""The TAs' environment: which packages a submission may import, and whether they are the ones at work here."""

import ast
import sys
from collections.abc import Container
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHON = (3, 10)
TOOLS = {"pip", "setuptools"}  # in every environment; torch 2.6 asks for the latter from Python 3.12 on
# Ways by which pretrained weights come into a program; clean-fid's Inception is for scores alone.
PRETRAINED = """torch.hub torch.utils.model_zoo torchvision.models torchvision.get_model lpips load_state_dict_from_url
    from_pretrained hf_hub_download kagglehub.model_download cleanfid src.evaluation""".split()
# Where networks that score belong: clean-fid's, and ours, which training may call for its scores alone.
SCORES = {"cleanfid": ("measure_fid.py", "src/evaluation/")}
SCORES["src.evaluation"] = (*SCORES["cleanfid"], "train.py")


def pins(requirements: Path) -> dict[str, str]:
    """Package -> version of a file of `name==version` lines."""
    lines = [line.split("#")[0].split(";")[0].partition("==") for line in requirements.read_text().splitlines()]
    return {name.strip(): version.strip() for name, equals, version in lines if equals}


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


def parsed(path: Path) -> ast.Module | None:
    """A file's syntax tree; None if it is no valid Python."""
    try:
        return ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError):
        return None


def made_optional(tree: ast.Module) -> set[int]:
    """The ids of the nodes that a `try` makes optional, should an import of theirs fail."""
    return {
        id(node)
        for attempt in ast.walk(tree)
        if isinstance(attempt, ast.Try)
        and any(
            f"{kind}Error" in ast.unparse(handler.type or handler)
            for handler in attempt.handlers
            for kind in ("Import", "ModuleNotFound")
        )
        for statement in attempt.body
        for node in ast.walk(statement)
    }


def imported(tree: ast.Module, package: tuple[str, ...], without: Container[int] = ()) -> dict[str, str]:
    """Imported name -> the name it goes by: `import a.b as c` gives a.b: c, `from a import b` a: a and a.b: b.

    Args:
        package: the folders that the file lies in, from which relative imports start.
        without: the ids of nodes to leave out.
    """
    found = {}
    for node in ast.walk(tree):
        if id(node) in without:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name: alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            found[module] = module
            found |= {f"{module}.{alias.name}": alias.asname or alias.name for alias in node.names}
    return found


def foreign_imports(folder: Path, provided: set[str]) -> list[str]:
    """`file: module` for each import that neither the TAs' environment nor the submission has."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        tree = parsed(path)
        if tree is None:
            found.append(f"{name} is no valid Python")
            continue
        for module in imported(tree, name.parent.parts, without=made_optional(tree)):
            parts = module.split(".")
            if (folder / parts[0]).is_dir() or (folder / f"{parts[0]}.py").is_file():
                # A name imported from one of the submission's modules is an attribute of it; what must exist is that.
                known = any(_is_module(folder, parts[:count]) for count in (len(parts), len(parts) - 1) if count)
                if not known:
                    found.append(f"{name}: {module}")
            elif parts[0] not in provided:
                found.append(f"{name}: {parts[0]}")
    return list(dict.fromkeys(found))


def _is_module(folder: Path, parts: list[str]) -> bool:
    path = folder.joinpath(*parts)
    return path.is_dir() or path.with_name(f"{path.name}.py").is_file()


def pretrained_uses(folder: Path) -> list[str]:
    """`file: what` for each way to pretrained weights that a submission's code has."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        tree, name = parsed(path), path.relative_to(folder).as_posix()
        if tree is None:
            continue
        modules = imported(tree, path.relative_to(folder).parent.parts)
        aliases = {alias: full for full, alias in modules.items()}
        stars = [module.removesuffix("*") for module in modules if module.endswith(".*")]
        names = set(modules)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Name):
                used = ast.unparse(node)
                first, dot, rest = used.partition(".")
                names |= {aliases.get(first, first) + dot + rest, *(star + used for star in stars)}
        for way in PRETRAINED:
            if name.startswith(SCORES.get(way, ())):
                continue
            if any(f".{way}." in f".{used}." for used in names):
                found.append(f"{name}: {way}")
    return found
