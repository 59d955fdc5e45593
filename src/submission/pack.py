"""A submission's zip: checked, in the challenge's structure, the same bytes for the same input, proven by unpacking."""

import dataclasses
import re
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

from src.errors import UserError
from src.files import replacing
from src.submission.check import CHECKS, Line, Subject, Submission
from src.submission.contents import lay_out, write_manifest
from src.training.export import TARGET


def check(subject: Subject, folder: Path, team: str) -> tuple[Submission, list[Line]]:
    """Lay the submission out below `folder` and carry out every check, printing each line as soon as it is known."""
    tree, work = folder / "laid-out" / team, folder / "work"
    work.mkdir(parents=True)
    official = lay_out(subject.root, tree, subject.checkpoint, subject.written)
    submission = Submission(subject, tree, work, official)
    lines = []
    for one in CHECKS:
        for line in one(submission):
            print(f"{line.verdict:9} {line.name:14} {line.told}", flush=True)
            lines.append(line)
    return submission, lines


def pack(subject: Subject, team: str, out: Path) -> None:
    """Check, then write `out`, whose one folder is named after the team.

    Raises: UserError if a check fails, naming it, or the unpacked zip does not sample; then nothing is written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", team):
        raise UserError(f"--team {team!r}: letters, digits, '-', '_' and '.' alone, for it names a folder")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file in it, as {out / 'submission.zip'}")
    with tempfile.TemporaryDirectory() as temporary:
        submission, lines = check(subject, Path(temporary), team)
        if bad := [line.name for line in lines if line.verdict == "FAIL"]:
            raise UserError(f"nothing packed: {', '.join(bad)} failed, with their remedies above")
        kind = "final" if subject.written else "mid-term"
        write_manifest(submission.tree, team=team, kind=kind, official_files=submission.official)
        with replacing(out) as partial:
            write_zip(submission.tree, partial)
            prove(submission, partial, Path(temporary) / "proof")
    print(f"{out}: {out.stat().st_size / 2**20:.0f} MiB; unpacked, it sampled two images")


def write_zip(tree: Path, target: Path) -> None:
    """Zip the folder `tree`, in the order of names, without dates or owners; checkpoints and images uncompressed."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(path for path in tree.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(str(Path(tree.name) / path.relative_to(tree)), date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            packed = path.suffix in (".pt", ".png", ".pdf")
            entry.compress_type = zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED
            with path.open("rb") as source, archive.open(entry, "w") as sink:
                while block := source.read(2**22):
                    sink.write(block)


def prove(submission: Submission, archive: Path, folder: Path) -> None:
    """Unpack, and sample two images with what came out; UserError if that fails."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder / "unpacked")
    (tree,) = (folder / "unpacked").iterdir()
    unpacked = dataclasses.replace(submission, tree=tree, work=folder)
    flags = ["--ckpt_path", str(TARGET), "--save_dir", str(unpacked.drawn), "--device", submission.subject.device]
    facts, _ = unpacked.probe("run", command=["sampling.py", *flags, "--nfe_list", "4", "--num_samples", "2"])
    images = sorted(unpacked.drawn.rglob("*.png"))
    if facts or len(images) != 2 or any(Image.open(image).size != (64, 64) for image in images):
        raise UserError(f"the unpacked zip does not sample ({facts or f'{len(images)} images'}): nothing was written")
