"""The official base code, and a run's model on its way to a submission."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from custom_model import create_custom_model
from src.errors import UserError
from src.files import write_json
from src.quantise import quantised, restore_quantised
from src.submission import base_code
from src.training.export import export
from src.utils import load_model, read_checkpoint, save_model

CHECKPOINTS = Path(base_code.__file__).resolve().parents[2] / "checkpoints"


@pytest.fixture
def official(workdir, monkeypatch):
    """A stand-in for a clone of the base code, and a manifest that fits it."""
    clone = workdir / "clone"
    manifest = {}
    for name in ("src/network.py", "data/train_split.txt", "data/val_split.txt", "sampling.py", "README.md"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(f"{name}\n")
        manifest[name] = {"sha256": hashlib.sha256(f"{name}\n".encode()).hexdigest(), "frozen": name != "README.md"}
    monkeypatch.setattr(base_code, "MANIFEST", manifest)
    return clone


def test_base_code_is_brought_with_its_splits(official, workdir):
    base_code.bring(official)
    assert (workdir / "base_code/src/network.py").read_text() == "src/network.py\n"
    assert (workdir / "data/val_split.txt").read_text() == "data/val_split.txt\n"
    assert base_code.faults(workdir / "base_code") == []


def test_altered_or_missing_files_are_named_and_nothing_is_written(official, workdir):
    (official / "sampling.py").write_text("altered\n")
    (official / "data/val_split.txt").unlink()
    message = "data/val_split.txt is missing; sampling.py is not the official file"
    with pytest.raises(UserError, match=message):
        base_code.bring(official)
    assert not (workdir / "base_code").exists() and not (workdir / "data").exists()


def test_an_altered_file_that_nobody_needs_is_left_out(official, workdir, capsys):
    (official / "README.md").write_text("a typo less\n")
    assert "README.md" not in base_code.bring(official)
    assert capsys.readouterr().err == "warning: README.md is not the official file, and is left out\n"
    assert base_code.faults(workdir / "base_code") == ["README.md is missing"]


def test_without_a_connection_there_is_one_line(workdir, script_env):
    env = {**script_env, "https_proxy": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-m", "src.submission", "base-code"], cwd=workdir, env=env, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1 and "--from DIR" in result.stderr


def test_the_official_splits_match_the_table(shared):
    for split in ("train", "val"):
        digest = hashlib.sha256((shared / f"data/split/{split}_split.txt").read_bytes()).hexdigest()
        assert digest == base_code.MANIFEST[f"data/{split}_split.txt"]["sha256"]


def test_no_official_file_is_ours():
    """Our files of the same name are written afresh."""
    root = base_code.Path(base_code.__file__).resolve().parents[2]
    ours = [name for name in base_code.MANIFEST if (root / name).is_file() and name.endswith(".py")]
    assert len(ours) > 8
    for name in ours:
        digest = hashlib.sha256((root / name).read_bytes()).hexdigest()
        empty = hashlib.sha256(b"").hexdigest()
        assert digest == empty or digest != base_code.MANIFEST[name]["sha256"], name


@pytest.fixture
def finished_run(workdir, randomised):
    """A run's folder with a best and a final model, of the challenge's settings but for a small network."""
    config = {"objective": "rectified_flow", "unet": "full", "image_size": 64}
    for seed, name in ((1, "final_model.pt"), (2, "best_model.pt")):
        model = randomised(create_custom_model(objective="rectified_flow", unet="small"), seed)
        save_model(model, str(workdir / "run" / name), config, provenance={"step": seed}, training={"optimizer": {}})
    return workdir / "run"


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_export_takes_the_best_model_and_nothing_else(finished_run, workdir, dtype):
    assert export(finished_run, dtype=dtype).name == "best_model.pt"
    saved = torch.load(workdir / "checkpoints/best_model.pt", weights_only=True)
    assert set(saved) == {"state_dict", "model_config", "provenance"} and saved["provenance"] == {"step": 2}
    assert getattr(torch, dtype) in {value.dtype for value in saved["state_dict"].values()}
    assert export(finished_run, "final_model.pt", dtype).name == "final_model.pt"

    config = json.loads((workdir / "checkpoints/model_config.json").read_text())
    assert config["unet"] == "full"
    write_json(workdir / "checkpoints/model_config.json", {**config, "unet": "small"})
    images = []
    for path in (workdir / "run/final_model.pt", workdir / "checkpoints/best_model.pt"):
        model = load_model(str(path), create_custom_model, "cpu", str(workdir / "checkpoints/model_config.json"))
        images.append(model.sample((2, 3, 64, 64), 4, generator=torch.Generator().manual_seed(0)))
    # With random weights, after four jumps; of values in about [-1, 1].
    most = {"float32": 0, "float16": 0.01, "int8": 0.2}[dtype]
    assert (images[0] - images[1]).abs().mean() <= most
    sizes = {"float32": 1, "float16": 0.5, "int8": 0.25}
    ratio = (workdir / "checkpoints/best_model.pt").stat().st_size / (workdir / "run/final_model.pt").stat().st_size
    assert ratio == pytest.approx(sizes[dtype], abs=0.02)


def test_export_tells_of_steps_that_were_never_scored(finished_run, capsys):
    """A run that went on without --eval_interval: its best model is the best of an early part."""
    rows = [{"step": step, "loss": 1.0} | ({"ratio": 2.0} if step < 2 else {}) for step in (0, 1, 2)]
    (finished_run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, told in ((1, ""), (2, "is further by 1 steps, never scored: --checkpoint final_model.pt takes it")):
        path = finished_run / "final_model.pt"
        torch.save({**read_checkpoint(path), "provenance": {"step": step}}, path)
        with (finished_run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "rat')  # killed while writing it
        assert export(finished_run).name == "best_model.pt"
        assert (told in capsys.readouterr().err) if told else not capsys.readouterr().err


def test_without_scores_export_takes_the_model_that_was_trained_further(finished_run):
    """A session that --max_minutes ended wrote a final model, and the next one was interrupted."""
    (finished_run / "best_model.pt").rename(finished_run / "last.ckpt")
    assert export(finished_run).name == "last.ckpt"
    final = read_checkpoint(finished_run / "final_model.pt")
    torch.save({**final, "provenance": {"step": 2}}, finished_run / "final_model.pt")
    assert export(finished_run).name == "final_model.pt"
    torch.save({**final, "provenance": {}}, finished_run / "final_model.pt")
    (finished_run / "last.ckpt").write_bytes(b"of a disk that was full")
    assert export(finished_run).name == "final_model.pt"
    (finished_run / "final_model.pt").unlink()
    with pytest.raises(UserError, match="last.ckpt is not a readable checkpoint"):
        export(finished_run)


def test_eight_bits_are_within_a_step_and_their_sums_within_half_a_step():
    state = {"weight": torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)), "bias": torch.ones(5)}
    state["weight"][2] = 0
    small = quantised(state)
    assert small["weight"].dtype == torch.int8 and small["bias"].dtype == torch.float16
    restore_quantised(small)
    step = state["weight"].abs().amax((1, 2, 3), keepdim=True) / 127
    error = (small["weight"] - state["weight"]) / step.clamp(min=1e-9)
    assert set(small) == set(state) and error.abs().max() <= 1.001
    assert error.flatten(1).cumsum(1).abs().max() <= 0.501


def test_eight_bits_keep_a_small_share_of_another_models_weights():
    """Weights on the points of a grid, each moved by less than half a step, all round back to where they were."""
    end, start = torch.randn(2, 16, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    small = quantised({"weight": end})
    restore_quantised(small)
    end = small["weight"]
    start = end + 0.01 * start
    small = quantised({"weight": end.lerp(start, 0.15)})
    restore_quantised(small)
    moved, wanted = small["weight"] - end, start - end
    assert 0.14 < (moved * wanted).sum() / wanted.square().sum() < 0.16


def test_what_was_exported_can_be_exported_again(finished_run, workdir):
    """As a model that travels in 8 bits from one machine to the next, and on."""
    first, second = workdir / "first/model.pt", workdir / "second/model.pt"
    export(finished_run, dtype="int8", target=first)
    for dtype in ("float32", "float16", "int8"):
        export(first.parent, first.name, dtype, second)
        once, again = (torch.load(path, weights_only=True)["state_dict"] for path in (first, second))
        restore_quantised(once), restore_quantised(again)
        assert set(once) == set(again)
        for name, value in once.items():
            torch.testing.assert_close(again[name].float(), value.float(), rtol=1e-3, atol=1e-5)


def test_export_refuses_what_no_submission_may_use(finished_run, workdir):
    with pytest.raises(UserError, match="holds none of best_model.pt"):
        export(workdir)
    for name, value in (("unet", "small"), ("image_size", 32)):
        config = {"objective": "rectified_flow", name: value}
        write_json(finished_run / "model_config.json", config)
        with pytest.raises(UserError, match=f"trained with {name}={value!r}"):
            export(finished_run)
        with pytest.raises(UserError, match=f"trained with {name}={value!r}"):  # by another spelling of the place
            export(finished_run, target=workdir / "checkpoints/best_model.pt")
    assert not (workdir / "checkpoints").exists()


@pytest.mark.parametrize(
    "checkpoint, out, told",
    [
        ("final_model.pt", "run/final_model.pt", "would replace a model of run"),
        (None, "run/final_model.pt", "would replace a model of run"),
        ("final_model.pt", "other/mine.pt", "other/model_config.json is another model's, of theirs.pt"),
        ("early.pt", "run/again.pt", "is another model's, of best_model.pt, early.pt, final_model.pt"),
        (None, "run", "names no checkpoint"),
        (None, "other/new", "names no checkpoint"),
        (None, ".", "names no checkpoint"),
    ],
)
def test_export_spoils_no_other_model(finished_run, workdir, checkpoint, out, told):
    early = torch.load(finished_run / "final_model.pt", weights_only=True)
    torch.save({**early, "model_config": {"objective": "shortcut"}}, finished_run / "early.pt")  # of a stage before
    (workdir / "other").mkdir()
    (workdir / "other/theirs.pt").touch()
    write_json(workdir / "other/model_config.json", {"objective": "shortcut"})
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=told):
        export(Path("run"), checkpoint, "int8", Path(out))
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    export(Path("run"), None, "int8", Path("run/small.pt"))  # one more, with the same config


def test_official_files_over_ours_give_the_same_images(workdir, randomised, faces, script_env):
    """Needs `python -m src.submission base-code`; the official files are not ours to commit."""
    root = base_code.Path(base_code.__file__).resolve().parents[2]
    if not (root / "base_code").is_dir():
        pytest.skip("no base_code/: fetch it with `python -m src.submission base-code`")
    model = randomised(create_custom_model(unet="small"))
    save_model(model, str(workdir / "run/model.pt"), {"unet": "small", "objective": "shortcut"})
    small = {"state_dict": quantised(model.state_dict())}  # as an export with --dtype int8
    save_model(model, str(workdir / "int8/model.pt"), {"unet": "small", "objective": "shortcut"})
    torch.save(small, workdir / "int8/model.pt")
    trees = {}
    for name in ("ours", "official"):
        tree = workdir / name
        for part in ("custom_model.py", "train.py", "dataset.py", "sampling.py", "measure_fid.py"):
            tree.mkdir(exist_ok=True)
            shutil.copyfile(root / part, tree / part)
        shutil.copytree(root / "src", tree / "src")
        if name == "official":
            for part, entry in base_code.MANIFEST.items():
                if entry["frozen"] and part.endswith(".py"):
                    shutil.copyfile(root / "base_code" / part, tree / part)
        commands = [
            ["sampling.py", "--ckpt_path", "../run/model.pt", "--num_samples", "6", "--batch_size", "4"],
            ["sampling.py", "--ckpt_path", "../int8/model.pt", "--num_samples", "6", "--save_dir", "samples/int8"],
            ["train.py", "--data_root", str(faces), "--split_dir", str(faces), "--unet", "small", "--batch_size", "4",
             "--num_iterations", "2", "--save_dir", "trained"],
        ]  # fmt: skip
        for command in commands:
            result = subprocess.run(
                [sys.executable, *command, "--device", "cpu"], cwd=tree, capture_output=True, text=True,
                env={**script_env, "PYTHONPATH": str(tree)},
            )  # fmt: skip
            assert result.returncode == 0, result.stderr
        trees[name] = {path.relative_to(tree): path.read_bytes() for path in (tree / "samples").rglob("*.png")}
        trees[name] |= {"weights": torch.load(tree / "trained/final_model.pt")["state_dict"]["network.head.weight"]}
    assert len(trees["ours"]) == 37
    assert torch.equal(trees["ours"].pop("weights"), trees["official"].pop("weights"))
    assert trees["ours"] == trees["official"]


@pytest.mark.parametrize("name", ["float16", "int8"])
def test_released_models_load_and_draw_faces(name):
    """They are an experiment's: small network, 32x32."""
    model = load_model(str(CHECKPOINTS / f"small32/{name}.pt"), create_custom_model)
    noise = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = [model.sample(noise.shape, nfe, noise=noise) for nfe in (1, 4)]
    # The yellow of the faces, in the middle of the image: much red and green, little blue.
    for sampled in images:
        red, green, blue = sampled[:, :, 8:24, 8:24].mean((0, 2, 3)).tolist()
        assert red > green > blue and red - blue > 0.5
    assert (images[0] - images[1]).abs().mean() < 0.6
    assert images[0].std(0).mean() > 0.2  # different noise, different faces


def test_the_flow_with_mild_times_draws_what_the_other_draws():
    """checkpoints/start32_mild: the time embedding fitted anew for a scale of 16, for mean_flow."""
    noise = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    folders = CHECKPOINTS / "start32", CHECKPOINTS / "start32_mild"
    models = [load_model(str(folder / "float16.pt"), create_custom_model) for folder in folders]
    assert [model.scheduler.num_train_timesteps for model in models] == [1000, 16]
    steep, mild = (model.sample(noise.shape, 8, noise=noise) for model in models)
    assert (steep - mild).square().mean() < 0.1 * (steep - steep.roll(1, 0)).square().mean()


@pytest.mark.parametrize("name", ["start64", "full64"])
def test_the_models_to_go_on_from_are_the_challenges_network(name):
    model = load_model(str(CHECKPOINTS / name / "int8.pt"), create_custom_model)
    assert sum(p.numel() for p in model.parameters()) == 59_934_979 and model.image_size == 64
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    red, green, blue = model.sample(noise.shape, 4, noise=noise)[0, :, 16:48, 16:48].mean((1, 2)).tolist()
    assert red > green > blue and red - blue > 0.5
