"""None of the training is lost: killed runs, damaged checkpoints, averages of the weights."""

import copy
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest.mock import DEFAULT, patch

import numpy as np
import pytest
import torch
from commands import run_here
from toy import MLP, one_stage

from custom_model import CustomGenerativeModel, CustomScheduler, create_custom_model
from src.errors import UserError
from src.quantise import quantised
from src.training.checkpoints import clear_leftovers
from src.training.data import load_images
from src.training.ema import PowerEMA, gamma_of, mix, rebuild
from src.training.engine import Training
from src.training.loop import train
from src.training.recipe import Recipe
from src.utils import load_model, read_checkpoint, save_model, weights_hash

STEPS = 60


def run(faces: str, save_dir: str, steps: int = STEPS) -> None:
    """Train the small network for a few steps, saving so often that kills hit saves too."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, key = load_images(faces, faces, 32)
    model = create_custom_model(objective="shortcut", unet="small", image_size=32)
    recipe = Recipe(batch_size=2, num_iterations=steps, lr=1e-3, warmup=2, log_interval=1, save_interval=5)
    with patch.multiple("src.training.run_folder", save_previews=DEFAULT, plot_curves=DEFAULT):  # most of a save's time
        train(model, {}, images, key, recipe, one_stage(model, steps, "shortcut"), Path(save_dir), {})


def tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for value in (tree.values() if isinstance(tree, dict) else []) for t in tensors(value)]


def test_runs_killed_twenty_times_end_bitwise_equal_to_one_never_killed(faces, workdir, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # or the server finds nothing to preload, in silence
    context = multiprocessing.get_context("forkserver")  # a fresh process each time, without the import's seconds
    context.set_forkserver_preload(["src.training.loop", "custom_model", "test_resume"])
    metrics = workdir / "killed/metrics.jsonl"

    def start(folder):
        process = context.Process(target=run, args=(str(faces), str(workdir / folder)))
        process.start()
        return process

    def lines():
        return metrics.read_text().count("\n") if metrics.exists() else 0

    whole = start("whole")
    whole.join(300)
    assert whole.exitcode == 0

    chance = random.Random(0)
    kills = 0
    while kills < 20:
        before, process = lines(), start("killed")
        while process.exitcode is None and lines() == before:  # a resumed run first drops the lines it will redo
            time.sleep(0.005)
        # At a random moment after a random number of steps: by the clock alone, a busy machine would never save.
        seen, more = lines(), chance.randint(0, 8)
        while process.exitcode is None and lines() < seen + more:
            time.sleep(0.005)
        process.join(chance.uniform(0, 0.1))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        else:  # finished before twenty kills: start over
            assert process.exitcode == 0
            for path in [*(workdir / "killed").glob("*.ckpt"), *(workdir / "killed").rglob("*.pt")]:
                path.unlink()
        process.join()
    last = start("killed")
    last.join(300)
    assert last.exitcode == 0

    expected, found = (torch.load(workdir / name / "last.ckpt", weights_only=True) for name in ("whole", "killed"))
    pairs = list(zip(tensors(expected), tensors(found), strict=True))
    assert len(pairs) > 500 and all(torch.equal(a, b) for a, b in pairs)
    rows = [[json.loads(x)["loss"] for x in (workdir / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("whole", "killed")]  # fmt: skip
    assert rows[0] == rows[1] and len(rows[0]) == STEPS
    sessions = json.loads((workdir / "killed/run.json").read_text())["sessions"]
    resumed = [one["first_step"] for one in sessions if one["first_step"] > 0]
    assert len(resumed) >= 5 and max(resumed) >= 15  # it did go on from checkpoints, and did not just start over
    print(f"{kills} kills, sessions began at {[one['first_step'] for one in sessions]}")


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(faces, workdir, capsys):
    run(str(faces), "run", 10)
    last = workdir / "run/last.ckpt"
    last.unlink()
    run(str(faces), "run", 10)
    assert "warning: run holds no last.ckpt; going on from run/previous.ckpt instead" in capsys.readouterr().err
    for damage in (lambda: last.write_bytes(last.read_bytes()[:5000]), lambda: torch.save({"state_dict": {}}, last)):
        damage()
        run(str(faces), "run", 12)
        warning = capsys.readouterr().err
        assert "last.ckpt" in warning and "going on from run/previous.ckpt instead" in warning
        assert torch.load(last, weights_only=True)["training"]["step"] == 12
    for name in ("last.ckpt", "previous.ckpt"):
        (workdir / "run" / name).write_bytes(b"")
    with pytest.raises(UserError, match="last.ckpt.*previous.ckpt.*nothing to go on from"):
        run(str(faces), "run", 12)


def test_a_checkpoint_from_a_device_with_another_layout_is_restored(faces, workdir):
    """A GPU keeps weights and moments channels_last; the fused optimizer trusts the layout it finds."""
    images, _ = load_images(str(faces), str(faces), 32)

    def fresh():
        torch.manual_seed(0)
        model = create_custom_model(objective="rectified_flow", unet="small", image_size=32)
        return Training(model, images, Recipe(batch_size=8, warmup=1), one_stage(model))

    here = fresh()
    here.step()
    checkpoint = copy.deepcopy({"state_dict": here.ema.model.state_dict(), "training": here.state()})
    for moments in checkpoint["training"]["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].ndim == 4:
                moments[name] = moments[name].contiguous(memory_format=torch.channels_last)
    there = fresh()
    there.restore(checkpoint)
    for training in (here, there):
        training.step()
    for a, b in zip(here.model.parameters(), there.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_critic_of_another_form_is_refused_in_a_line():
    """As a run is that was interrupted before its critic had a last layer for each NFE."""
    network, scheduler = MLP(use_additional_condition=True), CustomScheduler(1000)
    model = CustomGenerativeModel(network, scheduler, objective="adversarial/critic=conv")
    training = Training(model, np.zeros((16, 1, 1, 2), np.uint8), Recipe(batch_size=8), one_stage(model))
    checkpoint = {"state_dict": training.ema.model.state_dict(), "training": training.state()}
    training.restore(checkpoint)
    checkpoint["training"]["critic"]["tail.weight"] = checkpoint["training"]["critic"]["tail.weight"][:1]
    with pytest.raises(UserError, match="critic of another form .* run.json names, or choose another --save_dir"):
        training.restore(checkpoint)


def test_leftovers_of_killed_saves_are_cleared_and_a_whole_next_checkpoint_is_used(faces, workdir, capsys):
    run(str(faces), "run", 4)
    shutil.copyfile(workdir / "run/last.ckpt", workdir / "older.ckpt")
    run(str(faces), "run", 5)
    (workdir / "run/last.ckpt").rename(workdir / "run/next.ckpt")  # killed before it took the older one's place
    (workdir / "older.ckpt").rename(workdir / "run/last.ckpt")
    leftover = workdir / "run/.next.ckpt.123.tmp"
    leftover.write_bytes(b"half")
    drawn = [workdir / f"run/{folder}.nfe=1.123.tmp" for folder in ("", "samples/")]  # a killed sampling.py's
    others = [*drawn, workdir / "run/report/.report.json.123.tmp"]
    for folder in (*drawn, others[-1].parent):
        folder.mkdir(parents=True)
    others[-1].write_text("of a command that may be writing it now")
    record = json.loads((workdir / "run/run.json").read_text())
    record["sessions"][0]["environment"]["commit"] = "another"
    (workdir / "run/run.json").write_text(json.dumps(record))
    run(str(faces), "run", 6)
    assert not leftover.exists() and all(other.exists() for other in others)
    assert "warning: run/run.json began with commit another and goes on with " in capsys.readouterr().err
    sessions = json.loads((workdir / "run/run.json").read_text())["sessions"]
    assert [one["first_step"] for one in sessions] == [0, 4, 5]


def test_a_run_from_before_an_option_existed_goes_on_with_its_default(faces, workdir):
    run(str(faces), "run", 5)
    checkpoint = torch.load("run/last.ckpt", weights_only=True)
    options = checkpoint["training"]["identity"]["stages"][0][1]
    later = options.pop("levels")
    torch.save(checkpoint, "run/last.ckpt")
    run(str(faces), "run", 6)
    assert read_checkpoint("run/last.ckpt")["training"]["identity"]["stages"][0][1] == {**options, "levels": later}
    options["flow"] = 0.5
    torch.save(checkpoint, "run/last.ckpt")
    with pytest.raises(UserError, match="belongs to another run"):
        run(str(faces), "run", 7)


def test_power_function_average_has_its_width():
    """The average of the step numbers themselves has the mean and the width that gamma prescribes."""
    for sigma_rel in (0.05, 0.1, 0.25):
        gamma = gamma_of(sigma_rel)
        tau = (np.arange(200_000) + 0.5) / 200_000
        weight = tau**gamma / (tau**gamma).sum()
        mean = (weight * tau).sum()
        assert np.sqrt((weight * (tau - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-3)

    model = torch.nn.Linear(1, 1, bias=False)
    ema = PowerEMA(model)
    for step in range(1, 2001):
        torch.nn.init.constant_(model.weight, step)
        ema.update(model, step)
    for sigma_rel, average in ema.averages.items():
        gamma = gamma_of(float(sigma_rel))
        assert average["weight"].item() == pytest.approx(2000 * (gamma + 1) / (gamma + 2), rel=2e-3)


def test_any_length_is_rebuilt_from_the_kept_averages(tmp_path):
    """Against an average of that length kept all along, of weights that wander."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 1, bias=False)
    ema, target = PowerEMA(model), PowerEMA(model)
    target.averages = {"0.07": {"weight": model.weight.detach().clone()}}
    (tmp_path / "averages").mkdir()
    for step in range(1, 1601):
        with torch.no_grad():
            model.weight += 0.1 * torch.randn_like(model.weight)
        ema.update(model, step)
        target.update(model, step)
        if step % 100 == 0:
            halves = {s: {name: value.half() for name, value in a.items()} for s, a in ema.averages.items()}
            torch.save(
                {"stage": 0, "age": step, "model_config": {}, "averages": halves}, tmp_path / f"averages/{step}.pt"
            )
    wanted = target.averages["0.07"]["weight"]
    step, _, rebuilt = rebuild(tmp_path, 0.07, None)
    error = (rebuilt["weight"] - wanted).norm()
    nearest = min((average["weight"] - wanted).norm() for average in ema.averages.values())
    assert step == 1600 and error < 0.1 * nearest, (error, nearest)
    for absent in (150, 0):  # 0 was taken for none at all, the last
        with pytest.raises(UserError, match=f"none of step {absent}: its steps are"):
            rebuild(tmp_path, 0.07, absent)
    for step, sigma_rel in ((100, 0.02), (100, 0.2)):  # one kept step cannot tell these
        with pytest.raises(UserError, match="save more often"):
            rebuild(tmp_path, sigma_rel, step)


def test_an_average_is_rebuilt_of_its_own_stage_alone(tmp_path):
    (tmp_path / "averages").mkdir()
    for step in range(100, 1700, 100):
        stage, age = (0, step) if step <= 800 else (1, step - 800)
        averages = {sigma: {"weight": torch.full((1,), [1000.0, 1.0][stage]).half()} for sigma in ("0.05", "0.1")}
        kept = {"stage": stage, "age": age, "model_config": {"stage": stage}, "averages": averages}
        torch.save(kept, tmp_path / f"averages/{step}.pt")
    for step, stage, weight in ((None, 1, 1), (1200, 1, 1), (800, 0, 1000)):
        _, origin, rebuilt = rebuild(tmp_path, 0.07, step)
        assert rebuilt["weight"].item() == pytest.approx(weight) and origin["model_config"] == {"stage": stage}


def test_half_written_averages_are_cleared(tmp_path):
    (tmp_path / "averages").mkdir()
    for name in (".last.ckpt.1.tmp", "averages/.10.pt.1.tmp", "averages/10.pt", "last.ckpt"):
        (tmp_path / name).touch()
    for anew, kept in ((False, ["averages/10.pt", "last.ckpt"]), (True, ["last.ckpt"])):
        clear_leftovers(tmp_path, anew)
        held = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
        assert held == kept


def test_a_mixture_lies_between_a_model_and_its_start(workdir, randomised):
    config = {"unet": "small", "image_size": 32, "objective": "adversarial"}
    flow, critic = ({"objective": name, "steps": 9, "citations": []} for name in ("rectified_flow", "adversarial"))
    models = [randomised(create_custom_model(**config), seed) for seed in (1, 2)]
    save_model(models[0], "start/int8.pt", config, provenance={"stages": [flow]})
    torch.save({**read_checkpoint("start/int8.pt"), "state_dict": quantised(models[0].state_dict())}, "start/int8.pt")
    save_model(models[1], "end/final_model.pt", config, provenance={"stages": [flow, critic], "citations": ["a"]})
    command = ["src.training", "mix", "end/final_model.pt", "start/int8.pt", "--share", "0.25", "--out"]
    result = run_here(workdir, *command, "mixed")
    assert result.returncode == 0, result.stderr
    mixed = load_model("mixed/final_model.pt", create_custom_model)
    for name, value in mixed.state_dict().items():
        start, end = (model.state_dict()[name] for model in models)
        assert (value - (0.75 * end + 0.25 * start)).abs().max() <= 0.25 * start.abs().max() / 127, name  # 8 bits
        assert (value - end).norm() > 0.1 * (start - end).norm(), name
    told = read_checkpoint("mixed/final_model.pt")["provenance"]
    mixed = {"citations": ["wortsman2022robust"], "mixed": {"share": 0.25, "stages": 1}}
    assert told["stages"] == [flow, {**critic, **mixed}] and told["citations"] == ["a"]
    with pytest.raises(UserError, match="between 0 and 1, got 1"):
        mix(Path("end/final_model.pt"), Path("start/int8.pt"), 1.0)
    with pytest.raises(UserError, match="mixed/final_model.pt is a mixture already"):
        mix(Path("mixed/final_model.pt"), Path("start/int8.pt"), 0.25)
    own = run_here(workdir, *command, "end")
    assert own.returncode == 1 and "error: --out end is the folder of end/final_model.pt" in own.stderr
    own = run_here(workdir, *command, "start")
    assert own.returncode == 1 and "error: --out start is the folder of start/int8.pt" in own.stderr
    save_model(models[1], "smooth/final_model.pt", {**config, "smoothing": {"1": 0.1}})
    with pytest.raises(UserError, match="smooth/final_model.pt has smoothing for its own weights: mix the"):
        mix(Path("smooth/final_model.pt"), Path("start/int8.pt"), 0.25)
    with pytest.raises(UserError, match="start/int8.pt was not trained from start/int8.pt"):
        mix(Path("start/int8.pt"), Path("start/int8.pt"), 0.25)
    save_model(models[0], "start/other.pt", config, provenance={"stages": [critic]})
    with pytest.raises(UserError, match="end/final_model.pt was not trained from start/other.pt"):
        mix(Path("end/final_model.pt"), Path("start/other.pt"), 0.25)


def test_a_model_is_mixed_with_what_it_went_on_from_alone(workdir, randomised):
    config = {"unet": "small", "image_size": 32, "objective": "adversarial"}
    data = {"hash": "some", "images": 9}
    flow, critic = ({"objective": name, "steps": 9, "citations": []} for name in ("rectified_flow", "adversarial"))
    network = create_custom_model(**config)

    def saved(name: str, weights_seed: int, **provenance) -> dict:
        weights = {key: value.clone() for key, value in randomised(network, weights_seed).state_dict().items()}
        save_model(network, f"{name}/final_model.pt", config, provenance={"seed": 1, "data": data, **provenance})
        return {"weights": weights_hash(weights)[:16], "stages": provenance["stages"], "seed": 1, "data": data}

    def mixed(end: str, start: str) -> dict:
        told = mix(Path(end, "final_model.pt"), Path(start, "final_model.pt"), 0.25)["provenance"]
        return told["stages"][-1]["mixed"]

    teacher = saved("teacher", 1, stages=[flow], teacher=None)
    saved("twin", 2, stages=[flow], teacher=None)
    taught = [flow, critic]
    saved("taught", 3, stages=taught, teacher=teacher, seed=2)
    halves = read_checkpoint("teacher/final_model.pt")
    halves["state_dict"] = {name: value.half() for name, value in halves["state_dict"].items()}
    torch.save(halves, "halves.pt")
    of_halves = {name: value.float() for name, value in halves["state_dict"].items()}
    saved("later", 4, stages=taught, teacher={**teacher, "weights": weights_hash(of_halves)[:16]})
    assert mixed("taught", "teacher") == {"share": 0.25, "stages": 1}
    assert mix(Path("later/final_model.pt"), Path("halves.pt"), 0.25)["state_dict"]
    with pytest.raises(UserError, match="taught/final_model.pt was not trained from twin/final_model.pt"):
        mixed("taught", "twin")
    # Of one run, and of a run with another seed or data; one of them from before rates were told.
    told = [{**flow, "lr_decay_start": 5}, {**critic, "lr_decay_start": 5}]
    saved("end", 5, stages=told, teacher=None)
    assert mixed("end", "teacher") == {"share": 0.25, "stages": 1}
    end_told = [{**flow, "options": {"muon": False}}, critic]  # of a run that went on with a later version
    saved("longer", 5, stages=end_told, teacher=None)
    assert mixed("longer", "teacher") == {"share": 0.25, "stages": 1}
    saved("elsewhere", 6, stages=taught, teacher={**teacher, "weights": "others"})
    saved("both", 6, stages=[*taught, critic], teacher=teacher)
    with pytest.raises(UserError, match="both/final_model.pt was not trained from elsewhere/final_model.pt"):
        mixed("both", "elsewhere")  # another teacher, but for its weights the same
    for name, other in (("seed", 2), ("data", {"hash": "other", "images": 9})):
        saved(name, 6, stages=[flow], teacher=None, **{name: other})
        with pytest.raises(UserError, match=f"end/final_model.pt was not trained from {name}/final_model.pt"):
            mixed("end", name)
    # What came before the teacher's last stage, of which nobody told a seed.
    saved("third", 7, stages=[*taught, critic], teacher={**teacher, "stages": taught})
    assert mixed("third", "seed") == {"share": 0.25, "stages": 1}
