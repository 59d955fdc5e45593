"""The challenge's two-page write-up from run records: `python writeup/build.py RUN [RUN ...]` -> writeup/writeup.pdf

Several runs are one training: each began with --teacher from the one before it. The last run's scores and pictures
come from its report: python -m src.evaluation report --checkpoint checkpoints/best_model.pt --out RUN/report

The team's own words are in writeup/text.typ, which no build overwrites. Needs requirements-dev.txt.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pages import PAGES, counted, keyword

try:
    import typst
    from pypdf import PdfReader
except ModuleNotFoundError as error:
    sys.exit(f"error: a write-up cannot be typeset without {error.name}: pip install -r requirements-dev.txt")

HERE = Path(__file__).resolve().parent
BIBLIOGRAPHY = HERE.parent / "references.bib"
EARLY = 4  # checkpoints to show two images of each


class Fault(Exception):
    """What keeps the write-up from being complete."""


def read(path: Path, remedy: str) -> dict:
    if not path.is_file():
        raise Fault(f"{path} is missing: {remedy}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise Fault(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise Fault(f"{path} is damaged (no object): {remedy}")
    return content


def words(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Fault(f"{path} is not in UTF-8 ({error}): save it as such") from None


def parsed(line: str) -> dict:
    try:
        content = json.loads(line)
    except ValueError:  # the last line of a run that was killed while writing it
        content = None
    return content if isinstance(content, dict) else {}  # of a line's beginning, or end, a number may be left


def copied(source: Path, target: Path, remedy: str) -> None:
    if not source.is_file():
        raise Fault(f"the figure {source} is missing: {remedy}")
    shutil.copyfile(source, target)


def plot_losses(runs: list[Path], records: list[dict], scored: list[dict], target: Path) -> None:
    """Raw (faint) and smoothed loss against images seen, over all runs; lines where a stage ends.

    Of each run as far as the next one began, and of the last one as far as the `scored` model's stages go.
    """
    figure = Figure(figsize=(3.6, 1.9), layout="constrained")
    axes = figure.subplots()
    seen, ends = 0, []
    taken = [*(record["teacher"]["stages"] for record in records[1:]), scored]
    for run, record, stages in zip(runs, records, taken, strict=True):
        own = stages[len(record["teacher"]["stages"]) if record["teacher"] else 0 :]
        steps = sum(stage["steps"] for stage in own)
        path = run / "metrics.jsonl"
        if not path.is_file():
            raise Fault(f"the loss curve's {path} is missing: name a folder that train.py wrote")
        rows = [row for row in map(parsed, path.read_text().splitlines()) if row.get("loss") is not None]
        rows = [row for row in rows if row["step"] <= steps]
        for stage in dict.fromkeys(row["stage"] for row in rows):
            points = [(seen + row["images"], row["loss"]) for row in rows if row["stage"] == stage]
            x, y = map(np.array, zip(*points, strict=True))
            window = max(1, len(y) // 20)
            smooth = np.convolve(y, np.ones(window) / window, mode="valid")
            (line,) = axes.plot(x[window - 1 :], smooth, linewidth=1)
            axes.plot(x, y, color=line.get_color(), alpha=0.25, linewidth=0.6)
            ends.append(x[-1])
        seen += sum(stage["steps"] * stage["batch_size"] for stage in own)
    if not ends:
        raise Fault("no loss was logged: train longer than one --log_interval")
    for end in ends[:-1]:
        axes.axvline(end, color="black", linewidth=0.6)
    axes.set_xlabel("images", fontsize=8)
    axes.set_ylabel("loss", fontsize=8)
    axes.set_yscale("log")
    axes.tick_params(labelsize=7, which="both")
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    figure.savefig(target)


def early_samples(run: Path, folder: Path) -> list[dict]:
    """Two images of each of the first previews of a run."""
    steps = sorted(
        {int(match[1]) for path in run.glob("iter=*") if (match := re.match(r"iter=(\d+)_sample", path.name))}
    )
    found = []
    for step in steps[:EARLY]:
        for i in range(2):
            name = f"early_{step}_{i}.png"
            copied(run / f"iter={step}_sample_{i}.png", folder / name, "train.py writes it at its first previews")
            found.append({"path": name, "told": f"{step:,} iterations"})
    if len(found) < 2 * EARLY:
        raise Fault(f"{run} has previews of {len(steps)} iterations, {EARLY} are needed: lower --save_interval")
    return found


def kinds(stages: list[dict]) -> list[dict]:
    """The stages without how far they got, which a run's checkpoints differ in, what their ends were mixed with, and
    what an older version did not tell."""
    later = ("steps", "mixed", "citations", "lr_decay_start")  # a mixture is cited as well
    told = [{name: value for name, value in stage.items() if name not in later} for stage in stages]
    for stage in told:  # an older version told nothing of options that it did not have, whose effect is off
        stage["options"] = {name: value for name, value in stage.get("options", {}).items() if value is not False}
    return told


def trained_by(run: dict, model: dict) -> bool:
    """Whether a model of these `stages`, `seed` and `data`, as far as they are told, is one of this record's run."""
    began, stages = len(run["teacher"]["stages"]) if run["teacher"] else 0, model.get("stages", [])
    alike = all(model.get(fact) in (None, run[fact]) for fact in ("seed", "data"))
    return alike and len(stages) > began and kinds(stages) == kinds(run["stages"])[: len(stages)]


def check_order(runs: list[Path], records: list[dict]) -> None:
    """Fault if a run did not begin with a model of the run before it."""
    if records[0]["teacher"]:
        raise Fault(f"{runs[0]} began with another run's model: name that run before it")
    for run, before, record in zip(runs[1:], records, records[1:], strict=False):
        if not record["teacher"] or not trained_by(before, record["teacher"]):
            raise Fault(f"{run} did not begin with the run named before it: name runs in the order of training")


def stages(trained: list[dict], methods: str, known: set[str]) -> list[dict]:
    """What the scored model was trained with; Fault for a stage that the write-up could not describe or cite."""
    found = []
    for stage in trained:
        name, _, options = stage["objective"].partition("/")
        if f"\n  {name}: " not in methods:
            raise Fault(f"writeup/methods.typ does not describe {name}: add a line")
        if not stage["citations"]:
            raise Fault(f"the objective {name} cites nothing: give it `citations`")
        check_keys(stage["citations"], known)
        decays = stage["steps"] > stage.get("lr_decay_start", math.inf)  # untold by an older version
        falls = ", falling" if decays or stage.get("options", {}).get("steady", 1) < 1 else ""
        found.append(
            {
                "name": name,
                "options": options.replace("/", ", "),
                "steps": f"{stage['steps']:,}",
                "images": f"{stage['steps'] * stage['batch_size']:,}",
                "lr": f"{stage['lr']:.2g}{falls}",
                "citations": stage["citations"],
                "mixed": {name: f"{value:g}" for name, value in stage.get("mixed", {}).items()},
            }
        )
    return found


def check_keys(keys: list[str], known: set[str]) -> None:
    if unknown := [key for key in keys if key not in known]:
        raise Fault(f"references.bib has no entry {', '.join(unknown)}: add it")


def uncommitted(environment: dict) -> bool:
    """Whether a session's code may differ from its commit; without a repository nobody knows either."""
    return environment["commit"] != "unknown" and not environment["clean_tree"]


def warn_of_other_code(run: Path, commit: str, changed: bool) -> None:
    """methods.typ tells what the objectives are now; a run may have trained what they were, or what no commit holds."""
    if changed:
        print(f"warning: {run} was trained with code that may differ from its commit {commit}", file=sys.stderr)
    where = [commit, "--", "src/objectives"]
    try:
        code = subprocess.run(["git", "diff", "--quiet", *where], cwd=HERE.parent, capture_output=True).returncode
    except OSError:
        code = -1
    if code:  # without a repository too
        told = f"warning: {run} trained the objectives of commit {commit}, which may not be what methods.typ tells"
        print(f"{told}: see git diff {' '.join(where)}", file=sys.stderr)


def by_nfe(values: dict[str, float | list[float]]) -> str:
    return "; ".join(f"{str(value).strip('[]')} at NFE {nfe}" for nfe, value in values.items())


def settings(record: dict) -> str:
    """What a run's stages share."""
    given = record["arguments"]
    return f"seed {given['seed']}, times {given['time_sampling'].replace('_', ' ')}"


def optimisers(trained: list[dict]) -> str:
    """What trained the student's weights in these stages."""
    muon = [bool(stage.get("options", {}).get("muon")) for stage in trained]
    where = "" if all(muon) else " (where the stage says muon)"
    return f"Muon for hidden layers{where} and AdamW" if any(muon) else "AdamW"


def in_words(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.0f} minutes"


def gathered(records: list[dict], scored: dict) -> dict:
    """What template.typ shows beside the pictures; Fault if a work that is cited has no entry."""
    known = set(re.findall(r"@\w+\{([^,\s]+),", words(BIBLIOGRAPHY)))
    cited = scored["provenance"]["citations"]  # the training's, and what the sampler was given since
    check_keys([*cited, *scored["citations"]], known)
    model = records[-1]["model_config"]
    sessions = [session for record in records for session in record["sessions"]]
    code = sessions[-1]["environment"]
    devices = dict.fromkeys(f"{session['processes']} x {session['environment']['chip']}" for session in sessions)
    full = model["unet"] == "full" and model["image_size"] == 64
    nfes, trained = list(scored["nfe"]), scored["provenance"]["stages"]
    return {
        "stages": stages(trained, words(HERE / "methods.typ"), known),
        "citations": cited,
        "keyword": keyword(scored["weights"], scored["sampler"]),
        "sampler": {name: by_nfe(values) for name, values in scored["sampler"].items()},
        "settings": f"{optimisers(trained)}, {', then '.join(dict.fromkeys(map(settings, records)))}"
        + ("" if full else f", a {model['unet']} U-Net at {model['image_size']} px: an experiment, no submission"),
        "images": ", ".join(
            dict.fromkeys(f"{r['data']['images']:,} training images, hash {r['data']['hash']}" for r in records)
        ),
        "hours": in_words(sum(session["seconds"] for session in sessions)),
        "device": ", ".join(devices),
        "device_hours": f"{sum(record['device_hours'] for record in records):.2f}",
        "sessions": str(len(sessions)),
        "commit": code["commit"][:10] + (", changed" if uncommitted(code) else ""),
        "nfes": nfes,
        "samples": f"{scored['samples']:,}",
        "seeds": str(scored["sampling seeds"]),
        "distance": scored["distance"],
        "floor": f"{scored['floor']['frechet']:.2f}",
        "floor_images": f"{scored['floor']['training images']:,}",
        "score_citations": scored["citations"],
        "scores": [
            {
                "nfe": nfe,
                "distance": "{:.2f} ± {:.2f}".format(*found["intervals"]["frechet"]),
                "ratio": f"{found['ratio']:.2f}",
                "precision": f"{found['intervals']['precision'][0]:.2f}",
                "recall": f"{found['intervals']['recall'][0]:.2f}",
                "failures": [[kind, f"{share:.2f}"] for kind, share in found["failures"].items()],
            }
            for nfe, found in scored["nfe"].items()
        ],
    }


def build(runs: list[Path], report: Path, target: Path) -> None:
    """Write the PDF whole or not at all; Fault if it would be incomplete or more than two of its pages count."""
    if target.is_dir():
        raise Fault(f"--out {target} is a folder: name a file in it, as {target / 'writeup.pdf'}")
    records = [read(run / "run.json", "name a folder that train.py wrote") for run in runs]
    for run, record in zip(runs, records, strict=True):
        told = "citations" in record and all({"lr", "batch_size"} <= set(stage) for stage in record["stages"])
        if not told or isinstance(record["teacher"], str):
            raise Fault(f"{run}/run.json is of an older version: run the same training command again, which renews it")
    scored = read(report / "report.json", "python -m src.evaluation report --checkpoint checkpoints/best_model.pt "
                  f"--out {report}")  # fmt: skip
    if not trained_by(records[-1], scored.get("provenance", {})):
        raise Fault(f"{report} is of another model than {runs[-1]} trained: write it again")
    if "bf16" not in scored:
        raise Fault(f"{report} is of an older version: write it again")
    if scored["bf16"]:
        raise Fault(f"{report} is of bfloat16 samples, and sampling.py draws float32 ones: write it without --bf16")
    check_order(runs, records)
    for run, record in zip(runs, records, strict=True):
        surroundings = [session["environment"] for session in record["sessions"]]
        for commit in sorted({one["commit"] for one in surroundings}):
            changed = any(uncommitted(one) for one in surroundings if one["commit"] == commit)
            warn_of_other_code(run, commit, changed)
    data = gathered(records, scored)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(HERE, folder, dirs_exist_ok=True)  # the team's own figures too
        data["early"] = early_samples(runs[0], folder)
        plot_losses(runs, records, scored["provenance"]["stages"], folder / "loss.svg")
        for name in ("samples.png", "farthest.png"):
            copied(report / name, folder / name, "write the report again")
        shutil.copyfile(BIBLIOGRAPHY, folder / "references.bib")
        (folder / "data.json").write_text(json.dumps(data))
        target.parent.mkdir(parents=True, exist_ok=True)
        pdf = target.with_name(f".{target.name}.tmp")
        try:
            typst.compile(folder / "template.typ", output=pdf)
            if (count := counted([page.extract_text() for page in PdfReader(pdf).pages])) > PAGES:
                raise Fault(f"{count} pages before the references end, {PAGES} count: shorten writeup/text.typ")
            os.replace(pdf, target)
        except typst.TypstError as error:
            raise Fault(f"typesetting failed: {error}") from None
        finally:
            pdf.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that train.py wrote, in the order of training")
    parser.add_argument("--report", type=Path, help="of the last run; default: RUN/report")
    parser.add_argument("--out", type=Path, default=HERE / "writeup.pdf")
    args = parser.parse_args()
    try:
        build(args.runs, args.report or args.runs[-1] / "report", args.out)
    except (Fault, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: two A4 pages at most before the references; look at them")


if __name__ == "__main__":
    main()
