"""The submission check: a sound one passes, and each way to spoil one is caught by its line, with its remedy."""

import json
import os
import re
import shutil
import sys
import venv
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typst
from PIL import Image

from custom_model import create_custom_model
from src.errors import UserError
from src.faces import write_dataset
from src.images import read_rgb
from src.submission import base_code, contents, environment, pack, writeup
from src.submission import check as checking
from src.submission.__main__ import main
from src.utils import save_model
from writeup.pages import counted

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"objective": "alpha_flow", "use_additional_condition": True}
STAGES = [{"objective": "alpha_flow", "steps": 10, "citations": ["zhang2025alphaflow", "luo2025soflow"]}]
PROVENANCE = {"stages": STAGES, "citations": ["ho2020denoising", "simpsons2018"]}
WRITEUP = """
#set page(paper: "a4")
= Technical details
We train alpha-Flow.
= Training details
The loss falls for 3.5 hours.
= Qualitative evidence
Early samples: #image("face.png")
= References
AlphaFlow: Understanding and Improving MeanFlow Models. SoFlow: Solution Flow Models for One-Step Generative Mod-
eling. Denoising Diffusion Probabilistic Models. arXiv:2006.11239. Simpsons Faces.
"""


def typeset(source: str, target: Path) -> None:
    (target.parent / "writeup.typ").write_text(source)
    typst.compile(target.parent / "writeup.typ", output=target)


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """A project ready to be packed: our sources, a full U-Net's checkpoint, a write-up, samples, faces as data."""
    root = tmp_path_factory.mktemp("sound") / "project"
    root.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt", ROOT / "references.bib"]:
        shutil.copyfile(path, root / path.name)
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    write_dataset(root / "data", train=24, val=8, size=64)
    torch.manual_seed(0)
    model = create_custom_model(**CONFIG)
    with torch.no_grad():  # the last layers start near zero
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_model(model.half(), str(root / "checkpoints/best_model.pt"), CONFIG, provenance=PROVENANCE)
    face = next((root / "data").glob("*.png"))
    for k, nfe in enumerate((1, 2, 4)):
        (root / f"samples/nfe={nfe}").mkdir(parents=True)
        for i, sample in enumerate(sorted((root / "data").glob("*.png"))[8 * k : 8 * k + 8]):
            shutil.copyfile(sample, root / f"samples/nfe={nfe}/{i:04d}.png")
    shutil.copyfile(face, root / "face.png")
    typeset(WRITEUP, root / "writeup.pdf")
    return root


@pytest.fixture
def project(sound, tmp_path, monkeypatch) -> Path:
    """A copy to spoil. Its splits, of built-in faces, stand for the official ones, which are not ours to commit."""
    root = tmp_path / "project"
    shutil.copytree(sound, root, copy_function=os.link)
    splits = {f"data/{name}_split.txt": contents.sha256(root / f"data/{name}_split.txt") for name in ("train", "val")}
    monkeypatch.setattr(contents, "SHIPPED", contents.SHIPPED | splits)
    return root


def rewrite(path: Path, text: str) -> None:
    """Write a file anew: the copy's files are links to the sound one's."""
    path.unlink(missing_ok=True)
    path.write_text(text)


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    rewrite(path, text.replace(old, new, 1))


def resaved(project: Path, change) -> None:
    """The checkpoint with a changed state dict."""
    path = project / contents.TARGET
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = change(saved["state_dict"])
    path.unlink()
    torch.save(saved, path)


def small(project: Path) -> None:
    model = create_custom_model(**CONFIG, unet="small").half()
    for name in ("best_model.pt", "model_config.json"):
        (project / "checkpoints" / name).unlink()
    config = {**CONFIG, "unet": "small"}
    save_model(model, str(project / "checkpoints/best_model.pt"), config, provenance=PROVENANCE)


def truncated(project: Path) -> None:
    path = project / contents.TARGET
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.unlink()
    path.write_bytes(half)


def in_sampler(code: str):
    """A sabotage of the sampler: `code` before its return."""

    def change(project: Path) -> None:
        old = "        return traj if return_traj else x\n"
        replaced(project / "custom_model.py", old, f"{code}\n{old}")

    return change


OPTIONAL = "import json\ntry:\n    from lpips import LPIPS\nexcept ImportError:\n    pass"
STAR = "import json\nfrom torchvision import *\nmake = lambda: models.resnet18()"
INCEPTION = "evaluation.features import official_inception"
YELLOW = "        x = x * 0 + torch.tensor([1.0, 0.7, -0.9])[:, None, None]"
HIDDEN_CALL = """
        import copy
        hidden = copy.copy(self.network)
        hidden.__class__ = type("Other", (torch.nn.Module,), dict(vars(UNet)))
        x = x - 0 * hidden(x, t * 0, t * 0)"""
MEMORISED = """
        import numpy as np
        from PIL import Image
        paths = sorted(__import__("pathlib").Path("FOLDER").glob("*.png"))[: len(x)]
        faces = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        x = torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2) / 127.5 - 1"""


def memorised(project: Path) -> None:
    first = (project / "data/train_split.txt").read_text().split()[:2]
    for name in first:
        (project / "src/pictures").mkdir(exist_ok=True)
        read_rgb(project / f"data/{name}.png").save(project / f"src/pictures/{name}.png")
    in_sampler(MEMORISED.replace("FOLDER", "src/pictures"))(project)


def doubled(project: Path) -> None:
    path = project / contents.TARGET
    saved = torch.load(path, weights_only=True)
    path.unlink()
    twice = {name: value.float() for name, value in saved["state_dict"].items()}
    torch.save({**saved, "state_dict": twice, "ema": {k: v.clone() for k, v in twice.items()}}, path)


def spoiled_writeup(old: str, new: str):
    def change(project: Path) -> None:
        (project / "writeup.pdf").unlink()
        assert old in WRITEUP
        typeset(WRITEUP.replace(old, new), project / "writeup.pdf")

    return change


# name: (what spoils it, the line that catches it, a part of what that tells)
STATIC = {
    "no config": (lambda p: (p / contents.CONFIG).unlink(), "files", "checkpoints/model_config.json (it must lie"),
    "no checkpoint": (lambda p: (p / contents.TARGET).unlink(), "files", "src.submission export RUN"),
    "no split file": (lambda p: (p / "data/val_split.txt").unlink(), "files", "src.submission base-code"),
    "altered sampling.py": (
        lambda p: replaced(p / "sampling.py", "seed_everything(args.seed)", "seed_everything(7)"),
        "frozen files",
        "git checkout -- sampling.py",
    ),
    "altered U-Net": (
        lambda p: replaced(p / "src/network.py", "dropout", "drop_out"),
        "frozen files",
        "altered: src/network.py",
    ),
    "another split": (
        lambda p: rewrite(p / "data/train_split.txt", "1\n2\n"),
        "frozen files",
        "python -m src.submission base-code brings",
    ),
    "a requirement more": (
        lambda p: replaced(p / "requirements.txt", "tqdm==", "einops==0.8.0\ntqdm=="),
        "frozen files",
        "altered: requirements.txt",
    ),
    "a foreign library": (
        lambda p: replaced(p / "custom_model.py", "import math", "import einops\nimport math"),
        "imports",
        "custom_model.py: einops",
    ),
    "a file left out": (
        lambda p: ((p / "tricks").mkdir(), replaced(p / "train.py", "import json", "import json\nimport tricks.best")),
        "imports",
        "train.py: tricks",
    ),
    "a syntax error": (
        lambda p: rewrite(p / "src/objectives/shortcut.py", "class Shortcut(:\n"),
        "imports",
        "shortcut.py is no valid Python",
    ),
    "a pretrained network": (
        lambda p: replaced(p / "train.py", "import json", "import json\nfrom torchvision.models import resnet18"),
        "from scratch",
        "train.py: torchvision.models",
    ),
    "a pretrained network by another name": (
        lambda p: replaced(
            p / "train.py", "import json", "import json\nimport torchvision as tv\nmake = lambda: tv.models.resnet18()"
        ),
        "from scratch",
        "train.py: torchvision.models",
    ),
    "Inception in training": (
        lambda p: replaced(p / "train.py", "import json", "import json\nfrom cleanfid import fid"),
        "from scratch",
        "train.py: cleanfid",
    ),
    "a pretrained network, should there be one": (
        lambda p: replaced(p / "train.py", "import json", OPTIONAL),
        "from scratch",
        "train.py: lpips",
    ),
    "a pretrained network behind a star": (
        lambda p: replaced(p / "train.py", "import json", STAR),
        "from scratch",
        "train.py: torchvision.models",
    ),
    "our Inception in training": (
        lambda p: replaced(p / "custom_model.py", "import math\n", f"import math\nfrom src.{INCEPTION}\n"),
        "from scratch",
        "custom_model.py: src.evaluation",
    ),
    "our Inception as a neighbour": (
        lambda p: replaced(p / "src/objectives/critics.py", "import torch\n", f"import torch\nfrom ..{INCEPTION}\n"),
        "from scratch",
        "src/objectives/critics.py: src.evaluation",
    ),
    "a module that is not packed": (
        lambda p: replaced(p / "train.py", "import json", "import json\nfrom src.submission.contents import FROZEN"),
        "imports",
        "train.py: src.submission.contents",
    ),
    "a network from a hub": (
        lambda p: replaced(p / "custom_model.py", "import math\n", "import math\nload = torch.hub.load\n"),
        "from scratch",
        "custom_model.py: torch.hub",
    ),
    **{
        f"more weights, {ending}": (
            lambda p, ending=ending: (p / f"src/prior{ending}").write_bytes(b"0" * 64),
            "from scratch",
            f"src/prior{ending}, neither .json nor .py",
        )
        for ending in (".safetensors", ".h5", ".pt.gz", ".PT", "")
    },
    "weights twice": (doubled, "size", "export with --dtype float16"),
    "no write-up": (lambda p: (p / "writeup.pdf").unlink(), "write-up", "python writeup/build.py RUN"),
    "a damaged write-up": (lambda p: rewrite(p / "writeup.pdf", "no PDF"), "write-up", "no readable PDF"),
    "a three-page write-up": (
        spoiled_writeup("= Qualitative", "#pagebreak() more #pagebreak()\n= Qualitative"),
        "write-up pages",
        "3 pages before the references end",
    ),
    "a word about references on page one": (
        spoiled_writeup("We train", "The validation references. #pagebreak() #pagebreak() We train"),
        "write-up pages",
        "3 pages before the references end",
    ),
    "an unknown teacher": (
        lambda p: rewrite(p / "unknown", ""),
        "citations",
        "does not tell how all of it was trained",
    ),
    "small samples": (
        lambda p: (own_copy(p / "samples/nfe=1/0000.png"), tiny_picture(p / "samples/nfe=1/0000.png")),
        "samples",
        "nfe=1/0000.png is ",
    ),
    "letter paper": (spoiled_writeup('"a4"', '"us-letter"'), "write-up pages", "page 1 is not A4"),
    "the template's names": (
        spoiled_writeup("We train", "Few-step generation: Team\nname. We train"),
        "write-up names",
        "still Team name: edit writeup/text.typ",
    ),
    "no training time": (spoiled_writeup("for 3.5 hours", "for long"), "write-up parts", "total training time"),
    "no early samples": (spoiled_writeup("Early samples", "Samples"), "write-up parts", "samples from early training"),
    "no pictures": (spoiled_writeup('#image("face.png")', ""), "write-up parts", "pictures"),
    "a method not cited": (spoiled_writeup("SoFlow: Solution Flow", "Some"), "citations", "luo2025soflow (SoFlow"),
    "references in latin-1": (
        lambda p: own_copy(p / "references.bib").write_bytes(b"@misc{a, title={\xe9}}"),
        "citations",
        "references.bib cannot be read",
    ),
    "no samples": (lambda p: shutil.rmtree(p / "samples/nfe=2"), "samples", "python sampling.py"),
    "seven samples": (
        lambda p: (p / "samples/nfe=4/0007.png").unlink(),
        "samples",
        "fewer than 8 images in samples/nfe=4",
    ),
    "stale samples": (
        lambda p: os.utime(own_copy(p / "samples/nfe=1/0000.png"), (0, 0)),
        "samples",
        "older than checkpoints/best_model.pt",
    ),
    "samples of other filters": (
        lambda p: os.utime(own_copy(p / contents.CONFIG)),
        "samples",
        "older than checkpoints/best_model.pt or the config",
    ),
    "samples all alike": (
        lambda p: [shutil.copyfile(p / "face.png", own_copy(path)) for path in (p / "samples/nfe=2").iterdir()],
        "samples",
        "in samples/ different noise gives the same image",
    ),
    "samples of one NFE as another's": (
        lambda p: shutil.copyfile(p / "samples/nfe=1/0003.png", own_copy(p / "samples/nfe=4/0005.png")),
        "samples",
        "in samples/ images of different NFEs are the same",
    ),
    "a sample of one colour": (
        lambda p: Image.new("RGB", (64, 64), "red").save(own_copy(p / "samples/nfe=4/0003.png")),
        "samples",
        "in samples/ some are of one colour",
    ),
    "a write-up of another model": (
        spoiled_writeup('#set page(paper: "a4")', '#set page(paper: "a4")\n#set document(keywords: "model 4567")'),
        "write-up model",
        "of another model than the checkpoint, or of other filters",
    ),
    "a stale write-up": (
        lambda p: os.utime(own_copy(p / "writeup.pdf"), (0, 0)),
        "write-up",
        "older than checkpoints/best_model.pt",
    ),
}
RUNNING = {
    "wrong keys": (
        lambda p: resaved(p, lambda state: {name.replace("head", "start"): v for name, v in state.items()}),
        "checkpoint",
        "does not load",
    ),
    "keys of torch.compile": (
        lambda p: resaved(p, lambda s: {name.replace("network.", "network._orig_mod."): v for name, v in s.items()}),
        "checkpoint",
        "'_orig_mod.', from torch.compile",
    ),
    "keys of DDP": (
        lambda p: resaved(p, lambda state: {f"module.{name}": v for name, v in state.items()}),
        "checkpoint",
        "'module.', from torch.compile or DDP",
    ),
    "a truncated checkpoint": (truncated, "checkpoint", "does not load"),
    "a foreign config": (
        lambda p: rewrite(p / contents.CONFIG, json.dumps({**CONFIG, "width": 3})),
        "checkpoint",
        "unknown model setting 'width'",
    ),
    "weights that are not finite": (
        lambda p: resaved(p, lambda s: s | {"network.head.bias": s["network.head.bias"] * torch.nan}),
        "checkpoint",
        "not finite",
    ),
    "a small U-Net": (small, "network", "train without --unet small"),
    "another dropout": (
        lambda p: replaced(p / "custom_model.py", "num_res_blocks=4, dropout=0.1", "num_res_blocks=4, dropout=0.3"),
        "network",
        "not the challenge's",
    ),
    "a network beside the U-Net": (
        lambda p: replaced(
            p / "custom_model.py", "        self.image_size = image_size\n",
            "        self.image_size = image_size\n        self.temperature = torch.nn.Parameter(torch.ones(1))\n",
        ) or resaved(p, lambda state: state | {"temperature": torch.ones(1)}),
        "network",
        "1 beyond it",
    ),
    "two calls a step": (in_sampler("        self.predict(x, 0.5, 0.5)"), "NFE 1", "2.00 network calls an image"),
    "a hidden call": (in_sampler(HIDDEN_CALL), "NFE 1", "2.00 network calls an image"),
    "a library behind importlib": (
        in_sampler("        __import__('importlib').import_module('pytest')"),
        "NFE 1",
        "no module named 'pytest' in the TAs' environment",
    ),
    "images of one colour": (in_sampler(YELLOW), "images", "of one colour"),
    "the same image always": (in_sampler("        x = x[:1].expand(x.shape)"), "images", "the same image"),
    "small images": (in_sampler("        x = x[..., ::2, ::2]"), "images", "is 32x32 RGB"),
    "training images": (memorised, "not copied", "must not hold training images"),
    "no training": (
        lambda p: replaced(p / "train.py", "    seed_everything(args.seed)\n", "    seed_everything(args.sed)\n"),
        "train.py",
        "AttributeError: 'Namespace' object has no attribute 'sed'",
    ),
}  # fmt: skip


def own_copy(path: Path) -> Path:
    """The file as one of its own, no longer a link."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


@pytest.fixture
def brief(monkeypatch):
    """Checks that sample two images at one call each."""
    monkeypatch.setattr(pack, "Submission", partial(checking.Submission, nfes=(1,), samples=2))


def subject(project: Path, written: Path | None = Path("writeup.pdf")) -> checking.Subject:
    return checking.Subject(project, contents.TARGET, written, project / "data", project / "data", "cpu")


def lines(project: Path, tmp_path: Path, monkeypatch, checks) -> dict[str, checking.Line]:
    monkeypatch.chdir(project)
    monkeypatch.setattr(pack, "CHECKS", checks)
    _, found = pack.check(subject(project), tmp_path / "check", "team")
    return {line.name: line for line in found}


def tiny_picture(path: Path) -> None:
    read_rgb(path).resize((32, 32)).save(path)


def provenance_known(submission):
    """In the place of `model`, for checks that run nothing."""
    spoilt = (submission.subject.root / "unknown").exists()
    unknown = [{"objective": "unknown", "steps": 0, "citations": []}] if spoilt else []
    submission.facts = {"provenance": {**PROVENANCE, "stages": STAGES + unknown}, "weights": "0123", "sampler": {}}
    return iter(())


@pytest.mark.parametrize("name", STATIC)
def test_spoiled_submissions_are_caught_unrun(name, project, tmp_path, monkeypatch):
    spoil, line, told = STATIC[name]
    spoil(project)
    checks = [one for one in checking.CHECKS if one.__name__ not in ("model", "images", "evaluation", "training")]
    found = lines(project, tmp_path, monkeypatch, [provenance_known, *checks])
    assert found[line].verdict == "FAIL" and told in found[line].told, found
    others = {one.name for one in found.values() if one.verdict == "FAIL"} - {line}
    # What is spoilt may be missing too, or newer than what was made of it.
    assert others <= {"files", "samples", "write-up"}, others


@pytest.mark.parametrize("name", RUNNING)
def test_spoiled_submissions_are_caught_running(name, project, tmp_path, monkeypatch, brief):
    spoil, line, told = RUNNING[name]
    spoil(project)
    checks = (checking.training,) if line == "train.py" else (checking.model, checking.images)
    found = lines(project, tmp_path, monkeypatch, checks)
    assert found[line].verdict == "FAIL" and told in found[line].told, found


def test_a_sound_submission_is_packed_and_proven(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(project)
    monkeypatch.setattr(pack, "Submission", partial(checking.Submission, samples=2))
    out = tmp_path / "out/submission.zip"
    pack.pack(subject(project), "team-7", out)
    printed = capsys.readouterr().out
    assert "FAIL" not in printed and "it sampled two images" in printed

    shutil.unpack_archive(out, tmp_path / "unpacked")
    tree = tmp_path / "unpacked/team-7"
    held = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert {*contents.REQUIRED, "writeup.pdf", "manifest.json", "samples/nfe=4/0000.png"} <= held
    assert not any("submission" in name or "__pycache__" in name for name in held)
    manifest = json.loads((tree / "manifest.json").read_text())
    assert manifest["kind"] == "final" and set(manifest["files"]) == held - {"manifest.json"}
    assert all(contents.sha256(tree / name) == entry["sha256"] for name, entry in manifest["files"].items())
    # The checks leave nothing in what is packed, and without them the zip is the same.
    monkeypatch.setattr(pack, "CHECKS", ())
    monkeypatch.setattr(pack, "prove", lambda *_: None)  # once is enough
    pack.pack(subject(project), "team-7", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == out.read_bytes()


def test_nothing_is_packed_when_a_check_fails(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    (project / contents.CONFIG).unlink()
    monkeypatch.setattr(pack, "CHECKS", (checking.files,))
    with pytest.raises(UserError, match="nothing packed: files failed"):
        pack.pack(subject(project, None), "team", tmp_path / "out.zip")
    with pytest.raises(UserError, match="--team 'a/b'"):
        pack.pack(subject(project, None), "a/b", tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


def test_pins_are_read_with_blanks_markers_and_remarks(tmp_path):
    told = "torch == 2.6.0\ntqdm==4.67.1 ; python_version=='3.10'\n# an==other\nnumpy>=2 ; python_version=='3.10'\n"
    (tmp_path / "requirements.txt").write_text(told)
    assert environment.pins(tmp_path / "requirements.txt") == {"torch": "2.6.0", "tqdm": "4.67.1"}


def test_pack_refuses_a_folder_before_it_checks(project, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "check", None)
    for out in (Path("."), tmp_path):
        with pytest.raises(UserError, match="is a folder: name a file in it"):
            pack.pack(subject(project, None), "team", out)


@pytest.mark.parametrize("command", [["check"], ["pack", "--team", "a"]])
def test_what_is_no_project_is_not_checked(workdir, monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["src.submission", *command, "--device", "cpu"])
    with pytest.raises(UserError, match="this folder has no custom_model.py and src/: run it in the project's"):
        main()
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "told",
    ["3.5 hours", "22 H200-minutes", "9 GPU·h", "a 25-minute session on one H200", "two days", "half a day",
     "90~min", "12 device hours", "eight GPU days", "about an hour", "a day", "18,000 seconds"],
)  # fmt: skip
def test_a_training_time_is_found(told):
    assert re.search(writeup.PARTS["training details: total training time"], f"It took {told}.", re.I | re.M)


@pytest.mark.parametrize("told", ["a long time", "2. Hours later", "some days", "64x64 images", "a second network"])
def test_what_tells_no_training_time_is_not_taken_for_one(told):
    assert not re.search(writeup.PARTS["training details: total training time"], f"It took {told}.", re.I | re.M)


@pytest.mark.parametrize("name", ["sound", "mirrored", "grey", "too few"])
def test_images_are_looked_at_one_by_one(name, faces, tmp_path):
    faces_of = [(faces / f"{split}_split.txt").read_text().split() for split in ("train", "val")]
    drawn = tmp_path / "drawn/nfe=1"
    drawn.mkdir(parents=True)
    for i, face in enumerate(faces_of[1][: 1 if name == "too few" else 2]):
        image = read_rgb(faces / f"{face}.png")
        image.convert("L" if name == "grey" and i else "RGB").save(drawn / f"{i:04d}.png")
    if name == "mirrored":
        read_rgb(faces / f"{faces_of[0][3]}.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(drawn / "0001.png")
    s = SimpleNamespace(
        drawn=tmp_path / "drawn", nfes=(1,), samples=2, subject=SimpleNamespace(data_root=faces, split_dir=faces)
    )
    failed = {line.name: line.told for line in checking.images(s) if line.verdict == "FAIL"}
    expected = {
        "mirrored": ("not copied", "must not hold training images"),
        "grey": ("images", "nfe=1/0001.png is 64x64 L"),
        "too few": ("images", "nfe=1 holds 1 images instead of 2"),
    }
    line, told = expected.get(name, (None, ""))
    assert set(failed) == {line} - {None} and told in failed.get(line, ""), failed


def test_no_hidden_or_compiled_sources_are_laid_out(project, tmp_path):
    for name in ("src/.secret.py", "src/__pycache__/utils.pyc", "src/.idea/workspace.json"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("of an editor")
    contents.lay_out(project, tmp_path / "tree", contents.TARGET, None)
    held = {path.relative_to(tmp_path / "tree").as_posix() for path in (tmp_path / "tree/src").rglob("*")}
    assert "src/utils.py" in held and not [name for name in held if "/." in name or "__pycache__" in name]


def test_a_laid_out_config_names_the_objective_of_its_checkpoint(project, tmp_path):
    (project / "other").mkdir()
    torch.save({"state_dict": {}, "model_config": {"objective": "shortcut"}}, project / "other/early.pt")
    (project / "other/model_config.json").write_text(json.dumps(CONFIG))
    contents.lay_out(project, tmp_path / "tree", project / "other/early.pt", None)
    assert json.loads((tmp_path / "tree" / contents.CONFIG).read_text()) == {**CONFIG, "objective": "shortcut"}


def test_a_heading_may_end_in_a_colon():
    assert counted(["one", "two", "References:\n[1] ..."]) == 2


def test_hidden_files_are_not_laid_out(project, tmp_path):
    (project / "samples/nfe=1/._0000.png").write_bytes(b"of another system")
    contents.lay_out(project, tmp_path / "tree", contents.TARGET, project / "writeup.pdf")
    held = sorted(path.name for path in (tmp_path / "tree/samples/nfe=1").iterdir())
    assert held and held[0] == "0000.png"


def test_what_is_laid_out_keeps_its_dates(project, tmp_path):
    (project / contents.TARGET.parent).rename(project / "other")
    checkpoint = project / "other" / contents.TARGET.name
    contents.lay_out(project, tmp_path / "tree", checkpoint, None)
    for name in (contents.TARGET, contents.CONFIG):
        assert (tmp_path / "tree" / name).stat().st_mtime == (project / "other" / name.name).stat().st_mtime


def test_the_shipped_hashes_are_current():
    changed = [name for name, known in contents.SHIPPED.items() if contents.sha256(ROOT / name) != known]
    assert not changed, f"renew src/submission/shipped_sha256.json: {changed}"


def test_official_files_are_laid_over_ours_or_refused(project, tmp_path, monkeypatch):
    official = {}
    for name in (*contents.FROZEN, base_code.LOADER):
        path = project / "base_code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# official {name}\n")
        official[name] = {"sha256": contents.sha256(path), "frozen": name in contents.FROZEN}
    monkeypatch.setattr(base_code, "MANIFEST", official)
    monkeypatch.chdir(project)
    assert contents.lay_out(project, tmp_path / "tree", contents.TARGET, None)
    assert (tmp_path / "tree/sampling.py").read_text() == "# official sampling.py\n"
    (project / "base_code/dataset.py").write_text("altered")
    with pytest.raises(UserError, match=r"not the official base code \(dataset.py is not the official file\)"):
        contents.lay_out(project, tmp_path / "other", contents.TARGET, None)


def test_check_ends_with_one_line(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    (project / contents.TARGET).unlink()
    monkeypatch.setattr(pack, "CHECKS", (checking.files, checking.size))
    monkeypatch.setattr(sys, "argv", ["src.submission", "check", "--device", "cpu"])
    with pytest.raises(UserError, match="the submission is not ready"):
        main()
    assert "FAIL      files" in capsys.readouterr().out


def test_packages_that_pip_installed_for_the_user_are_found_and_others_hidden(tmp_path, monkeypatch):
    """Without the right to install for all, pip puts packages into ~/.local."""
    venv.create(tmp_path / "venv", system_site_packages=True)  # or Python would not look there
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/bin/python"))
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path / "user"))
    home = tmp_path / f"user/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    home.mkdir(parents=True)
    (home / "tqdm.py").touch()
    (home / "pypdf.py").touch()
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("tqdm", "pypdf"):
        (tree / f"with_{name}.py").write_text(f"import {name}\nassert 'user' in {name}.__file__\n")
    subject = checking.Subject(ROOT, tree / contents.TARGET, None, tree, tree, "cpu")
    submission = checking.Submission(subject, tree, tmp_path, False)
    assert submission.probe("run", command=["with_tqdm.py"])[0] == {}
    (fault,) = submission.probe("run", command=["with_pypdf.py"])[0].values()
    assert "no module named 'pypdf' in the TAs' environment" in fault
