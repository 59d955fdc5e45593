"""sampling.py, measure_fid.py, dataset.py and src/utils.py: the challenge's interface."""

import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cleanfid.fid
import numpy as np
import pytest
import torch
from commands import started
from PIL import Image
from torchvision import transforms

import measure_fid
from custom_model import create_custom_model
from dataset import SimpsonsDataModule, SimpsonsDataset, get_data_iterator
from src.errors import UserError
from src.evaluation.features import Features
from src.evaluation.reference import write_reference
from src.files import cached_array, replacing_folder, write_json
from src.images import DATA_ROOT, read_rgb, split_paths
from src.quantise import quantised
from src.utils import load_model, pick_device, save_model, seed_everything, tensor_to_pil_image

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"model_type": "CustomGenerativeModel", "objective": "shortcut", "unet": "small"}


@pytest.fixture
def checkpoint(workdir, randomised) -> str:
    model = randomised(create_custom_model(objective="shortcut", unet="small"))
    save_model(model, str(workdir / "run/model.pt"), CONFIG)
    return str(workdir / "run/model.pt")


def sampling(cwd, env, *flags):
    command = [sys.executable, str(ROOT / "sampling.py"), "--device", "cpu", *flags]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_sampling_equals_the_contract_to_the_byte(checkpoint, workdir, script_env):
    result = sampling(workdir, script_env, "--ckpt_path", checkpoint, "--num_samples", "5", "--batch_size", "2")
    assert result.returncode == 0, result.stderr

    seed_everything(42)  # seed, build, load; then every NFE and batch in order from one generator
    model = load_model(checkpoint, create_custom_model, "cpu", None).eval()
    for nfe in (1, 2, 4):
        written = sorted((workdir / f"samples/nfe={nfe}").iterdir())
        assert [path.name for path in written] == [f"{i:04d}.png" for i in range(5)]
        for start, count in ((0, 2), (2, 2), (4, 1)):  # the last batch is a single image
            images = tensor_to_pil_image(model.sample((count, 3, 64, 64), num_inference_timesteps=nfe))
            for path, image in zip(written[start:], images, strict=False):
                assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))


def test_a_folder_is_replaced_whole_or_not_at_all(workdir, monkeypatch):
    folder = workdir / "images"

    def write(name):
        with replacing_folder(folder) as partial:
            (partial / name).touch()

    write("first")
    assert [path.name for path in folder.iterdir()] == ["first"]
    rename = Path.rename
    for first, last in ((0, 1), (1, 2)):  # interrupted before the first rename, and between the two
        calls = iter(range(9))

        def interrupted(path, target, calls=calls, last=last, first=first):
            if first <= next(calls) < last:
                raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write("second")
        assert [path.name for path in folder.iterdir()] == ["first"]
    monkeypatch.setattr(Path, "rename", rename)
    write("second")
    assert [path.name for path in folder.iterdir()] == ["second"] and list(workdir.iterdir()) == [folder]


def test_sampling_replaces_its_own_images_and_nothing_else(checkpoint, workdir, script_env):
    flags = ["--ckpt_path", checkpoint, "--nfe_list", "1", "--num_samples"]
    assert sampling(workdir, script_env, *flags, "3").returncode == 0
    assert sampling(workdir, script_env, *flags, "2").returncode == 0
    folder = workdir / "samples/nfe=1"
    assert sorted(path.name for path in folder.iterdir()) == ["0000.png", "0001.png"]  # no stale third image
    (folder / ".DS_Store").write_text("left by a file manager")
    assert sampling(workdir, script_env, *flags, "2").returncode == 0
    (folder / "notes.txt").write_text("mine")
    result = sampling(workdir, script_env, *flags, "2")
    assert result.returncode == 1 and "notes.txt" in result.stderr and (folder / "notes.txt").exists()
    flags[2:3] = ["--nfe_list", "3", "1"]
    result = sampling(workdir, script_env, *flags, "2")  # before anything is drawn
    assert result.returncode == 1 and "notes.txt" in result.stderr and not (workdir / "samples/nfe=3").exists()


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [str(pick_device(name)) for name in ("cuda", "cpu", "cuda:1")] == ["cuda", "cpu", "cuda:1"]
    assert current == [torch.device("cuda:1")]
    with pytest.raises(UserError, match="no device 'cuda:2': this machine has 2 GPUs"):
        pick_device("cuda:2")


def in_eight_bits_without(run: Path, name: str) -> None:
    saved = torch.load(run / "model.pt", weights_only=True)
    saved["state_dict"] = quantised(saved["state_dict"])
    del saved["state_dict"][name]
    torch.save(saved, run / "model.pt")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda run: (run / "model.pt").unlink(), "no checkpoint at"),
        (lambda run: (run / "model.pt").write_bytes(b"PK junk"), "not a readable checkpoint"),
        (lambda run: (run / "model_config.json").unlink(), "no model config at"),
        (lambda run: (run / "model_config.json").write_text("{"), "not valid JSON"),
        (
            lambda run: (run / "model_config.json").write_text('{"unet": "small", "lr": 1}'),
            "unknown model setting 'lr'",
        ),
        (lambda run: (run / "model_config.json").write_text('{"unet": "full"}'), "does not fit the model"),
        (lambda run: (run / "model_config.json").write_text("[]"), "must hold a JSON object"),
        (lambda run: torch.save([torch.ones(1)], run / "model.pt"), "model.pt is no checkpoint, it holds a list"),
        (lambda run: torch.save(torch.ones(1), run / "model.pt"), "it holds a Tensor"),
        (lambda run: torch.save({"state_dict": [1]}, run / "model.pt"), "model.pt holds no weights of a model"),
        (lambda run: torch.save({"step": 1}, run / "model.pt"), "model.pt holds no weights of a model"),
        (lambda run: in_eight_bits_without(run, "network.head.weight"), "head.weight is missing, its scales alone"),
        (lambda run: in_eight_bits_without(run, "network.head.weight::scale"), "head.weight has 8 bits and no scales"),
        *(
            (lambda run, one=one: write_json(run / "model_config.json", CONFIG | one), "no model can be made with")
            for one in (
                {"smoothing": 0.03},
                {"smoothing": {"1": None}},
                {"smoothing": {"one": 0.1}},
                {"time_grids": {"2": 0.5}},
                {"num_train_timesteps": "1000"},
                {"unet": [5]},
                {"device": "cpu"},
            )
        ),
    ],
)
def test_a_damaged_model_is_not_loaded(checkpoint, workdir, damage, message):
    damage(workdir / "run")
    with pytest.raises(UserError, match=message):
        load_model(checkpoint, create_custom_model)


def test_a_save_that_fails_leaves_weights_and_config_as_they_were(checkpoint, workdir, monkeypatch):
    run = workdir / "run"
    before = {path: path.read_bytes() for path in run.iterdir()}

    def full(*_, **__):
        raise OSError("no space left")

    for module, name in ((torch, "save"), (json, "dumps")):  # the weights, then the config
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr(module, name, full)
            save_model(create_custom_model(unet="small"), checkpoint, {**CONFIG, "smoothing": {"1": 0.1}})
        assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_sampling_says_what_is_wrong_in_one_line(workdir, script_env):
    result = sampling(workdir, script_env, "--ckpt_path", "absent.pt")
    assert result.returncode == 1 and result.stderr.startswith("error: no checkpoint at absent.pt")
    assert result.stderr.count("\n") == 1 and not (workdir / "samples").exists()


def test_bare_and_half_precision_state_dicts_load(checkpoint, workdir):
    whole = load_model(checkpoint, create_custom_model)
    torch.save({key: value.half() for key, value in whole.state_dict().items()}, workdir / "run/half.pt")
    half = load_model(str(workdir / "run/half.pt"), create_custom_model)
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_config_that_is_named_is_taken_as_it_is(checkpoint, workdir):
    write_json("other.json", {**CONFIG, "objective": "rectified_flow", "use_additional_condition": True})
    for config_path, kind in ((None, "Shortcut"), ("other.json", "RectifiedFlow")):
        model = load_model(checkpoint, create_custom_model, "cpu", config_path)
        assert type(model.objective).__name__ == kind


def test_sigterm_ends_a_script_and_what_it_runs(workdir, script_env):
    (workdir / "inner.py").write_text(
        "import pathlib, time\n"
        "from src.errors import one_line_errors\nfrom src.files import replacing\n"
        "with one_line_errors(), replacing(pathlib.Path('written')) as temporary:\n"
        "    temporary.touch(), time.sleep(120)\n"
    )
    (workdir / "outer.py").write_text(
        "import sys\n"
        "from src.evaluation.launch import run_to_the_end\n"
        "from src.errors import one_line_errors\n"
        "with one_line_errors():\n"
        "    run_to_the_end([sys.executable, 'inner.py'])\n"
    )
    scripts = {"inner.py", "outer.py"}
    with started([sys.executable, "outer.py"], env=script_env, stderr=subprocess.PIPE) as outer:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and {path.name for path in workdir.iterdir()} == scripts:
            time.sleep(0.1)
        assert len(list(workdir.iterdir())) == 3
        outer.terminate()  # this process alone, not its group
        _, told = outer.communicate(timeout=60)  # not before the inner one has ended, too, which has the same stderr
    assert outer.returncode == 1 and told.split() == ["interrupted", "interrupted"]
    assert {path.name for path in workdir.iterdir()} == scripts


def test_images_round_half_to_even_and_batches_give_lists():
    levels = torch.tensor([-2.0, -1.0, 0.0, 1 / 255, 3 / 255, 1.0, 2.0]) * 1.0
    image = levels.expand(3, 1, 7)
    assert np.asarray(tensor_to_pil_image(image))[0, :, 0].tolist() == [0, 0, 128, 128, 129, 255, 255]
    assert isinstance(tensor_to_pil_image(image), Image.Image)
    assert isinstance(tensor_to_pil_image(image[None]), list) and len(tensor_to_pil_image(image[None])) == 1


def test_dataset_reads_the_split_in_order(faces):
    module = SimpsonsDataModule(str(faces), batch_size=5, num_workers=0, split_dir=str(faces))
    assert len(module.train_ds) == 24 and len(module.val_ds) == 8
    image = module.val_ds[0]
    assert image.shape == (3, 64, 64) and image.min() >= -1 and image.max() <= 1
    assert sum(len(batch) for batch in module.val_dataloader()) == 8
    assert [len(batch) for batch in module.train_dataloader()] == [5] * 4
    endless = get_data_iterator(module.train_dataloader())
    assert len([next(endless) for _ in range(9)]) == 9


def test_ids_may_hold_spaces_and_workers_may_be_spawned(faces, workdir):
    (workdir / "homer 1.png").write_bytes((faces / "1.png").read_bytes())
    for split in ("train", "val"):
        (workdir / f"{split}_split.txt").write_text("homer 1\n\n")
    module = SimpsonsDataModule(str(workdir), num_workers=0, split_dir=str(workdir))
    assert len(module.train_ds) == 1 and module.train_ds[0].shape == (3, 64, 64)
    sent = pickle.loads(pickle.dumps(module.val_ds))  # as to a worker where processes are not forked
    assert torch.equal(sent[0], module.val_ds[0])


def test_an_iterator_over_nothing_says_so(faces):
    module = SimpsonsDataModule(str(faces), batch_size=25, num_workers=0, split_dir=str(faces))
    with pytest.raises(UserError, match="no batch"):
        next(get_data_iterator(module.train_dataloader()))


def test_dataset_names_what_is_missing_or_damaged(faces, workdir):
    with pytest.raises(UserError, match="nowhere/val_split.txt.*base-code"):
        SimpsonsDataset(str(faces), "val", split_dir="nowhere")
    (workdir / "train_split.txt").write_text("1\n77777\n")
    with pytest.raises(UserError, match="77777.png"):
        SimpsonsDataset(str(faces), "train", split_dir=str(workdir))
    whole = (faces / "1.png").read_bytes()
    (workdir / "1.png").write_bytes(whole[: len(whole) // 2])
    (workdir / "train_split.txt").write_text("1\n")
    dataset = SimpsonsDataset(str(workdir), "train", transforms.ToTensor(), split_dir=str(workdir))
    with pytest.raises(UserError, match="cannot read the image .*1.png"):
        dataset[0]


@pytest.fixture
def fid_script(monkeypatch, workdir, faces):
    """measure_fid.main with a tiny network in Inception's place, on three folders of images."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3 * 23 * 23, 6)
    network = lambda x: layer(x[:, :, ::13, ::13].flatten(1) / 255)  # noqa: E731
    monkeypatch.setattr(cleanfid.fid, "build_feature_extractor", lambda *args, **kwargs: network)
    monkeypatch.setattr(measure_fid, "official_inception", lambda: "stand-in")
    monkeypatch.setattr(measure_fid, "load_features", lambda path, device: Features(network, "FD[stand-in]", ""))
    (workdir / "data").mkdir()
    for split in ("train", "val"):
        (workdir / f"data/{split}_split.txt").write_text((faces / f"{split}_split.txt").read_text())
    dataset = SimpsonsDataset(str(faces), "train", SimpsonsDataModule(str(faces)).transform)
    write_reference(dataset, workdir / "samples/nfe=1")

    def run(*flags):
        command = ["measure_fid.py", "--generated_dir", "samples/nfe=1", "--data_root", str(faces), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        measure_fid.main()

    return run, network


def test_measure_fid_prints_and_stores_clean_fids_score(fid_script, workdir, faces, capsys):
    run, network = fid_script
    run()
    reference = sorted((workdir / "data/simpsons_64x64/val").iterdir())
    assert [path.name for path in reference] == [f"{i:04d}.png" for i in range(8)]
    first = (faces / "val_split.txt").read_text().split()[0]
    assert np.array_equal(np.asarray(Image.open(reference[0])), np.asarray(Image.open(faces / f"{first}.png")))

    features = [
        cleanfid.fid.get_folder_features(str(folder), network, num_workers=0, device=torch.device("cpu"), verbose=False)
        for folder in ("samples/nfe=1", "data/simpsons_64x64/val")
    ]
    expected = cleanfid.fid.fid_from_feats(*features)
    output = capsys.readouterr()
    assert f"FID Score: {expected:.4f}" in output.out.splitlines()
    assert "FD[stand-in], no FID" in output.err  # the stand-in is not the official network
    for name in ("fid_results.json", "fid_results_samples_nfe=1.json"):
        result = json.loads((workdir / name).read_text())
        assert list(result) == ["fid_score", "generated_dir", "reference_dir"]
        assert result["fid_score"] == pytest.approx(expected, rel=1e-6)


def test_measure_fid_takes_a_folders_name_as_it_is_and_keeps_each_ones_score(fid_script, workdir):
    run, _ = fid_script
    shutil.copytree(workdir / "samples/nfe=1", workdir / "a[1]/samples/nfe=1")
    for path in sorted((workdir / "a[1]/samples/nfe=1").iterdir())[8:]:
        path.unlink()
    (workdir / "a[1]").rename(workdir / "b")
    shutil.copytree(workdir / "samples/nfe=1", workdir / "a[1]/samples/nfe=1")
    shutil.copytree(workdir / "b", workdir / "a1")  # what the brackets, as a pattern, would name
    for folder in ("a[1]", "b"):
        run("--generated_dir", f"{folder}/samples/nfe=1")
    run()
    found = {path.stem: json.loads(path.read_text())["fid_score"] for path in workdir.glob("fid_results_*.json")}
    assert found["fid_results_a[1]_samples_nfe=1"] == found["fid_results_samples_nfe=1"]
    assert found["fid_results_b_samples_nfe=1"] != found["fid_results_samples_nfe=1"]


def test_measure_fid_asks_nothing_of_the_official_dataset_that_it_lacks(fid_script, workdir, monkeypatch):
    run, _ = fid_script
    run("--output_path", "ours.json")
    shutil.rmtree(workdir / "data/simpsons_64x64")
    monkeypatch.setattr(measure_fid, "SimpsonsDataModule", lambda root: SimpsonsDataModule(root))
    run()
    scores = [json.loads((workdir / name).read_text())["fid_score"] for name in ("ours.json", "fid_results.json")]
    assert scores[0] == scores[1]


def test_measure_fid_scores_other_images_by_their_own_split(fid_script, workdir):
    run, _ = fid_script
    (workdir / "data").rename(workdir / "other")
    with pytest.raises(UserError, match="no split file data/train_split.txt.*--split_dir"):
        run()
    run("--split_dir", "other")
    assert len(list((workdir / "data/simpsons_64x64/val").iterdir())) == 8


def test_measure_fid_refuses_bad_flags_before_it_scores(fid_script, workdir, capsys):
    run, _ = fid_script
    for flags, told in (
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--output_path", ""], "--output_path  names no file"),
        (["--output_path", "data"], "--output_path data names no file"),
    ):
        with pytest.raises(SystemExit):
            run(*flags)
        assert told in capsys.readouterr().err
    for path in (workdir / "samples/nfe=1").iterdir():
        with Image.open(path) as image:
            small = image.resize((32, 32))
        small.save(path)
    with pytest.raises(UserError, match="nfe=1 holds images of 32 x 32, .*val of 64 x 64"):
        run()


def test_measure_fid_refuses_folders_that_would_be_miscounted(fid_script, workdir):
    run, _ = fid_script
    run()
    (workdir / "data/simpsons_64x64/val/0003.png").unlink()
    with pytest.raises(UserError, match="not the 8 validation images .7 of them"):
        run()
    (workdir / "data/simpsons_64x64/val").rename(workdir / "mine")
    run("--reference_dir", "mine")  # a folder of one's own may hold any number
    nested = workdir / "samples/nfe=1/old"
    nested.mkdir()
    (workdir / "samples/nfe=1/0000.png").rename(nested / "0000.png")
    with pytest.raises(UserError, match="would be counted too"):
        run()
    with pytest.raises(UserError, match="no folder"):
        run("--generated_dir", "absent")


def test_a_damaged_array_in_the_cache_is_made_again(workdir, capsys):
    for damage in (b"", b"\x93NUMPY"):
        cached_array("some", lambda: np.arange(3))
        Path("data/cache/some.npy").write_bytes(damage)
        assert cached_array("some", lambda: np.arange(3)).tolist() == [0, 1, 2]
        assert capsys.readouterr().err == "warning: data/cache/some.npy is damaged, and made again\n"
        assert cached_array("some", lambda: pytest.fail("kept")).tolist() == [0, 1, 2]


def test_a_download_that_was_interrupted_can_be_done_again(workdir):
    (workdir / DATA_ROOT).mkdir(parents=True)
    Path("train_split.txt").write_text("0\n")
    with pytest.raises(UserError, match="delete ./data/datasets, and all are downloaded again, or name the split"):
        split_paths(DATA_ROOT, "train", ".")
    with pytest.raises(UserError, match="complete the folder, or name the split"):
        split_paths("elsewhere", "train", ".")


def test_split_files_of_other_editors_and_damaged_images_are_read_or_named(workdir):
    Image.new("RGB", (4, 4)).save("0.png")
    Path("train_split.txt").write_bytes(b"\xef\xbb\xbf0\r\n")  # with a byte order mark
    assert split_paths(".", "train", ".") == [Path("0.png")]
    Path("train_split.txt").write_text("0\n", encoding="utf-16")
    with pytest.raises(UserError, match="train_split.txt is not in UTF-8: save it so"):
        split_paths(".", "train", ".")
    Path("0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x02IHDR\0\0\0\0\0\0")  # a ValueError of Pillow's
    with pytest.raises(UserError, match="cannot read the image 0.png"):
        read_rgb(Path("0.png"))
