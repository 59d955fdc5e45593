"""The two-page write-up from run records."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run_here
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from PIL import Image
from pypdf import PdfReader

from src.evaluation.sampler import save_chosen
from src.submission.probe import inspect
from src.submission.writeup import judge, letters
from writeup.pages import keyword

ROOT = Path(__file__).resolve().parents[1]
OWN_FIGURE = 'failures = [#image("mine.png", width: 9pt)]'


@pytest.fixture(scope="module")
def trained(tmp_path_factory, faces) -> Path:
    """A folder with the write-up's sources, a finished run of two stages, and its report."""
    folder = tmp_path_factory.mktemp("writeup")
    shutil.copytree(ROOT / "writeup", folder / "writeup", ignore=shutil.ignore_patterns("*.pdf", "__pycache__"))
    words = folder / "writeup/text.typ"
    named = words.read_text().replace("[Team name]", "[Nine]").replace("[First Author, Second Author]", "[A, B]")
    words.write_text(named)
    shutil.copyfile(ROOT / "references.bib", folder / "references.bib")
    flags = ["--data_root", str(faces), "--split_dir", str(faces), "--device", "cpu"]
    train = "--unet small --image_size 32 --stages rectified_flow/muon=true:0.5,alpha_flow/alpha=0.25:0.5"
    train += " --num_iterations 4 --batch_size 4 --save_interval 1 --log_interval 1 --save_dir run"
    run_command(folder, "train", *train.split(), *flags)
    mixture = f"mix {folder}/run/final_model.pt {folder}/run/checkpoint_iter_2.pt --share 0.25 --out {folder}/mixed"
    run_command(folder, "src.training", *mixture.split())
    final = folder / "mixed/final_model.pt"  # after four steps noise, for which a search would find no strength
    save_chosen(final, folder / "smooth", "smoothing", {"2": 0.1})
    save_chosen(folder / "smooth/final_model.pt", folder / "run/smooth", "asking", {"2": 0.75})
    return folder


@pytest.fixture
def project(trained, tmp_path, tiny_network, faces) -> Path:
    folder = tmp_path / "project"
    if not (trained / "run/report").is_dir():
        report = "--checkpoint run/smooth/final_model.pt --out run/report --samples 16 --seeds 2 --sweep 1 --device cpu"
        flags = ["--data_root", faces, "--split_dir", faces, "--features", tiny_network]
        run_command(trained, "src.evaluation", "report", *report.split(), *flags)
    shutil.copytree(trained, folder)
    return folder


def run_command(folder: Path, *command) -> None:
    result = run_here(folder, *command)
    assert result.returncode == 0, result.stderr


def build(project: Path, *runs: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "writeup/build.py", *(runs or ["run"])]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


def test_write_up_is_whole_and_keeps_the_teams_words(project):
    words = project / "writeup/text.typ"
    own = words.read_text().replace("[Nine]", "[The Springfield Nine]").replace("failures = []", OWN_FIGURE)
    words.write_text(own)
    Image.new("RGB", (9, 9)).save(project / "writeup/mine.png")
    result = build(project)
    assert result.returncode == 0, result.stderr
    pdf = project / "writeup/writeup.pdf"
    provenance = torch.load(project / "run/smooth/final_model.pt", weights_only=True)["provenance"]
    smooth, facts = project / "run/smooth", {}  # what the report was of, as the check sees it
    files = {"checkpoint": str(smooth / "final_model.pt"), "config": str(smooth / "model_config.json")}
    inspect({"loader": str(ROOT / "src/utils.py"), **files}, facts)
    facts = json.loads(json.dumps(facts))
    assert facts["sampler"]["smoothing"] == {"2": 0.1} and facts["sampler"]["asking"] == {"2": 0.75}
    model = keyword(facts["weights"], facts["sampler"])
    judged = list(judge(pdf, project / "references.bib", provenance, model))
    names = ["write-up model", "write-up pages", "write-up names", "write-up parts", "citations"]
    assert [name for name, _, _ in judged] == names and not any(fault for _, fault, _ in judged)
    for other in (keyword(facts["weights"], {}), keyword("0" * 16, facts["sampler"])):
        (name, fault, _), *_ = judge(pdf, project / "references.bib", provenance, other)
        assert name == "write-up model" and fault
    text = "\n".join(page.extract_text() for page in PdfReader(pdf).pages)
    report = json.loads((project / "run/report/report.json").read_text())
    told = (
        "The Springfield Nine",
        "FD[tiny]",
        "alpha=0.25",
        "24 training images",
        f"{report['nfe']['1']['ratio']:.2f}",
        "training images: 0.75 at NFE 2",
        f"training images: {report['sampler']['smoothing']['2']} at NFE 2",
        "Non-Local Algorithm",
        "with those after stage 1, of these a share of 0.25",
        "Robust Fine-Tuning",
    )
    for words_of in told:
        assert letters(words_of) in letters(text), words_of  # lines may break anywhere
    assert sum(len(page.images) for page in PdfReader(pdf).pages) == 8 + 2 + 1
    assert build(project).returncode == 0 and words.read_text() == own


def test_references_on_a_third_page_and_a_line_cut_short_are_no_fault_names_of_nobody_are(project):
    shutil.copyfile(ROOT / "writeup/text.typ", project / "writeup/text.typ")
    template = project / "writeup/template.typ"
    template.write_text(template.read_text().replace("#bibliography(", "#pagebreak() ~ #pagebreak()\n#bibliography("))
    with (project / "run/metrics.jsonl").open("a") as metrics:
        metrics.write("7")  # a line that was cut short
    result = build(project, "run", "--out", "new/folder/other.pdf")
    pdf = project / "new/folder/other.pdf"
    assert result.returncode == 0, result.stderr
    assert len(PdfReader(pdf).pages) == 3 and "run is a folder" in build(project, "run", "--out", "run").stderr
    faults = {name: fault for name, fault, _ in judge(pdf, project / "references.bib", {})}
    assert faults["write-up pages"] == ""
    assert faults["write-up names"].startswith("still Team name and First Author, Second Author: edit writeup/text.typ")


def scored_as(project: Path, run: str, checkpoint: str) -> dict:
    """The report, as if it were of this checkpoint; its provenance."""
    provenance = torch.load(project / run / checkpoint, weights_only=True)["provenance"]
    content = json.loads((project / "run/report/report.json").read_text())
    if run != "run":
        shutil.copytree(project / "run/report", project / run / "report")
    (project / run / "report/report.json").write_text(json.dumps(content | {"provenance": provenance}))
    return provenance


def test_a_model_of_an_early_stage_is_told_as_it_was_trained(project, faces):
    provenance = scored_as(project, "run", "checkpoint_iter_2.pt")
    assert [(stage["objective"], stage["steps"]) for stage in provenance["stages"]] == [("rectified_flow/muon=true", 2)]
    result = build(project)
    assert result.returncode == 0, result.stderr
    pdf = project / "writeup/writeup.pdf"
    assert [fault for _, fault, _ in judge(pdf, project / "references.bib", provenance)] == [""] * 4
    assert "alpha=0.25" not in letters("".join(page.extract_text() for page in PdfReader(pdf).pages))

    # Another run goes on from it.
    train = "--unet small --image_size 32 --objective shortcut --teacher run/checkpoint_iter_2.pt --save_dir second"
    flags = ["--data_root", faces, "--split_dir", faces, "--num_iterations", "1", "--batch_size", "4", "--seed", "7"]
    run_command(project, "train", *train.split(), *flags, "--log_interval", "1", "--device", "cpu")
    provenance = scored_as(project, "second", "final_model.pt")
    assert [stage["objective"] for stage in provenance["stages"]] == ["rectified_flow/muon=true", "shortcut"]
    result = build(project, "run", "second")
    assert result.returncode == 0, result.stderr
    told = letters("".join(page.extract_text() for page in PdfReader(pdf).pages))
    optimisers = "Muon for hidden layers (where the stage says muon) and AdamW"
    assert letters(f"{optimisers}, seed 42, times uniform, then seed 7, times uniform") in told
    assert "second began with another run's model" in build(project, "second").stderr
    report = project / "second/report/report.json"  # of a version that knew no Muon
    report.write_text(report.read_text().replace('"muon": false, ', ""))
    assert "muon" in report.read_text() and build(project, "run", "second").returncode == 0
    shutil.copytree(project / "run", project / "twin")  # but for its seed, which the teacher tells
    record = json.loads((project / "twin/run.json").read_text())
    (project / "twin/run.json").write_text(json.dumps({**record, "seed": 43}))
    assert "second did not begin with the run named before it" in build(project, "twin", "second").stderr
    assert "is of another model than twin trained" in build(project, "twin", "--report", "run/report").stderr
    assert "second did not begin with the run named before it" in build(project, "run", "second", "second").stderr


@pytest.mark.parametrize(
    "stage, told",
    [({"lr_decay_start": 5}, "0.0001"), ({"lr_decay_start": 4}, "0.0001, falling"), ({}, "0.0001"),
     ({"lr_decay_start": 5, "options": {"steady": 0.5}}, "0.0001, falling")],
)  # fmt: skip
def test_a_rate_that_fell_is_told_so(stage, told, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "writeup"))  # as for a script
    trained = {"objective": "shortcut", "steps": 5, "batch_size": 2, "lr": 1e-4, "citations": ["some"], **stage}
    assert importlib.import_module("build").stages([trained], "\n  shortcut: ", {"some"})[0]["lr"] == told


def test_the_loss_curve_ends_where_the_next_run_or_the_scored_model_took_over(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "writeup"))  # as for a script
    stage = {"steps": 9, "batch_size": 2}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "images": 2 * step, "loss": 1.0, "stage": 0} for step in range(1, 10)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken = [{**stage, "steps": 3}], [{**stage, "steps": 3}, {**stage, "steps": 4}]
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **how: drawn.append(list(x)) or [Line2D([], [])])
    runs, records = [tmp_path / "first", tmp_path / "second"], [{"teacher": None}, {"teacher": {"stages": taken[0]}}]
    importlib.import_module("build").plot_losses(runs, records, taken[1], tmp_path / "loss.svg")
    assert drawn[1::2] == [[2, 4, 6], [8, 10, 12, 14]]  # of smoothed and raw curves the raw


def test_a_run_that_goes_on_from_a_mixture_tells_of_it(project, faces):
    train = "--unet small --image_size 32 --objective shortcut --teacher mixed/final_model.pt --save_dir second"
    flags = ["--data_root", faces, "--split_dir", faces, "--num_iterations", "1", "--batch_size", "4"]
    run_command(project, "train", *train.split(), *flags, "--log_interval", "1", "--device", "cpu")
    provenance = scored_as(project, "second", "final_model.pt")
    assert provenance["stages"][1]["mixed"] == {"share": 0.25, "stages": 1}
    result = build(project, "run", "second")
    assert result.returncode == 0, result.stderr
    pdf = project / "writeup/writeup.pdf"
    assert [fault for _, fault, _ in judge(pdf, project / "references.bib", provenance)] == [""] * 4
    text = "".join(page.extract_text() for page in PdfReader(pdf).pages)
    assert letters("with those after stage 1, of these a share of 0.25") in letters(text)


def test_a_run_of_other_objectives_is_told(project):
    def git(*command: str) -> str:
        settings = ("user.name=a", "user.email=a@b", "commit.gpgsign=false", "core.hooksPath=/dev/null")
        command = ["git", *(part for one in settings for part in ("-c", one)), *command]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout.strip()

    told = "warning: run trained the objectives of commit"
    changed(project, lambda r: [s["environment"].update(commit="unknown", clean_tree=False) for s in r["sessions"]])
    warned = build(project).stderr
    assert told in warned and "may differ from its commit" not in warned  # without a repository nobody knows
    text = "".join(page.extract_text() for page in PdfReader(project / "writeup/writeup.pdf").pages)
    assert "commit unknown)" in " ".join(text.split())
    code = project / "src/objectives/some.py"
    code.parent.mkdir(parents=True)
    code.write_text("a = 1\n")
    git("init", "-q")
    git("add", "src")
    git("commit", "-qm", "some")
    code_of = {"commit": git("rev-parse", "HEAD"), "clean_tree": True}
    changed(project, lambda r: [s["environment"].update(code_of) for s in r["sessions"]])
    assert build(project).stderr == ""
    changed(project, lambda r: [s["environment"].update(clean_tree=False) for s in r["sessions"]])
    assert "warning: run was trained with code that may differ from its commit" in build(project).stderr
    changed(project, lambda r: [s["environment"].update(code_of) for s in r["sessions"]])
    code.write_text("a = 2\n")
    result = build(project)
    assert result.returncode == 0 and told in result.stderr


def changed(project: Path, change) -> None:
    """The run's record and, alike, where its report says the model comes from; but for a stage that is gone."""
    path, report = project / "run/run.json", project / "run/report/report.json"
    record, scored = json.loads(path.read_text()), json.loads(report.read_text())
    before = len(record["stages"])
    change(record)
    path.write_text(json.dumps(record))
    if len(record["stages"]) == before:
        scored["provenance"]["stages"] = record["stages"]
        report.write_text(json.dumps(scored))


def in_bfloat16(report: Path) -> None:
    report.write_text(json.dumps(json.loads(report.read_text()) | {"bf16": True}))


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda p: (p / "run/report/farthest.png").unlink(), "the figure run/report/farthest.png is missing"),
        (lambda p: (p / "run/iter=2_sample_1.png").unlink(), "the figure run/iter=2_sample_1.png is missing"),
        (lambda p: shutil.rmtree(p / "run/report"), "src.evaluation report --checkpoint checkpoints/best_model.pt"),
        (lambda p: in_bfloat16(p / "run/report/report.json"), "draws float32 ones: write it without --bf16"),
        (lambda p: (p / "run/metrics.jsonl").unlink(), "the loss curve's run/metrics.jsonl is missing"),
        (lambda p: changed(p, lambda r: r["stages"][0].update(citations=[])), "rectified_flow cites nothing"),
        (lambda p: changed(p, lambda r: r["stages"].pop()), "is of another model than run trained"),
        (lambda p: changed(p, lambda r: r["stages"][0].update(citations=["who"])), "references.bib has no entry who"),
        (lambda p: changed(p, lambda r: r["stages"][0].update(objective="magic")), "does not describe magic"),
        (lambda p: changed(p, lambda r: r.update(teacher={"stages": []})), "began with another run's model"),
        (lambda p: changed(p, lambda r: r.pop("citations")), "is of an older version"),
        (lambda p: changed(p, lambda r: r.update(teacher="abc")), "is of an older version"),
        (
            lambda p: (p / "writeup/text.typ").open("a").write("#let technical = [#lorem(2500)]\n"),
            "pages before the references end, 2 count: shorten writeup/text.typ",
        ),
        (lambda p: (p / "writeup/text.typ").open("a").write("#let technical = [@nobody]\n"), "typesetting failed"),
        (lambda p: (p / "run/report/report.json").write_text("{}"), "is of another model than run trained"),
        (lambda p: (p / "run/report/report.json").write_text("[]"), "report.json is damaged (no object)"),
        (lambda p: (p / "references.bib").open("ab").write("é".encode("latin-1")), "references.bib is not in UTF-8"),
        (
            lambda p: (p / "writeup/typst.py").write_text("raise ModuleNotFoundError(name='typst')"),
            "cannot be typeset without typst: pip install -r requirements-dev.txt",
        ),
    ],
)
def test_an_incomplete_write_up_is_not_built(project, spoil, told):
    (project / "writeup/writeup.pdf").write_text("the one before")
    spoil(project)
    result = build(project)
    assert result.returncode == 1 and told in result.stderr and "Traceback" not in result.stderr
    assert (project / "writeup/writeup.pdf").read_text() == "the one before"
    assert not list((project / "writeup").glob(".*"))
