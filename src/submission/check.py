"""The challenge's self-evaluation list, carried out on a laid-out submission: one line each, with its remedy."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from src.errors import UserError
from src.evaluation.failures import nearest
from src.evaluation.features import OFFICIAL
from src.faces import write_dataset
from src.images import read_rgb, split_paths, to_pixels
from src.submission import environment
from src.submission.base_code import LOADER
from src.submission.contents import CONFIG, REQUIRED, WRITEUP, altered_files
from src.training.export import TARGET
from src.utils import NFES, tensor_to_pil_image
from writeup.pages import keyword

LIMIT = 256  # MiB: one float32 checkpoint of the network fits, two do not
SOURCES = {".py", ".json"}  # what belongs in src/: weights come under many endings
TOLERANCE = 0.01  # of a network call: what a sampler may compute beside the network
OLDER = f"older than {TARGET} or the config beside it"
COPY = 0.05  # root mean square of pixels in [0, 1]; the nearest pair of different faces here is 0.1 apart


class Line(NamedTuple):
    verdict: str  # "pass", "FAIL", or "unproven": not fit to be tested here
    name: str
    told: str


def passed(name: str, told: str) -> Line:
    return Line("pass", name, told)


def failed(name: str, told: str) -> Line:
    return Line("FAIL", name, told)


def unproven(name: str, told: str) -> Line:
    return Line("unproven", name, told)


class Subject(NamedTuple):
    """What is handed in, and what it is checked with."""

    root: Path  # the project
    checkpoint: Path
    written: Path | None  # the write-up of a final submission; None: a mid-term one
    data_root: Path
    split_dir: Path
    device: str


@dataclass
class Submission:
    """A submission laid out in `tree`; scripts run in a copy of it below `work`."""

    subject: Subject
    tree: Path
    work: Path
    official: bool  # are the frozen files the official ones?
    nfes: tuple[int, ...] = NFES
    samples: int = 4  # for each NFE

    def __post_init__(self):
        requirements = self.subject.root / "requirements.txt"
        self.pins = environment.pins(requirements) if requirements.is_file() else {}
        self.provided = environment.provided_modules(self.pins)
        self.facts: dict = {}  # what the probe saw

    @property
    def drawn(self) -> Path:
        """Where the check's own samples are."""
        return self.work / "drawn"

    def probe(self, *steps: str, **task) -> tuple[dict, str]:
        """Run steps of `probe.py` in a copy of the tree, which scripts may write to: what it saw, what was printed."""
        copy = self.work / "submission"
        if not copy.is_dir():
            shutil.copytree(self.tree, copy)
        with tempfile.TemporaryDirectory() as folder:
            task |= {"steps": steps, "provided": sorted(self.provided), "facts": f"{folder}/facts.json"}
            Path(folder, "task.json").write_text(json.dumps(task))
            env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            result = subprocess.run(
                [sys.executable, Path(__file__).with_name("probe.py"), copy, f"{folder}/task.json"],
                cwd=copy, env={**env, "PYTHONDONTWRITEBYTECODE": "1"},
                capture_output=True, text=True,
            )  # fmt: skip
            facts = Path(task["facts"])
            lines = result.stderr.strip().splitlines() or ["no word of why"]
            return (json.loads(facts.read_text()) if facts.is_file() else {"died": lines[-1]}), result.stderr


def files(s: Submission) -> Iterator[Line]:
    missing = [name for name in REQUIRED if not (s.tree / name).is_file()]
    remedies = {str(TARGET): "python -m src.submission export RUN", "data/": "python -m src.submission base-code"}
    if missing:
        told = [f"{name} ({remedy})" for name in missing for key, remedy in remedies.items() if name.startswith(key)]
        told += [name for name in missing if not any(name.startswith(key) for key in remedies)]
        if str(CONFIG) in missing:
            told[told.index(str(CONFIG))] += " (it must lie beside the checkpoint: export writes both)"
        yield failed("files", f"missing: {', '.join(told)}")
    else:
        yield passed("files", "all that the challenge requires is there")


def frozen(s: Submission) -> Iterator[Line]:
    if altered := altered_files(s.subject.root):
        remedy = f"git checkout -- {' '.join(altered)}"
        if any(name.startswith("data/") for name in altered):
            remedy = "python -m src.submission base-code brings the official splits; git checkout undoes the rest"
        yield failed("frozen files", f"altered: {', '.join(altered)}; {remedy}")
    elif s.official:
        yield passed("frozen files", "the official ones, by their hashes, lie over ours")
    else:
        yield unproven("frozen files", "ours, unaltered; for the official ones: python -m src.submission base-code")


def packages(s: Submission) -> Iterator[Line]:
    if different := environment.deviations(s.pins):
        yield unproven("environment", f"not the TAs': {'; '.join(different)}; make one with Python 3.10: "
                       "rm -rf .venv; make test PYTHON=python3.10")  # fmt: skip
    else:
        yield passed("environment", f"Python 3.10 and the TAs' {len(s.pins)} pinned packages")


def imports(s: Submission) -> Iterator[Line]:
    if foreign := environment.foreign_imports(s.tree, s.provided):
        yield failed("imports", f"not in the TAs' environment, nor in src/: {'; '.join(foreign)}")
    else:
        count = len(list(s.tree.rglob("*.py")))
        yield passed("imports", f"{count} files import the TAs' packages and one another, nothing else")


def pretrained(s: Submission) -> Iterator[Line]:
    found = environment.pretrained_uses(s.tree)
    found += [
        f"{path.relative_to(s.tree)}, neither {' nor '.join(sorted(SOURCES))}"
        for path in sorted((s.tree / "src").rglob("*"))
        if path.is_file() and path.suffix not in SOURCES
    ]
    if found:
        yield failed("from scratch", f"a way to pretrained weights, which no submission may use: {'; '.join(found)}")
    else:
        yield passed("from scratch", "no pretrained weights, and no code that fetches any")


def size(s: Submission) -> Iterator[Line]:
    total = sum(path.stat().st_size for path in s.tree.rglob("*") if path.is_file()) / 2**20
    told = f"{total:.0f} MiB, of at most {LIMIT}"
    if total > LIMIT:
        yield failed("size", f"{told}; export with --dtype float16, and keep the weights once")
    else:
        yield passed("size", told)


def model(s: Submission) -> Iterator[Line]:
    """The checkpoint, its config, its network, and the sampler, all seen by the probe."""
    loader, whose = (s.subject.root / "base_code", "the official") if s.official else (s.tree, "our")
    s.facts, _ = s.probe(
        "inspect", "sample", loader=str((loader / LOADER).resolve()), checkpoint=str(TARGET), config=str(CONFIG),
        device=s.subject.device, samples=s.samples, nfes=s.nfes, save_dir=str(s.drawn),
    )  # fmt: skip
    facts = s.facts
    reason = _reason(facts.get("inspect failed") or facts.get("died", ""))
    prefixes = [
        p
        for p in ("_orig_mod.", "module.")
        if any(key.startswith(p) or f".{p}" in key for key in facts.get("keys", []))
    ]
    if prefixes:
        reason = f"its keys carry {prefixes[0]!r}, from torch.compile or DDP; export the unwrapped model. {reason}"
    if not facts.get("loaded"):
        yield failed("checkpoint", f"{TARGET} does not load: {reason}; python -m src.submission export RUN")
    elif "finite" not in facts:
        yield failed("network", f"{TARGET} loads, but its model is not the challenge's: {reason}")
    elif not facts["finite"]:
        yield failed("checkpoint", f"{TARGET} holds numbers that are not finite: export an earlier one")
    else:
        yield passed(
            "checkpoint", f"loads strictly on the CPU by {whose} load_model, and its config rebuilds the model"
        )
        if facts["challenge_network"] and not facts["beyond"]:
            yield passed("network", f"the challenge's U-Net, {facts['parameters']:,} parameters, and no other")
        else:
            told = f"{facts['parameters']:,} parameters in the U-Net, {facts['beyond']:,} beyond it"
            yield failed("network", f"not the challenge's ({told}): train without --unet small, and add no network")

    for nfe in s.nfes:
        seen = facts.get("nfe", {}).get(str(nfe))
        name = f"NFE {nfe}"
        if seen is None:
            reason = _reason(
                facts.get("sample failed") or facts.get("died") or "the checkpoint does not load, see above"
            )
            yield failed(name, f"sampling.py made no images: {reason}")
            return
        calls = max(seen["calls"], seen["arithmetic"], key=lambda found: abs(found - nfe))
        if abs(calls - nfe) > TOLERANCE * nfe:
            yield failed(name, f"{calls:.2f} network calls an image, by counting calls and arithmetic: make it {nfe}")
        else:
            yield passed(name, f"sampling.py calls the network exactly {nfe} times an image")


def _reason(error: str) -> str:
    return " ".join(error.split())[:300] or "no reason given"


def flat(image: Image.Image) -> np.ndarray:
    """An RGB image's values in [0, 1], [height * width * 3]."""
    return np.asarray(image).reshape(-1).astype(np.float32) / 255


def dull(drawn: list[list[np.ndarray]]) -> list[str]:
    """What tells that a network did not draw images, for each NFE some `flat` ones."""
    faults = []
    if min(np.stack(images).reshape(len(images), -1, 3).std(1).max(1).min() for images in drawn) < 0.02:
        faults.append("some are of one colour: the model has learnt nothing, or its weights are damaged")
    if any(len(np.unique(images, axis=0)) < len(images) for images in drawn):
        faults.append("different noise gives the same image: the sampler does not draw its noise")
    return faults


def shared(drawn: list[list[np.ndarray]]) -> list[str]:
    """What tells that images of one NFE are another's, for each NFE some `flat` ones."""
    seen = [{image.tobytes() for image in images} for images in drawn]
    distinct = len(set.union(*seen)) == sum(map(len, seen))
    return [] if distinct else ["images of different NFEs are the same: they are not this model's"]


def pictures(paths: list[Path]) -> tuple[list[np.ndarray], list[str]]:
    """Those of the files that are 64x64 RGB images, `flat`, and what is wrong with the others."""
    drawn, faults = [], []
    for path in paths:
        name = f"{path.parent.name}/{path.name}"
        try:
            with Image.open(path) as image:
                if image.size == (64, 64) and image.mode == "RGB":
                    drawn.append(flat(image))
                else:
                    faults.append(f"{name} is {image.width}x{image.height} {image.mode}")
        except (OSError, SyntaxError):  # what Pillow raises for broken files
            faults.append(f"{name} cannot be read")
    return drawn, faults


def images(s: Submission) -> Iterator[Line]:
    if any(not (s.drawn / f"nfe={nfe}").is_dir() for nfe in s.nfes):
        yield failed("images", "there are none to look at, see above")
        return
    faults, drawn = [], []
    for nfe in s.nfes:
        paths = sorted((s.drawn / f"nfe={nfe}").glob("*.png"))
        if [path.name for path in paths] != [f"{i:04d}.png" for i in range(s.samples)]:
            faults.append(f"nfe={nfe} holds {len(paths)} images instead of {s.samples}")
        found, unfit = pictures(paths)
        drawn.append(found)
        faults += unfit
    if faults := faults or dull(drawn):
        yield failed("images", f"{'; '.join(faults[:3])}; they must be 64x64 RGB, each of its own noise")
        return
    values = np.concatenate(drawn)
    yield passed("images", f"{len(values)} images, 64x64 RGB, none of one colour, no two of one NFE alike")
    try:
        paths = split_paths(s.subject.data_root, "train", s.subject.split_dir)
    except UserError as error:
        yield unproven("not copied", f"no training images to compare with: {error}")
        return
    pixels = to_pixels(64)
    train = np.stack([pixels(read_rgb(path)).permute(1, 2, 0).numpy() for path in paths]) * 0.5 + 0.5
    both = np.concatenate([train, train[:, :, ::-1]]).reshape(2 * len(train), -1)
    distance = nearest(values, both)[1] / values.shape[1] ** 0.5
    told = f"the nearest of {len(train):,} training images, or their mirror images, is {distance.min():.3f} away"
    if distance.min() < COPY:
        yield failed("not copied", f"{told} (root mean square): a sampler must not hold training images")
    else:
        yield passed("not copied", f"{told} (root mean square of pixels)")


def evaluation(s: Submission) -> Iterator[Line]:
    if not OFFICIAL.is_file():
        yield unproven("measure_fid", f"no Inception network at {OFFICIAL}: python measure_fid.py fetches it")
        return
    try:
        val = split_paths(s.subject.data_root, "val", s.tree / "data")
    except UserError as error:
        yield unproven("measure_fid", f"no official validation images: {error}")
        return
    reference = s.work / "reference"
    reference.mkdir()
    for path in val[:64]:  # enough to see that it runs
        tensor_to_pil_image(to_pixels(64)(read_rgb(path))).save(reference / path.name)
    flags = ["--generated_dir", str(s.drawn / f"nfe={s.nfes[-1]}"), "--reference_dir", str(reference)]
    flags += ["--data_root", str(s.subject.data_root), "--device", s.subject.device]
    facts, printed = s.probe("run", command=["measure_fid.py", *flags, "--output_path", str(s.work / "fid.json")])
    score = next((line for line in printed.splitlines() if line.startswith("FID Score: ")), None)
    if score is None:
        yield failed("measure_fid", f"it gave no score: {_reason(facts.get('run failed') or facts.get('died', ''))}")
    else:
        yield passed("measure_fid", f"runs ({s.samples} images: too few for the number to mean anything)")


def training(s: Submission) -> Iterator[Line]:
    faces, run = s.work / "faces", s.work / "trained"
    write_dataset(faces, train=8, val=4, size=64)
    flags = ["--data_root", str(faces), "--split_dir", str(faces), "--save_dir", str(run), "--device", s.subject.device]
    facts, _ = s.probe("run", command=["train.py", *flags, "--num_iterations", "1", "--batch_size", "2"])
    left = [name for name in ("final_model.pt", "last.ckpt", "model_config.json") if not (run / name).is_file()]
    if facts or left:
        reason = facts.get("run failed") or facts.get("died") or f"{', '.join(left)} missing"
        yield failed("train.py", f"does not train a step from scratch: {_reason(reason)}")
    else:
        yield passed("train.py", "trains a step from scratch, on built-in faces, and leaves its checkpoints")


def dated(s: Submission) -> float:
    """When what samples and write-up tell of was made: the checkpoint, and the config with its filters."""
    return max((path.stat().st_mtime for path in (s.tree / TARGET, s.tree / CONFIG) if path.is_file()), default=0)


def samples(s: Submission) -> Iterator[Line]:
    """Those of a final submission."""
    if not s.subject.written:
        return
    folders = {f"samples/nfe={nfe}": sorted((s.tree / f"samples/nfe={nfe}").glob("*.png")) for nfe in NFES}
    short = [folder for folder, paths in folders.items() if len(paths) < 8]
    if short:
        yield failed("samples", f"fewer than 8 images in {', '.join(short)}: python sampling.py")
    elif min(path.stat().st_mtime for paths in folders.values() for path in paths) < dated(s):
        yield failed("samples", f"samples/ is {OLDER}: python sampling.py")
    else:
        drawn, unfit = zip(*map(pictures, folders.values()), strict=True)
        if faults := [fault for some in unfit for fault in some]:
            yield failed("samples", f"{'; '.join(faults[:3])}; they must be 64x64 RGB: python sampling.py")
        elif faults := dull(drawn) or shared(drawn):
            yield failed("samples", f"in samples/ {'; '.join(faults)}: python sampling.py")
        else:
            told = "none of one colour, no two of one NFE alike, not older than the checkpoint and its config"
            yield passed("samples", f"images of NFE 1, 2 and 4, 64x64 RGB, {told}")


def written(s: Submission) -> Iterator[Line]:
    """The write-up of a final submission."""
    if not s.subject.written:
        return
    if not (s.tree / WRITEUP).is_file():
        yield failed("write-up", "missing: python writeup/build.py RUN")
        return
    if (s.tree / WRITEUP).stat().st_mtime < dated(s):
        yield failed("write-up", f"{OLDER}: python writeup/build.py RUN, of a new report")
    try:
        from src.submission import writeup  # reads PDFs and bibliographies, which no TA needs to
    except ModuleNotFoundError as error:
        yield failed("write-up", f"cannot be judged without {error.name}: pip install -r requirements-dev.txt")
        return
    model = keyword(s.facts["weights"], s.facts["sampler"]) if "weights" in s.facts else ""
    found = writeup.judge(s.tree / WRITEUP, s.subject.root / "references.bib", s.facts.get("provenance", {}), model)
    for name, fault, told in found:
        yield failed(name, fault) if fault else passed(name, told)


CHECKS = (files, frozen, packages, imports, pretrained, size, model, images, evaluation, training, samples, written)
