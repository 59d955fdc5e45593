"""The comparison of objectives: what it measures is measured once, and never passed off as something else."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_to_the_end_here

import train as train_py
from benchmarks import objectives, prepare, throughput, timed_chain
from custom_model import create_custom_model
from src.errors import UserError
from src.files import write_json
from src.images import split_paths
from src.objectives import make_objective, parse_stages
from src.training.data import load_images
from src.training.recipe import plan
from src.utils import load_model, save_model


def test_objectives_are_measured_once_with_each_training_seed(faces, workdir, tiny_network, randomised, monkeypatch):
    config = {"unet": "small", "image_size": 32, "objective": "rectified_flow", "use_additional_condition": True}
    # Trained: in noise a smoothing finds no edges.
    model = load_model(Path(train_py.__file__).with_name("checkpoints") / "start32/float16.pt", create_custom_model)
    (workdir / "start").mkdir()
    (workdir / "train.py").symlink_to(train_py.__file__)
    torch.save(model.state_dict(), "start/final_model.pt")
    write_json(workdir / "start/model_config.json", {**config, "num_train_timesteps": 1000})

    def compare(objective="rectified_flow", out="compared") -> str:
        command = ["objectives", "--start", "start/final_model.pt", "--budget", "60", "--objectives", objective,
                   "--training_seeds", "1", "2", "--samples", "8", "--seeds", "2", "--smoothed", "--device", "cpu",
                   "--data_root", str(faces), "--split_dir", str(faces), "--features", str(tiny_network),
                   "--out", out, "--", "--batch_size", "4"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(objectives, "SEARCHED", 16)
        sigma, strengths = objectives.SETTINGS["smoothing"]
        monkeypatch.setitem(objectives.SETTINGS, "smoothing", (sigma, strengths[::6]))  # not a test of these
        objectives.main()
        monkeypatch.setattr(objectives, "run_to_the_end", run_to_the_end_here)  # once by itself is enough
        return (workdir / "compared/table.md").read_text()

    with pytest.raises(UserError, match="the budget does not reach for reflow"):  # its pairs alone cost more
        compare("reflow", "refused")
    assert not Path("refused").exists()  # nor was the start scored

    table = compare()
    rows = json.loads((workdir / "compared/objectives.json").read_text())["rows"]
    one, two = rows["rectified_flow"]
    assert one["distances"] != two["distances"] and len(one["distances"]["4"]) == 2
    assert 2.9 < one["evaluations_a_sample"] < 3.3 and one["samples"] == 20  # 60 evaluations at 3 each
    assert "1.65 M parameters at 32x32, 24 training images; training seeds 1, 2; commit " in table
    cells = table.splitlines()[-2].split("|")
    a, b = (sum(run["distances"]["1"]) / 2 for run in (one, two))
    half = 12.706 * abs(a - b) / 2  # Student's t of two runs: over these, not over their four sampled distances
    assert [float(part) for part in cells[5].split("±")] == pytest.approx([(a + b) / 2, half], abs=0.02)
    smooth = rows["rectified_flow, smoothed"]
    for plain, smoothed in zip((one, two), smooth, strict=True):
        assert smoothed["samples"] == plain["samples"] and smoothed["distances"] != plain["distances"]
    assert table.splitlines()[-1].startswith("| rectified_flow, smoothed | ")
    assert json.loads((workdir / "compared/rectified_flow/seed1/smooth/model_config.json").read_text())["smoothing"]
    for picture in ("grid.png", "curve.png"):
        assert (workdir / "compared" / picture).stat().st_size > 1000

    trained = workdir / "compared/rectified_flow/seed1/final_model.pt"
    written = trained.stat().st_mtime_ns
    assert compare() == table and trained.stat().st_mtime_ns == written

    scores, record = trained.with_name("scores.json"), trained.with_name("run.json")
    trained_by = json.loads(record.read_text())
    for session in trained_by["sessions"]:
        session["environment"] |= {"commit": "f" * 40, "clean_tree": True}
    write_json(record, trained_by)
    scores.unlink()
    assert "fffffff" in compare()  # the commit that trained it, not the one that scores it now
    measured = json.loads(scores.read_text())
    measured["settings"]["options"][0]["rate"] = 0.5  # as if this had been the default
    write_json(scores, measured)
    with pytest.raises(UserError, match="seed1/scores.json was measured with"):
        compare()

    torch.save(randomised(create_custom_model(**config), 2).state_dict(), "start/final_model.pt")
    with pytest.raises(UserError, match="start/scores.json was measured with"):
        compare()  # with another start of the same name


def test_a_single_measurement_has_no_interval():
    run = {"distances": {"1": [3.0], "2": [2.0], "4": [1.0]}, "evaluations_a_sample": 3, "samples": 8, "hours": 1}
    assert objectives.table({"one": [run]})[-1].endswith("| 3.00 | 2.00 | 1.00 |")
    assert "| 3.00 ± 0.00 |" in objectives.table({"two": [run, run]})[-1]


def test_bad_arguments_get_one_line_before_anything_is_scored(workdir, monkeypatch):
    config = {"unet": "small", "image_size": 32, "objective": "rectified_flow"}
    torch.save(create_custom_model(**config).state_dict(), "start.pt")
    write_json("model_config.json", config)

    def refused(message: str, *flags: str) -> None:
        argv = ["objectives", "--start", "start.pt", "--objectives", "shortcut", "--budget", "60", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*argv, "--data_root", "none", "--split_dir", "none", *flags])
        with pytest.raises(UserError, match=message):
            objectives.main()

    refused("has no extra condition, which jumps need")
    config["use_additional_condition"] = True
    write_json("model_config.json", config)
    weights = create_custom_model(**config).state_dict()
    torch.save({"state_dict": weights, "training": {"critic": {}}}, "last.pt")
    torch.save(weights, "start.pt")
    refused("last.pt would bring its critic to some of them", "--start", "last.pt")
    refused("--preset=quick after -- is for this script to choose", "--", "--preset=quick")
    refused("--seeds must be at least 1", "--seeds", "0")
    refused("--budget nan: a number of network evaluations", "--budget", "nan")
    refused("--batch_size 0 after --: at least 1", "--", "--batch_size", "0")
    refused("name each training seed once", "--training_seeds", "1", "1")


def test_prepare_replaces_no_folder_but_its_own(workdir, monkeypatch):
    (workdir / "results").mkdir()
    (workdir / "results/run.json").write_text("{}")
    for folder in ("results", "."):
        monkeypatch.setattr(sys, "argv", ["prepare", "--features", "none.pt", "--out", folder])
        with pytest.raises(UserError, match="holds other files, and would be replaced"):
            prepare.main()
    assert (workdir / "results/run.json").exists()


def test_prepare_wants_a_feature_network_before_all_else(faces, workdir, monkeypatch):
    (workdir / "junk.pt").write_bytes(b"junk")
    flags = ["--data_root", str(faces), "--split_dir", str(faces), "--features", "junk.pt"]
    monkeypatch.setattr(sys, "argv", ["prepare", *flags])
    with pytest.raises(UserError, match="junk.pt is no TorchScript network"):
        prepare.main()
    assert not (workdir / "gpu").exists()


def test_prepared_parts_hold_what_training_and_what_scores_need(faces, workdir, tiny_network, randomised, monkeypatch):
    config = {"unet": "small", "image_size": 32, "objective": "shortcut", "use_additional_condition": True}
    model = randomised(create_custom_model(**config))
    save_model(model, workdir / "start/final_model.pt", {**config, "num_train_timesteps": 1000})
    command = ["prepare", "--data_root", str(faces), "--split_dir", str(faces), "--features", str(tiny_network),
               "--start", "start/final_model.pt", "--size", "32"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    prepare.main()
    ours = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OUT": "evidence"}

    def begin(part: str) -> str:
        """What a step finds on a machine that only this part was sent to."""
        shutil.rmtree("machine/gpu", ignore_errors=True)
        shutil.copytree(f"gpu/{part}", f"machine/gpu/{part}")
        shutil.copy("gpu/env.sh", "machine/gpu")
        command = ["bash", "-c", ". gpu/env.sh; touch $TORCHINDUCTOR_CACHE_DIR/program; echo $FACES $FEATURES"]
        return subprocess.run(command, cwd="machine", env=ours, check=True, capture_output=True, text=True).stdout

    begin("train")
    images, _ = load_images("machine/results/faces", "machine/results/faces", 32)
    assert np.array_equal(images, load_images(str(faces), str(faces), 32)[0])  # at their size already: not once more
    start = load_model("machine/results/start.pt", create_custom_model)
    for found, weight in zip(start.parameters(), model.parameters(), strict=True):
        assert (found - weight).abs().max() <= weight.abs().max() / 125  # 8 bits: a step
    assert not list(Path("machine/results/faces").glob("val_split.txt"))
    named = begin("score")
    assert len(split_paths("machine/results/faces", "val", "machine/results/faces")) > 0
    assert Path("machine/results/compiled/program").is_file()  # where the plan packs what PyTorch compiled
    assert (Path("machine") / named.split()[-1]).is_file() and Path("machine/evidence").is_dir()


def test_throughput_trains_the_first_of_unfolded_stages_and_refuses_no_rounds(faces, workdir, monkeypatch):
    monkeypatch.setattr(throughput, "create_custom_model", partial(create_custom_model, unet="small"))
    args = argparse.Namespace(data_root=str(faces), split_dir=str(faces), objective="progressive", batch_size=2)
    training = throughput.engine(args, torch.device("cpu")).__self__
    assert len(training.stages) > 1 and training.stage.objective.steps > 0
    monkeypatch.setattr(sys, "argv", ["throughput", "--data_root", ".", "--split_dir", ".", "--rounds", "0"])
    with pytest.raises(UserError, match="must be at least 1"):
        throughput.main()


def test_timed_chain_fits_its_steps_to_the_time(workdir, monkeypatch):
    rows = [(0, 1), (0, 200), (0, 190), (0, 210), (1, 2), (1, 20), (1, 25), (1, 3)]  # compiling and saving are slow
    (workdir / "metrics.jsonl").write_text(
        "".join(f'{{"stage": {stage}, "images_per_second": {speed}}}\n' for stage, speed in rows)
    )
    assert timed_chain.speeds(workdir) == [200, 14]
    shares = [("alpha_flow", 0.25), ("adversarial/gamma=0.1", 0.75)]
    stages, steps = timed_chain.fitted(shares, 600.0, [200.0, 20.0], 10)
    planned = plan(parse_stages(stages), lambda name: make_objective(name, None), steps)
    assert [(stage.name, stage.steps) for stage in planned] == [("alpha_flow", 3000), ("adversarial/gamma=0.1", 900)]
    with pytest.raises(UserError, match="1 seconds are left, which do not fit a step"):
        timed_chain.fitted(shares, 0.6, [200.0, 20.0], 10)

    calls = []
    monkeypatch.setattr(timed_chain, "TRIAL", 4)
    monkeypatch.setattr(timed_chain, "train_here", lambda *arguments: calls.append(arguments) or trained(*arguments))

    def trained(*arguments: str) -> None:
        flags = dict(zip(*[iter(arguments)] * 2, strict=True))
        folder = Path(flags["--save_dir"])
        folder.mkdir(parents=True)
        shutil.copy("metrics.jsonl", folder)
        write_json(folder / "training_config.json", {key: flags[f"--{key}"] for key in timed_chain.KEPT})

    argv = (
        "timed_chain --minutes 1 --stages alpha_flow:0.5,adversarial:0.5 --batch_size 8 --out run -- --seed 1".split()
    )
    monkeypatch.setattr(sys, "argv", argv)
    timed_chain.main()
    trial, chain = (dict(zip(*[iter(arguments)] * 2, strict=True)) for arguments in calls)
    assert trial["--num_iterations"] == "8" and chain["--seed"] == "1" and float(chain["--max_minutes"]) < 1
    assert int(chain["--num_iterations"]) == pytest.approx(28 * (200 + 14) / 8, rel=0.05)
    assert not (workdir / "run/trial").exists()

    shutil.move("run/chain", "interrupted")
    calls.clear()
    (workdir / "run/chain").mkdir()
    shutil.copy("interrupted/training_config.json", "run/chain")
    monkeypatch.setattr(timed_chain, "train_here", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(sys, "argv", argv)
    timed_chain.main()
    (again,) = (dict(zip(*[iter(arguments)] * 2, strict=True)) for arguments in calls)
    assert {key: again[f"--{key}"] for key in timed_chain.KEPT} == {key: chain[f"--{key}"] for key in timed_chain.KEPT}
    with monkeypatch.context() as patch, pytest.raises(UserError, match="start it without torchrun"):
        patch.setenv("RANK", "0")
        timed_chain.main()

    monkeypatch.setattr(sys, "argv", [part.replace("alpha_flow", "shortcut") for part in argv])
    with pytest.raises(UserError, match="run/chain trains alpha_flow, adversarial, not shortcut, adversarial"):
        timed_chain.main()

    monkeypatch.setattr(sys, "argv", [part.replace("alpha_flow", "reflow/pairs=8") for part in argv])
    with pytest.raises(UserError, match="reflow/pairs=8 generates pairs, twice here and beyond the minutes"):
        timed_chain.main()

    for flag in ("--batch", "--eval_interval"):  # the one was ignored, the other's scores taken for speeds
        monkeypatch.setattr(sys, "argv", [*argv, flag, "8"])
        with pytest.raises(UserError, match=f"{flag} after -- is for this script to choose"):
            timed_chain.main()
