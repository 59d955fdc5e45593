"""The engine and train.py, run as a user would."""

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_here, started
from operations import Operations
from PIL import Image
from toy import MLP, one_stage

import train as train_py
from custom_model import UNETS, CustomGenerativeModel, CustomScheduler, create_custom_model
from src.errors import UserError
from src.files import write_json
from src.images import to_pixels
from src.objectives import make_objective, parse_stages
from src.objectives.contract import Nets
from src.training import engine, fusing, run_folder
from src.training.checkpoints import alone_in, best_score
from src.training.data import batch_indices, load_images, to_batch
from src.training.distributed import World
from src.training.ema import EMA, gamma_of
from src.training.engine import Loss, Training, accumulate_gradient, compiles
from src.training.estimate import estimate
from src.training.loop import train
from src.training.recipe import Recipe, Teacher, plan
from src.training.record import RunRecord, early_preview, environment, plot_curves
from src.utils import has_bf16, load_model, read_checkpoint, save_model, tensor_to_pil_image

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--unet", "small", "--image_size", "32", "--device", "cpu", "--batch_size", "8", "--warmup", "2"]
FLOW_AND_PAIRS = ["--stages", "rectified_flow:0.5,reflow/pairs=100/solver=euler/solver_steps=1:0.5"]
FLOW_AND_PAIRS += ["--num_iterations", "2"]  # one of each stage


def train_script(faces, cwd, env, *flags):
    command = [sys.executable, str(ROOT / "train.py"), "--data_root", str(faces), "--split_dir", str(faces)]
    return subprocess.run([*command, *SMALL, *flags], cwd=cwd, env=env, capture_output=True, text=True)


def train_here(faces, cwd, *flags):
    return run_here(cwd, "train", "--data_root", faces, "--split_dir", faces, *SMALL, *flags)


@pytest.fixture
def refusal(faces, workdir, monkeypatch):
    """What train.py says to flags that it refuses, asked in this process: to start one takes seconds."""

    def ask(*flags: str) -> str:
        command = ["train.py", "--data_root", str(faces), "--split_dir", str(faces), *SMALL, *flags]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(UserError) as refused:
            train_py.main()
        return str(refused.value)

    return ask


def official_loader(path, create):
    """What the challenge's load_model does: config to the factory, strict load, nothing else."""
    config = json.loads(path.with_name("model_config.json").read_text())
    model = create(device="cpu", **config)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"], strict=True)
    return model


def test_train_script_leaves_what_the_challenge_asks_for(faces, workdir, script_env):
    result = train_script(
        faces, workdir, script_env, "--num_iterations", "4", "--save_interval", "2", "--log_interval", "1"
    )
    assert result.returncode == 0, result.stderr
    (run,) = (workdir / "results").iterdir()
    assert len(run.name) == len("11-20-063547")
    expected = {
        "run.json",
        "averages",
        "previous.ckpt",
        "training_config.json",
        "model_config.json",
        "training_curves.png",
        "metrics.jsonl",
        "last.ckpt",
        "final_model.pt",
        "checkpoint_iter_2.pt",
        "checkpoint_iter_4.pt",
    }
    for n in (2, 4):
        expected |= {f"iter={n}_grid.png", *(f"iter={n}_sample_{i}.png" for i in range(4))}
    assert {path.name for path in run.iterdir()} == expected
    assert not (workdir / "checkpoints").exists()  # only the challenge's network is published

    config = json.loads((run / "model_config.json").read_text())
    assert config["model_type"] and config["use_additional_condition"] is True
    assert not {"lr", "batch_size", "data_root"} & set(config)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(np.isfinite(row["loss"]) for row in rows)
    final = official_loader(run / "final_model.pt", create_custom_model)
    for name in ("last.ckpt", "checkpoint_iter_4.pt"):
        other = official_loader(run / name, create_custom_model).state_dict()
        assert all(torch.equal(value, other[key]) for key, value in final.state_dict().items())
    facts = torch.load(run / "final_model.pt", weights_only=True)["provenance"]
    assert facts["seed"] == 42 and facts["data"]["images"] == 24 and facts["step"] == 4
    assert {"commit", "packages", "bf16", "chip"} <= set(facts)
    record = json.loads((run / "run.json").read_text())
    assert record["images_seen"] == 32 and record["device_hours"] > 0 and record["arguments"]["save_interval"] == 2
    assert record["sessions"][0]["last_step"] == 4 and "train.py" in record["sessions"][0]["command"][0]
    assert Image.open(run / "iter=4_sample_0.png").size == (32, 32)


def test_a_single_row_is_seen_among_the_curves(tmp_path):
    plot_curves([{"step": 9, "loss": 1.0}], tmp_path / "curves.png")
    image = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    height, width, _ = image.shape  # its point is in the middle, the legend in a corner
    middle = image[height * 2 // 5 : height * 3 // 5, width * 2 // 5 : width * 3 // 5]
    assert ((middle[..., 2] - middle[..., 0]) > 100).any()  # blue


def test_max_minutes_ends_the_run_with_a_final_model(faces, workdir):
    result = train_here(faces, workdir, "--max_minutes", "1e-6", "--save_dir", "run")
    assert result.returncode == 0, result.stderr
    assert "the same command goes on, with --save_dir run" in result.stdout
    assert load_model(str(workdir / "run/final_model.pt"), create_custom_model).image_size == 32
    facts = torch.load(workdir / "run/final_model.pt", weights_only=True)["provenance"]
    record = json.loads((workdir / "run/run.json").read_text())
    done = record["iterations"]  # a model says what it was trained with, not what was planned
    assert 0 < done < 4 and [stage["steps"] for stage in record["stages"]] == [done]
    assert facts["stages"] == record["stages"]


def test_max_minutes_end_while_pairs_are_generated(faces, workdir, monkeypatch, capsys):
    flags = ["--data_root", str(faces), "--split_dir", str(faces), "--save_dir", "run", "--max_minutes", "1e-6"]
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *FLOW_AND_PAIRS, *flags])
    train_py.main()
    first = read_checkpoint("run/checkpoint_iter_1.pt")
    for name in ("final_model.pt", "model_config.json"):  # as if an older session had written them, or none
        Path("run", name).unlink()
    train_py.main()
    assert len(list(Path("data/cache").glob("pairs-*/*.npy"))) == 1  # of two chunks
    sessions = json.loads(Path("run/run.json").read_text())["sessions"]
    assert [one["last_step"] for one in sessions] == [1, 1] and sessions[1]["seconds"] > 0
    assert capsys.readouterr().out.count("--max_minutes ended it at iteration 1 of 2: the same command goes on") == 2
    final, config = read_checkpoint("run/final_model.pt"), json.loads(Path("run/model_config.json").read_text())
    assert all(torch.equal(value, first["state_dict"][name]) for name, value in final["state_dict"].items())
    assert config["objective"] == "rectified_flow" == final["provenance"]["stages"][-1]["objective"]
    train_py.main()
    assert [stage["steps"] for stage in json.loads(Path("run/run.json").read_text())["stages"]] == [1, 1]


def test_a_session_that_ends_in_its_first_pairs_has_no_model_yet(faces, workdir, monkeypatch, capsys, randomised):
    config = {"unet": "small", "image_size": 32, "objective": "rectified_flow"}
    save_model(randomised(create_custom_model(**config), 1), "teacher/final_model.pt", config)
    command = ["train.py", *SMALL, "--data_root", str(faces), "--split_dir", str(faces), "--save_dir", "run"]
    command += ["--objective", "reflow/pairs=100/solver=euler/solver_steps=1", "--num_iterations", "1"]
    command += ["--teacher", "teacher/final_model.pt", "--max_minutes", "1e-6"]
    monkeypatch.setattr(sys, "argv", command)
    train_py.main()
    assert not list(Path("run").glob("*.pt")) and "sampling.py" not in capsys.readouterr().out
    train_py.main()
    assert Path("run/final_model.pt").exists()


def test_a_signal_while_a_stage_is_saved_ends_the_run_before_the_next_ones_pairs(faces, workdir, monkeypatch):
    flags = ["--data_root", str(faces), "--split_dir", str(faces), "--save_dir", "run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *FLOW_AND_PAIRS, *flags])
    monkeypatch.setattr(run_folder.RunFolder, "preview", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(UserError, match="stopped at iteration 1 and saved"):
        train_py.main()
    assert Path("run/last.ckpt").exists() and not list(Path("data/cache").glob("pairs-*"))


def test_only_a_finished_model_of_the_challenges_kind_becomes_the_released_one(faces, workdir, monkeypatch):
    monkeypatch.setitem(UNETS, "full", UNETS["small"])  # by its name the challenge's
    command = ["train.py", "--data_root", str(faces), "--split_dir", str(faces), "--device", "cpu", "--batch_size", "2"]
    command += ["--num_iterations", "2"]
    released = workdir / "checkpoints/best_model.pt"
    monkeypatch.setattr(sys, "argv", [*command, "--max_minutes", "1e-6"])
    train_py.main()
    (run,) = Path("results").iterdir()
    assert (run / "final_model.pt").exists() and not released.exists()
    shutil.rmtree("results")
    monkeypatch.setattr(sys, "argv", command)
    train_py.main()
    (run,) = Path("results").iterdir()
    of_run, of_all = (torch.load(path, weights_only=True)["state_dict"] for path in (run / "final_model.pt", released))
    assert all(torch.equal(of_run[key], of_all[key]) for key in of_run)


def test_interrupted_run_saves_and_goes_on(faces, workdir, script_env):
    flags = ["--save_dir", "run", "--num_iterations", "100000", "--log_interval", "1"]
    command = [sys.executable, str(ROOT / "train.py"), "--data_root", str(faces), "--split_dir", str(faces), *SMALL]
    metrics = workdir / "run/metrics.jsonl"
    options = {"cwd": workdir, "env": script_env, "stderr": subprocess.PIPE}
    with started([*command, *flags], **options) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            time.sleep(0.1)
        process.terminate()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "the same command with --save_dir run goes on" in stderr.splitlines()[-1]
    step = torch.load(workdir / "run/last.ckpt", weights_only=True)["training"]["step"]
    assert step >= 2

    flags[3] = str(step + 2)
    assert train_here(faces, workdir, *flags).returncode == 0
    rows = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert rows == list(range(1, step + 3))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_size", "25"], "24 training images do not fill one batch of 25"),
        (["--grad_clip", "0"], "--grad_clip must be positive"),
        (["--weight_decay", "nan"], "--weight_decay must not be negative or infinite, got nan"),
        (["--weight_decay", "inf"], "--weight_decay must not be negative or infinite, got inf"),
        (["--lr", "inf"], "--lr must be positive and finite, got inf"),
        (["--max_minutes", "nan"], "--max_minutes must be positive"),
        (["--beta2", "1"], "--beta2 must lie in [0, 1)"),
        (["--split_dir", "nowhere"], "no split file nowhere/train_split.txt"),
        (["--num_iterations", "0"], "--num_iterations must be at least 1"),
        (["--seed", "-1"], "a seed must lie in 0 to 4294967295, got -1"),
        (["--seed", str(2**32)], "a seed must lie in 0 to 4294967295, got 4294967296"),
    ],
)
def test_bad_input_is_refused(refusal, flags, message):
    assert message in refusal(*flags)


def test_a_refusal_is_one_line(faces, workdir, script_env):
    result = train_script(faces, workdir, script_env, "--lr", "0")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "error: --lr must be positive and finite, got 0.0\n" and not (workdir / "results").exists()


def test_missing_faces_without_a_connection_name_the_two_ways_on(workdir, script_env):
    env = {**script_env, "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--data_root", "absent", "--device", "cpu"],
        cwd=workdir,
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "--data_root" in last and "python -m src.faces" in last


def test_dry_run_prints_the_plan_and_trains_nothing(faces, workdir):
    result = train_here(faces, workdir, "--dry_run", "--preset", "quick", "--lr", "1e-3")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    arguments = plan["arguments"]
    # The preset's value, the flag's over the preset's, the default.
    assert (arguments["num_iterations"], arguments["lr"], arguments["batch_size"], arguments["beta2"]) == (
        3000, 1e-3, 8, 0.999)  # fmt: skip
    assert plan["estimate"]["parameters"] == 1_652_899 and plan["data"]["images"] == 24
    assert 0 < plan["estimate"]["activations_gb"] < 1 and plan["estimate"]["hours"] > 0
    assert not (workdir / "results").exists()


def test_a_few_images_can_be_estimated():
    model = create_custom_model(unet="small", image_size=32)
    images = np.zeros((5, 3, 32, 32), np.uint8)
    stages = plan([("shortcut", 1.0)], lambda name: make_objective(name, model.scheduler), 100_000)
    assert estimate(model, images, Recipe(batch_size=2), stages, World())["hours"] > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--features", "x.pt"], "give --eval_interval too"),
        (["--eval_samples", "100"], "give --eval_interval too"),
        (["--eval_interval", "1", "--eval_samples", "1"], "at least 2"),
        (["--save_dir", ""], "--save_dir is empty: name a folder"),
        (["--objective", "shortcut", "--stages", "rectified_flow:1"], "not allowed with argument"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as stop:
        train_py.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--objective", "gan"], "unknown objective 'gan': choose one of rectified_flow, reflow, shortcut"),
        (["--stages", "rectified_flow:0.5,shortcut:0.4"], "must add up to 1"),
        (["--objective", "reflow"], "reflow learns from a trained model: name its checkpoint with --teacher"),
        (["--objective", "reflow", "--teacher", "missing.pt"], "no checkpoint at missing.pt"),
        (["--objective", ""], "unknown objective ''"),  # of an empty variable: it trained the default
        (["--teacher", ""], "no checkpoint at : train one first"),
    ],
)
def test_objectives_that_cannot_be_trained_are_refused(refusal, workdir, flags, message):
    assert message in refusal(*flags) and not (workdir / "results").exists()


def test_a_checkpoint_keeps_the_objective_of_its_stage(faces, workdir):
    """What a network is asked for depends on it, and the run's config names only the last stage's."""
    images, key = load_images(str(faces), str(faces), 32)
    model = create_custom_model(unet="small", image_size=32, objective="shortcut")
    stages = plan(
        parse_stages("rectified_flow:0.5,shortcut:0.5"), lambda name: make_objective(name, model.scheduler), 4
    )
    recipe = Recipe(batch_size=8, num_iterations=4, save_interval=2, eval_interval=1)
    config = {"unet": "small", "image_size": 32, "use_additional_condition": True}
    ratios = iter([3.0, 1.0, 2.0, 2.0])  # the best is the first stage's last
    train(model, config, images, key, recipe, stages, Path("run"), {}, evaluate=lambda model: {"ratio": next(ratios)})
    kinds = {
        name: type(load_model(f"run/{name}", create_custom_model).objective).__name__
        for name in ("best_model.pt", "checkpoint_iter_2.pt", "final_model.pt")
    }
    flow = "RectifiedFlow"
    assert kinds == {"best_model.pt": flow, "checkpoint_iter_2.pt": flow, "final_model.pt": "Shortcut"}
    assert json.loads(Path("run/model_config.json").read_text())["objective"] == "shortcut"


def test_a_teacher_must_fit_and_is_what_the_run_starts_from(faces, workdir, randomised):
    model = randomised(create_custom_model(unet="small", image_size=32, objective="rectified_flow"))
    stages = [{"objective": "rectified_flow", "steps": 5, "citations": ["liu2023flow"]}]
    config = {"unet": "small", "image_size": 32, "objective": "rectified_flow"}
    save_model(model, "teacher/model.pt", config, provenance={"stages": stages})
    student = create_custom_model(unet="small", image_size=32, objective="reflow")
    taught_by, critic = train_py.start_from("teacher/model.pt", student)
    assert critic is None and len(taught_by.weights) == 16 and taught_by.stages == stages
    assert torch.equal(student.network.head.weight, model.network.head.weight)
    assert type(student.objective).__name__ == "RectifiedFlow"
    other = create_custom_model(unet="small", image_size=64, objective="shortcut", num_train_timesteps=16)
    with pytest.raises(
        UserError,
        match="teacher/model.pt does not fit: --image_size 32, here 64; --num_train_timesteps 1000, here 16; "
        "--use_additional_condition False, here True",
    ):
        train_py.start_from("teacher/model.pt", other)


def test_a_stage_goes_on_with_its_teachers_critic(faces, workdir, monkeypatch, capsys):
    flags = f"train.py --data_root {faces} --split_dir {faces} --unet small --image_size 32 --batch_size 4 --device cpu"
    flags += " --save_interval 1 --log_interval 1 --lr 0.01 --warmup 0"

    def run(stages, steps, folder, *more):
        whole = [*flags.split(), "--stages", stages, "--num_iterations", str(steps), "--save_dir", folder, *more]
        monkeypatch.setattr("sys.argv", whole)
        train_py.main()
        return torch.load(f"{folder}/last.ckpt", weights_only=True)["training"]

    stages = "rectified_flow:0.34,adversarial/critic=conv:0.66"
    before = run(stages, 3, "first")["critic"]
    begun = []
    began = Training.step
    monkeypatch.setattr(
        Training, "step", lambda self: begun.append(copy.deepcopy(self.nets.critic.state_dict())) or began(self)
    )

    def same(a, b):
        return all(torch.equal(value, b[name]) for name, value in a.items())

    told = "adversarial/critic=conv goes on with the critic of its teacher"
    two = "adversarial/critic=conv:0.5,adversarial/critic=conv/gamma=1:0.5"
    run(two, 2, "kept", "--teacher", "first/last.ckpt")
    assert same(begun[0], before)
    assert told in capsys.readouterr().out
    run(two, 2, "other", "--teacher", "first/last.ckpt", "--max_minutes", "1e-9")
    assert torch.load("other/last.ckpt", weights_only=True)["training"]["step"] == 1
    begun.clear()
    run("adversarial/critic=conv:1", 1, "new", "--teacher", "first/final_model.pt")
    assert not same(begun[0], before)
    with monkeypatch.context() as resumed:
        resumed.setattr(Training, "take_critic", None)  # a run that goes on has its own
        run(two, 2, "other", "--teacher", "first/last.ckpt")
    for rehearsed in ([], ["--dry_run"]):
        with pytest.raises(
            UserError, match="critic is of another form than that of adversarial: name a checkpoint without"
        ):
            run("adversarial:1", 1, "unfit", "--teacher", "first/last.ckpt", *rehearsed)


def test_slices_fit_the_micro_batch_and_are_equal():
    recipe = Recipe(batch_size=96, micro_batch=20)
    assert [recipe.slices(1000, World(size=size)) for size in (1, 2, 3, 96)] == [6, 3, 2, 1]
    assert Recipe(batch_size=96).slices(1000, World()) == 1
    with pytest.raises(UserError, match="does not split over 5 processes"):
        recipe.slices(1000, World(size=5))
    make = partial(make_objective, scheduler=create_custom_model(unet="small").scheduler)
    stages = plan([("rectified_flow", 0.5), ("adversarial/matching=1", 0.5)], make, 2)
    assert recipe.slices(1000, World(), stages) == 6  # of 16
    with pytest.raises(UserError, match="matching=1 wants 16 images at once or more, not 12: raise --batch_size or"):
        recipe.slices(1000, World(size=8), stages)
    with pytest.raises(UserError, match="not 12: raise --micro_batch$"):
        Recipe(batch_size=96, micro_batch=12).slices(1000, World(), stages)


def test_memory_estimate_counts_what_autograd_keeps():
    images = np.zeros((32, 3, 32, 32), np.uint8)
    needs = []
    for size in (8, 16, 32):
        model = create_custom_model(objective="shortcut", unet="small", image_size=32)
        needs.append(estimate(model, images, Recipe(batch_size=size, micro_batch=16), one_stage(model), World()))
        assert all(p.grad is None for p in model.parameters())
    assert needs[2]["activations_gb"] == pytest.approx(needs[1]["activations_gb"], rel=0.2)
    assert needs[1]["activations_gb"] == pytest.approx(2 * needs[0]["activations_gb"], rel=0.2, abs=0.02)
    # A critic's graph is gone when the student's begins.
    model = create_custom_model(objective="distribution_matching", unet="small", image_size=32)
    found = estimate(model, images, Recipe(batch_size=32), one_stage(model), World())["activations_gb"]
    assert found == pytest.approx(2 * needs[2]["activations_gb"], rel=0.2)


def test_an_estimate_counts_all_steps_images_and_pairs(monkeypatch):
    monkeypatch.setattr("src.training.estimate._seconds", lambda device, work: 1.0)
    model = create_custom_model(unet="small", image_size=32, objective="rectified_flow")
    images = np.zeros((8, 3, 32, 32), np.uint8)
    names = [("rectified_flow", 0.5), ("reflow/pairs=460800/solver_steps=2", 0.5)]
    stages = plan(names, lambda name: make_objective(name, model.scheduler), 36_000)
    # Steps of 8 images take a second here, so do 64 pairs with one call; the two processes share both.
    found = estimate(model, images, Recipe(batch_size=8, num_iterations=36_000), stages, World(size=2))
    assert found["hours"] == pytest.approx((36_000 + 2 * 7200) / 2 / 3600)
    assert found["images_per_second"] == pytest.approx(36_000 * 8 / (found["hours"] * 3600), rel=1e-3)


@pytest.mark.parametrize("bf16", [True, False])
def test_an_estimate_times_pairs_in_the_runs_precision(monkeypatch, bf16):
    seen = []
    monkeypatch.setattr("src.training.engine.has_bf16", lambda device: bf16)
    monkeypatch.setattr("src.training.estimate.solve", lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    model = create_custom_model(unet="small", image_size=32, objective="reflow/pairs=64")
    estimate(model, np.zeros((8, 3, 32, 32), np.uint8), Recipe(batch_size=8), one_stage(model), World())
    assert set(seen) == {bf16}


def test_presets_are_recipes_and_document_themselves():
    known = {field.name for field in fields(Recipe)}
    for values in train_py.PRESETS.values():
        recipe = {name: value for name, value in values.items() if name != "stages"}
        assert set(recipe) <= known and Recipe(**recipe)
        assert len(parse_stages(values["stages"])) > 1
    readme, make = (ROOT / "README.md").read_text(), partial(make_objective, scheduler=CustomScheduler())
    launches = re.findall(r"torchrun (.*?)--nproc_per_node=(\d+).*?--preset (\S+)", readme, re.DOTALL)
    assert len(launches) == 2
    for flags, each, preset in launches:
        machines = int(re.search(r"--nnodes=(\d+)|$", flags)[1] or 1)
        values = dict(train_py.PRESETS[preset])
        stages = plan(parse_stages(values.pop("stages")), make, values["num_iterations"])
        Recipe(**values).slices(8877, World(size=machines * int(each)), stages)  # refuses what cannot run


def test_help_tells_the_presets_values(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--preset", "quick", "--help"])
    with pytest.raises(SystemExit):
        train_py.parse_arguments()
    told, steps = " ".join(capsys.readouterr().out.split()), train_py.PRESETS["quick"]["num_iterations"]
    assert f"--num_iterations NUM_ITERATIONS steps of the optimizer, in all stages (default: {steps})" in told


def test_learning_rate_rises_rests_and_falls():
    recipe = Recipe(lr=1.0, warmup=10, lr_decay_start=100)
    rates = [recipe.learning_rate(step) for step in (0, 4, 9, 50, 100, 400)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5])
    assert recipe.learning_rate(0, most_warmup=5) == pytest.approx(0.2)


def test_without_a_compiler_training_goes_on_uncompiled(monkeypatch, capsys):
    """torch.compile fails at its first step, not when it is called: a trial must run one."""
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/such/compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    assert not compiles.__wrapped__(torch.device("cpu"))
    assert "torch.compile does not work here" in capsys.readouterr().err


def test_compiling_can_be_turned_off(monkeypatch):
    monkeypatch.setattr(engine, "compiles", lambda device: True)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    assert engine.can_compile(torch.device("cuda")) and not engine.can_compile(torch.device("cpu"))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert not engine.can_compile(torch.device("cuda"))


def test_a_fused_network_is_the_same_function_and_so_are_its_copies(randomised):
    plain = randomised(create_custom_model(unet="small", image_size=32, use_additional_condition=True)).eval()
    fused = copy.deepcopy(plain)
    fusing.fuse(fused)
    other = randomised(copy.deepcopy(fused), 1)  # as a teacher is of a student
    restored = copy.deepcopy(other)
    restored.load_state_dict(plain.state_dict())
    kinds = Counter(type(part) for part in restored.modules())
    assert kinds[fusing.NormFirst] == 2 * kinds[fusing.UnindexedResBlock] + 1 and kinds[fusing.FlashAttention]
    assert not kinds.keys() & fusing.INSTEAD.keys()
    x, t, d = torch.randn(3, 3, 32, 32), torch.rand(3), torch.rand(3) / 2
    results = []
    for model in (plain, fused, restored):
        with Operations() as done:
            y = model.predict(x.requires_grad_(True), t, d)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
        copied_into_zeros = {"slice_backward", "select_backward"} & {name for name, _ in done.calls}
        assert bool(copied_into_zeros) == (model is plain)
    assert not torch.allclose(other.predict(x, t, d), results[0][0], atol=1e-2)
    scale = max(a.abs().max().item() for a in results[0][2:])  # some gradients are zero but for rounding
    for found in results[1:]:
        for a, b in zip(results[0], found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=max(1e-4 * a.abs().max().item(), 1e-6 * scale))


@pytest.mark.parametrize(("on_gpu", "compiling"), [(False, False), (True, False), (True, True)])
def test_a_run_cites_fused_attention_where_it_was_fused(on_gpu, compiling):
    model = create_custom_model(unet="small", image_size=32)
    training = Training(model, np.zeros((8, 3, 32, 32), np.uint8), Recipe(batch_size=8), one_stage(model))
    training.on_gpu, training.compiling = on_gpu, compiling
    assert ("dao2022flashattention" in training.citations) == (on_gpu and not compiling)
    assert training.citations[0] == "challenge2025"


def test_the_best_model_is_chosen_by_noise_that_no_report_scores(faces, workdir, tiny_network, monkeypatch):
    command = ["train.py", "--data_root", str(faces), "--split_dir", str(faces), *SMALL, "--num_iterations", "1"]
    command += ["--save_dir", "run", "--eval_interval", "1", "--eval_samples", "4", "--features", str(tiny_network)]
    monkeypatch.setattr(sys, "argv", command)
    train_py.main()
    scorer = torch.load("run/best_model.pt", weights_only=True)["provenance"]["scorer"]
    assert "4 samples, seed 500000," in scorer  # reports score seeds 0, 1,000,000, ... and on


def test_scores_are_logged_and_the_best_model_kept(small_run):
    ratios = iter([3.0, 2.0, 2.5])
    seen = []

    def evaluate(model):
        seen.append(model.network.head.weight.detach().clone())
        return {"FD[toy] NFE 1": 1.0, "ratio": next(ratios)}

    save_dir = small_run(3, evaluate=evaluate, eval_interval=1)
    best = torch.load(save_dir / "best_model.pt", weights_only=True)
    assert torch.equal(best["state_dict"]["network.head.weight"], seen[1]) and best["provenance"]["step"] == 2
    rows = [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["ratio"] for row in rows if "ratio" in row] == [3.0, 2.0, 2.5]
    ratios = iter([2.2, 2.1])
    small_run(4, evaluate=lambda model: {"ratio": next(ratios)}, eval_interval=1)  # resumed, it knows the best
    assert torch.load(save_dir / "best_model.pt", weights_only=True)["provenance"]["step"] == 2
    with pytest.raises(UserError, match="has 4 iterations already, more than --num_iterations 3"):
        small_run(3)


def test_a_finished_command_run_again_leaves_all_as_it_is(small_run, monkeypatch):
    scored = {"evaluate": lambda model: {"ratio": 2.0}, "eval_interval": 2}
    save_dir = small_run(2, **scored)
    record = json.loads((save_dir / "run.json").read_text())
    kept = {path: path.read_bytes() for path in save_dir.rglob("*") if path.is_file() and path.name != "run.json"}
    monkeypatch.setattr(run_folder, "environment", lambda device: {"commit": "a later one"})
    small_run(2, **scored)
    assert {path: path.read_bytes() for path in kept} == kept
    assert json.loads((save_dir / "run.json").read_text()) == record
    final = save_dir / "final_model.pt"
    older = read_checkpoint(final)
    older["provenance"]["step"] = 1  # of a session that ended early; the last was killed before it wrote this
    for spoil in (final.unlink, lambda: torch.save(older, final), lambda: final.write_bytes(b"half")):
        spoil()
        small_run(2, **scored)
        assert read_checkpoint(final)["provenance"]["step"] == 2


def test_a_finished_run_can_still_be_scored_once(small_run):
    save_dir = small_run(2)
    kept = {path: path.read_bytes() for path in save_dir.glob("*.*t")}  # models and checkpoints
    assert {path.suffix for path in kept} == {".pt", ".ckpt"}
    ratios = iter([2.0])
    for _ in range(2):
        small_run(2, evaluate=lambda model: {"ratio": next(ratios)}, eval_interval=5)
    assert {path: path.read_bytes() for path in kept} == kept
    assert torch.load(save_dir / "best_model.pt", weights_only=True)["provenance"]["step"] == 2


@pytest.fixture
def small_run(faces, workdir):
    """Train a few steps in this process: call with (steps, **recipe)."""
    images, key = load_images(str(faces), str(faces), 32)

    def run(steps, model=None, save_dir=workdir / "run", evaluate=None, **recipe):
        torch.manual_seed(0)
        model = model or create_custom_model(objective="rectified_flow", unet="small", image_size=32)
        recipe = Recipe(**{"batch_size": 8, "num_iterations": steps, "save_interval": 2, "log_interval": 1, **recipe})
        train(
            model,
            {},
            images,
            key,
            recipe,
            one_stage(model, steps, "rectified_flow"),
            save_dir,
            {"lr": recipe.lr},
            evaluate=evaluate,
        )
        return save_dir

    return run


def test_models_without_a_checkpoint_to_go_on_from_are_not_replaced(small_run):
    save_dir = small_run(2, evaluate=lambda model: {"ratio": 2.0}, eval_interval=2)
    for path in save_dir.glob("*.ckpt"):  # 2 GB each on the challenge's network
        path.unlink()
    kept = {path: path.read_bytes() for path in save_dir.iterdir() if path.is_file()}
    for name in ("final_model.pt", "best_model.pt"):
        with pytest.raises(UserError, match=f"run holds {name}, but no last.ckpt to go on from: choose another"):
            small_run(1)
        assert {path: path.read_bytes() for path in kept} == kept
        del kept[save_dir / name]
        (save_dir / name).unlink()
    shutil.copyfile(save_dir / "checkpoint_iter_2.pt", save_dir / "checkpoint_iter_4.pt")
    with pytest.raises(UserError, match="run holds checkpoint_iter_4.pt, but no last.ckpt to go on from"):
        small_run(1)
    (save_dir / "checkpoint_iter_4.pt").unlink()  # one is left if the first save is killed
    small_run(1)
    assert [path.name for path in (save_dir / "averages").iterdir()] == ["1.pt"]


def test_non_finite_loss_stops_and_leaves_the_last_good_checkpoint(small_run):
    save_dir = small_run(2)
    good = (save_dir / "last.ckpt").read_bytes()
    model = create_custom_model(objective="rectified_flow", unet="small", image_size=32)
    model.network.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(UserError, match="not finite.*last.ckpt is still good"):
        small_run(4, model=model)
    assert (save_dir / "last.ckpt").read_bytes() == good


def test_what_is_not_finite_is_no_best_model(small_run, workdir):
    model = create_custom_model(objective="rectified_flow", unet="small", image_size=32)
    model.network.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(UserError, match="not finite around iteration 1; nothing was saved yet"):
        small_run(
            4, model=model, save_interval=4, log_interval=4, evaluate=lambda model: {"ratio": 1.0}, eval_interval=1
        )
    assert not (workdir / "run/best_model.pt").exists()


def test_a_score_that_fails_loses_no_training(small_run, workdir):
    with pytest.raises(ZeroDivisionError):
        small_run(4, evaluate=lambda model: 1 / 0, eval_interval=2)
    assert torch.load(workdir / "run/last.ckpt", weights_only=True)["training"]["step"] == 2
    assert (workdir / "run/checkpoint_iter_2.pt").exists()


def test_speed_is_trainings_alone(small_run, monkeypatch):
    monkeypatch.setattr("src.training.loop.early_preview", lambda step: step == 1)
    monkeypatch.setattr("src.training.run_folder.save_previews", lambda *_: time.sleep(4))
    rows = (small_run(2, log_interval=2) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["images_per_second"] > 4  # two steps of 8 images in much less than 4 s


def test_one_process_trains_in_a_folder_and_not_over_a_model_from_elsewhere(faces, workdir, small_run):
    with alone_in(workdir / "run"):
        result = train_here(faces, workdir, "--save_dir", "run", "--num_iterations", "1")
    assert result.returncode == 1 and not any((workdir / "run").iterdir())
    assert result.stderr.splitlines()[-1] == (
        "error: another process trains in run: wait for it, or choose another --save_dir"
    )
    (workdir / "run/model_config.json").write_text('{"smoothing": {"1": 0.1}}')
    with pytest.raises(UserError, match="run holds a model that was not trained there"):
        small_run(2)
    assert (workdir / "run/model_config.json").read_text() == '{"smoothing": {"1": 0.1}}'
    (workdir / "run/model_config.json").unlink()
    with alone_in(workdir / "run"):  # let go of before
        small_run(2)


def test_another_runs_checkpoint_is_refused_with_the_difference(small_run):
    save_dir = small_run(2)
    before = {path: path.read_bytes() for path in save_dir.rglob("*.*") if path.is_file()}
    with pytest.raises(UserError, match="lr was 0.0001 and is now 0.001"):
        small_run(4, lr=1e-3)
    assert {path: path.read_bytes() for path in save_dir.rglob("*.*") if path.is_file()} == before


def test_full_disk_ends_with_one_line_and_keeps_the_last_checkpoint(faces, workdir, script_env):
    assert train_here(faces, workdir, "--num_iterations", "2", "--save_dir", "run").returncode == 0
    good = (workdir / "run/last.ckpt").read_bytes()
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000,) * 2);"
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = ["--data_root", str(faces), "--split_dir", str(faces), *SMALL, "--num_iterations", "4", "--save_dir", "run"]
    result = subprocess.run(
        [sys.executable, "-c", limited, *flags], cwd=workdir, env=script_env, capture_output=True, text=True
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "error: could not write" in result.stderr.strip().splitlines()[-1]
    assert (workdir / "run/last.ckpt").read_bytes() == good
    assert not list((workdir / "run").glob(".*.tmp"))


def test_full_disk_while_decoding_ends_with_one_line(faces, workdir, monkeypatch):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError):  # which scripts print as one line; a memory map would kill the process
            load_images(str(faces), str(faces), 32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((workdir / "data/cache").iterdir()) == []


@pytest.fixture
def tiny_run(workdir, monkeypatch):
    """Train a network of points in the U-Net's place, without pictures: call with (steps, **what differs)."""
    monkeypatch.setattr(run_folder, "save_previews", lambda *_: None)
    monkeypatch.setattr(run_folder, "plot_curves", lambda *_: None)

    def run(steps, stages="rectified_flow:1", save_dir="run", data="data", teacher=None, evaluate=None, **recipe):
        torch.manual_seed(0)
        model = CustomGenerativeModel(MLP(True, width=8), CustomScheduler(16), objective="rectified_flow")
        images = np.random.default_rng(0).integers(0, 255, (16, 1, 1, 2), np.uint8)
        recipe = Recipe(batch_size=8, num_iterations=steps, **recipe)
        planned = plan(parse_stages(stages), partial(make_objective, scheduler=model.scheduler), steps)
        train(model, {}, images, data, recipe, planned, workdir / save_dir, {}, evaluate=evaluate, teacher=teacher)
        return workdir / save_dir

    return run


def test_a_full_disk_at_the_last_save_leaves_the_model(tiny_run, monkeypatch):
    def full(*_, **__):
        raise UserError("could not write run/next.ckpt: is the disk full? Make room, run again")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="is the disk full"):
        patch.setattr(run_folder, "save_last", full)
        tiny_run(2)
    with pytest.raises(UserError, match="run holds final_model.pt, .* or move the whole folder away"):
        tiny_run(2)


def test_a_run_killed_between_its_last_save_and_its_model_goes_on(tiny_run, monkeypatch):
    export = run_folder.RunFolder.export

    def killed(folder, name):
        if name == "final_model.pt":
            assert (folder.path / "last.ckpt").is_file()  # or the same command would not go on
            raise KeyboardInterrupt
        export(folder, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.RunFolder, "export", killed)
        tiny_run(2)
    assert (tiny_run(2) / "final_model.pt").is_file()


def test_a_checkpoint_that_could_not_be_written_is_written_when_the_run_goes_on(tiny_run, monkeypatch):
    def full(*_):
        raise UserError("is the disk full?")

    with monkeypatch.context() as disk, pytest.raises(UserError, match="full"):
        disk.setattr(run_folder.RunFolder, "export", full)
        tiny_run(4, save_interval=2)
    assert (tiny_run(4, save_interval=2) / "checkpoint_iter_2.pt").is_file()


def test_a_run_killed_after_a_score_and_before_its_first_save_goes_on(tiny_run):
    ratios = iter([2.0])

    def evaluate(model):
        for ratio in ratios:
            return {"ratio": ratio}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_run(4, evaluate=evaluate, eval_interval=1, save_interval=4)
    sessions = json.loads((tiny_run(4, save_interval=4) / "run.json").read_text())["sessions"]
    assert [session["first_step"] for session in sessions] == [0, 1]


def test_a_best_model_that_could_not_be_written_is_scored_and_written_again(tiny_run, monkeypatch):
    def full(model, path, *rest, **kept):
        if Path(path).name == "best_model.pt":
            raise UserError("is the disk full?")
        save_model(model, path, *rest, **kept)

    with monkeypatch.context() as disk, pytest.raises(UserError, match="full"):
        disk.setattr(run_folder, "save_model", full)
        tiny_run(2, evaluate=lambda model: {"ratio": 1.0}, eval_interval=2)
    assert (tiny_run(2, evaluate=lambda model: {"ratio": 1.0}, eval_interval=2) / "best_model.pt").exists()


def test_a_row_is_the_mean_of_its_interval(tiny_run):
    each, both = (
        [json.loads(x) for x in (tiny_run(2, save_dir=name, log_interval=every) / "metrics.jsonl").open()]
        for name, every in (("each", 1), ("both", 2))
    )
    assert each[0]["loss"] != each[1]["loss"]
    assert both[0]["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2)
    assert [row["images"] for row in (*each, *both)] == [8, 16, 16]


def test_a_record_tells_rates_and_the_time_of_all_processes(tiny_run):
    path = tiny_run(1, "rectified_flow/rate=0.5:1", lr=1e-3) / "run.json"
    record = json.loads(path.read_text())
    assert [stage["lr"] for stage in record["stages"]] == [0.5e-3]
    record["sessions"][0] |= {"processes": 2, "seconds": 1800.0}
    write_json(path, record)
    resumed = RunRecord(path, 1, environment(torch.device("cpu")), 4, {})
    resumed.began -= 3600
    resumed.write(3, 8, {})
    record = json.loads(path.read_text())
    assert record["device_hours"] == pytest.approx(1 + 4, rel=1e-3) and record["images_seen"] == 24


def test_a_run_goes_on_with_its_own_data_teacher_and_length_alone(tiny_run):
    annealed = partial(tiny_run, stages="alpha_flow/anneal=12:1")
    annealed(1)
    for change, told in (
        ({"data": "other"}, "data was 'data' and is now 'other'"),
        ({"teacher": Teacher("weights", [])}, "teacher was None and is now 'weights'"),
        ({"steps": 2}, "stages was "),  # its loss would have been another
    ):
        with pytest.raises(UserError, match=told):
            annealed(**{"steps": 1, **change})


def test_a_stages_last_model_is_kept(tiny_run):
    """It may be what another run starts from."""
    kept = tiny_run(5, "rectified_flow:0.4,shortcut:0.6").glob("*.pt")
    assert sorted(path.name for path in kept) == ["checkpoint_iter_2.pt", "checkpoint_iter_5.pt", "final_model.pt"]


def test_early_previews_double_their_distance():
    assert [step for step in range(2000) if early_preview(step)] == [100, 200, 400, 800, 1600]


def test_a_best_model_of_another_scorer_is_not_replaced(tiny_run, workdir):
    assert best_score(workdir, "any") == math.inf
    save_model(torch.nn.Linear(1, 1), "best_model.pt", {}, provenance={"ratio": 0.5, "scorer": "other"})
    assert best_score(workdir, "other") == 0.5
    save_dir = tiny_run(1)
    Path("best_model.pt").rename(save_dir / "best_model.pt")
    kept = {path: path.read_bytes() for path in save_dir.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="best_model.pt was chosen by other scores .other; now .* or move it away"):
        tiny_run(2, evaluate=lambda model: {"ratio": 0.1}, eval_interval=1)
    assert {path: path.read_bytes() for path in kept} == kept
    save_model(torch.nn.Linear(1, 1), "best_model.pt", {}, provenance={"ratio": 0.5, "scorer": "seed 1, floor 2"})
    assert best_score(workdir, "seed 1, images some") == 0.5  # an older version's, with the same flags
    with pytest.raises(UserError, match="chosen by other scores .seed 1; now seed 2"):
        best_score(workdir, "seed 2, images some")


def test_a_best_model_that_was_moved_away_is_chosen_anew(tiny_run):
    for ratio in (1.0, 2.0):
        save_dir = tiny_run(2, evaluate=lambda model, ratio=ratio: {"ratio": ratio}, eval_interval=2)
        assert read_checkpoint(save_dir / "best_model.pt")["provenance"]["ratio"] == ratio
        (save_dir / "best_model.pt").unlink()


def test_learning_rate_warms_up_and_the_gradient_is_clipped(small_run, monkeypatch):
    clipped = []
    original = torch.nn.utils.clip_grad_norm_

    def clip(parameters, max_norm):
        parameters = list(parameters)
        norm = original(parameters, max_norm)
        clipped.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    rows = [json.loads(x) for x in (small_run(4, warmup=4, grad_clip=0.01) / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4])
    assert all(row["gradient_norm"] > 0.02 for row in rows)
    assert clipped == pytest.approx([0.01] * 4, rel=1e-2)


def test_exports_and_previews_are_the_average_not_the_last_weights(small_run):
    save_dir = small_run(4, lr=1e-2, warmup=1)
    state = torch.load(save_dir / "last.ckpt", weights_only=True)
    exported = torch.load(save_dir / "final_model.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state["state_dict"][key]) for key, value in exported.items())
    assert not torch.equal(exported["network.head.weight"], state["training"]["student"]["network.head.weight"])

    model = create_custom_model(objective="rectified_flow", unet="small", image_size=32)
    model.load_state_dict(exported)
    noise = [torch.Generator().manual_seed(42 + i) for i in range(8)]
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(torch.device("cpu"))):  # the run's own precision
        expected = tensor_to_pil_image(model.sample((8, 3, 32, 32), 4, generator=noise))
    for i in range(4):
        assert np.array_equal(np.asarray(Image.open(save_dir / f"iter=4_sample_{i}.png")), np.asarray(expected[i]))


def test_bf16_is_used_where_it_is_asked_for():
    model = create_custom_model(objective="shortcut", unet="small", image_size=32)
    kinds = set()
    model.network.head.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    data = torch.randn(8, 3, 32, 32)
    for bf16, kind in ((True, torch.bfloat16), (False, torch.float32)):
        kinds.clear()
        loss_module = Loss(model.objective.loss, Nets(model, copy.deepcopy(model).eval()), model)
        accumulate_gradient(loss_module, data, torch.randn_like(data), model.objective.draw(data.shape), 0.0, bf16=bf16)
        assert kinds == {kind}
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        model.zero_grad()


def test_images_are_decoded_once_and_again_when_they_change(faces, workdir):
    images, key = load_images(str(faces), str(faces), 32)
    assert images.shape == (24, 3, 32, 32) and images.dtype == np.uint8
    first = (faces / "train_split.txt").read_text().split()[0]
    expected = np.asarray(Image.open(faces / f"{first}.png").resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(images[0].transpose(1, 2, 0), expected)
    (cached,) = (workdir / "data/cache").iterdir()
    before = cached.stat().st_mtime_ns
    assert load_images(str(faces), str(faces), 32)[1] == key and cached.stat().st_mtime_ns == before

    changed = workdir / "changed"
    changed.mkdir()
    for path in faces.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (64, 64)).save(changed / f"{first}.png")
    others, other_key = load_images(str(changed), str(changed), 32)
    assert other_key != key and others[0].max() == 0


def test_small_images_are_the_same_from_full_size_files_and_from_the_challenges(workdir):
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    found = []
    for folder, image in (("full", noise), ("kept", noise.resize((64, 64), Image.Resampling.BILINEAR))):
        Path(folder).mkdir()
        image.save(f"{folder}/1.png")
        Path(folder, "train_split.txt").write_text("1\n")
        found += [load_images(folder, folder, 32)[0][0] / 127.5 - 1, to_pixels(32)(image).numpy()]
    assert all(np.allclose(found[0], one, atol=1e-6) for one in found[1:])


def test_every_epoch_shows_every_image_once():
    steps = [batch_indices(10, 4, seed=1, step=s) for s in range(5)]
    order = np.concatenate(steps)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert list(order[:10]) != list(order[10:])
    assert np.array_equal(steps[3], batch_indices(10, 4, seed=1, step=3))


def test_batches_are_flipped_half_the_time():
    images = np.tile(np.arange(4, dtype=np.uint8) * 80, (1, 3, 4, 1))
    torch.manual_seed(0)
    data = to_batch(torch.from_numpy(images), np.zeros(1000, dtype=int))
    assert data.min() == -1 and data.max() == pytest.approx(240 / 127.5 - 1)
    flipped = data[:, 0, 0, 0] > 0
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(data[flipped][0], data[~flipped][0].flip(-1))


def test_ema_forgets_its_start_and_never_drops_out():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Dropout())
    torch.nn.init.constant_(model[0].weight, 100)
    ema = EMA(model, decay=0.99)
    values = []
    for update in range(1, 2001):
        torch.nn.init.constant_(model[0].weight, update)
        ema.update(model, update)
        values.append(ema.model[0].weight.item())
    assert not ema.model[1].training and not ema.model[0].weight.requires_grad
    assert values[0] == 1  # nothing of the initial weights
    gamma = gamma_of(0.1)
    assert values[199] == pytest.approx(200 * (gamma + 1) / (gamma + 2), rel=0.01)  # a share of the training so far
    assert values[-1] == pytest.approx(2000 - 99, abs=0.5)  # a constant number of steps
