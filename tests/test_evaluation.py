"""Distances and features."""

import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import cleanfid.fid
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import run_here
from PIL import Image
from pytorch_fid import fid_score, inception
from toy import GaussianField

from custom_model import CustomGenerativeModel, CustomScheduler, create_custom_model
from dataset import SimpsonsDataModule
from src.errors import UserError
from src.evaluation import features as room
from src.evaluation import sampler
from src.evaluation.__main__ import main
from src.evaluation.distances import frechet_distance
from src.evaluation.reference import write_reference
from src.evaluation.sampler import choose_strength, save_chosen, search_grid, search_strength
from src.evaluation.scoring import Data, Scorer, image_features
from src.filters import blurred
from src.images import to_pixels
from src.objectives import make_objective
from src.quantise import quantised
from src.utils import load_model, read_checkpoint, save_model, save_weights, tensor_to_pil_image

ROOT = Path(__file__).resolve().parents[1]


def random_features(count, width, seed):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(width, width)) / np.sqrt(width)
    return (rng.normal(size=(count, width)) @ mixing + seed).astype(np.float32)


@pytest.mark.parametrize("n, m, width", [(300, 200, 64), (150, 400, 256), (60, 50, 128)])
def test_frechet_distance_equals_clean_fids(n, m, width):
    a, b = random_features(n, width, 1), random_features(m, width, 2)
    assert frechet_distance(a, b) == pytest.approx(cleanfid.fid.fid_from_feats(a, b), rel=1e-6)


def test_searched_times_are_better_than_uniform_ones(workdir):
    model = CustomGenerativeModel(GaussianField(), CustomScheduler(), objective="rectified_flow", image_size=8)
    for nfe in (2, 4):
        grid, errors = search_grid(model, nfe, count=16)
        assert len(grid) == nfe + 1 and grid[0] == 1 and grid[-1] == 0 and sorted(grid, reverse=True) == grid
        assert errors["found"] < 0.8 * errors["uniform"], (grid, errors)
        assert not model.scheduler.time_grids  # the model itself is left as it was
    model.scheduler.smoothing[4] = 0.5  # a filter of four jumps' samples is no matter of times
    assert search_grid(model, 4, count=16) == (grid, errors) and model.scheduler.smoothing
    with pytest.raises(UserError, match="times are searched from NFE 2 on"):
        search_grid(model, 1)
    model.objective = make_objective("adversarial", model.scheduler)
    with pytest.raises(UserError, match="Adversarial leaves no velocity to follow"):
        search_grid(model, 2)


def test_times_are_searched_on_half_of_the_noise_and_judged_on_the_other(monkeypatch):
    model = CustomGenerativeModel(GaussianField(), CustomScheduler(), objective="shortcut", image_size=8)
    calls = []

    def recorded(self, shape, steps, generator):
        calls.append((steps, type(self.objective).__name__, [one.initial_seed() for one in generator]))
        return torch.full(shape, self.scheduler.time_grid(steps)[1] + 0.3 * (steps == 2))  # best: 1 - 1/64 - 0.3

    monkeypatch.setattr(CustomGenerativeModel, "sample", recorded)
    grid, errors = search_grid(model, 2, count=8, seed=100)
    assert grid[1] == pytest.approx(0.684, abs=0.01) and errors["found"] < 1e-4 < errors["uniform"]
    searched, checked = list(range(100, 104)), list(range(104, 108))
    assert calls[:2] == [(64, "RectifiedFlow", searched), (64, "RectifiedFlow", checked)]  # along the velocity
    assert calls[-2:] == [(2, "Shortcut", checked)] * 2 and len(calls) > 4
    assert all(call == (2, "Shortcut", searched) for call in calls[2:-2])


def test_times_that_gain_nothing_on_other_noise_are_left_uniform(workdir, monkeypatch):
    config = {"unet": "small", "image_size": 32, "objective": "rectified_flow", "time_grids": {"2": [1, 0.4, 0]}}
    save_model(create_custom_model(**config), "run/model.pt", config)
    found = {2: ([1, 0.6, 0], 2.0), 3: ([1, 0.6, 0.3, 0], 0.5)}
    monkeypatch.setattr(
        sampler, "search_grid", lambda model, nfe, *_: (found[nfe][0], {"uniform": 1.0, "found": found[nfe][1]})
    )
    sampler.choose_grids(Path("run/model.pt"), Path("out"), [2, 3], 8, 0, torch.device("cpu"))
    assert load_model("out/model.pt", create_custom_model).scheduler.time_grids == {3: [1, 0.6, 0.3, 0]}


class Blocks(torch.nn.Module):
    """One jump from noise goes to even blocks, with a share of the noise left."""

    use_additional_condition = False

    def __init__(self, grain: float):
        super().__init__()
        self.grain = torch.nn.Parameter(torch.tensor(grain))
        colours = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
        self.register_buffer("image", colours.repeat_interleave(8, 1).repeat_interleave(8, 2))

    def forward(self, x, timestep):
        return x - (self.image + self.grain * x)


def colour_and_contrast(x):
    """Features of images [B, 3, 299, 299] in [0, 255]: mean colours, and differences of about neighbouring pixels."""
    differences = (x[..., 18:] - x[..., :-18]).abs()
    return torch.cat([x.mean((2, 3)), F.avg_pool2d(differences, 93).flatten(1)], 1) / 255


def training_images(image) -> SimpleNamespace:
    """What a search compares with: eight shades of an image [3, H, W] in [-1, 1]."""
    features, device = room.Features(colour_and_contrast, "FD", "key"), torch.device("cpu")
    shades = tensor_to_pil_image(image * torch.linspace(0.95, 1.05, 8)[:, None, None, None])
    return SimpleNamespace(network=features, features=image_features(shades, features, device), device=device)


def test_smoothing_is_searched_where_there_is_grain():
    for grain in (0.03, 0.0):
        network = Blocks(grain)
        model = CustomGenerativeModel(network, CustomScheduler(), objective="rectified_flow", image_size=16)
        training = training_images(network.image)
        found = search_strength("smoothing", model, 1, training, count=8)
        best = min(found, key=found.get)
        assert (best > 0 and found[best] < 0.1 * found[0.0]) if grain else best == 0
        assert not model.scheduler.smoothing  # the model itself is left as it was
        model.scheduler = CustomScheduler(sharpening={1: 0.5})
        assert search_strength("smoothing", model, 1, training, count=8) == found  # sharpening comes after it


def test_sharpening_is_searched_where_detail_is_lost():
    """Images take none; samples that are half a blurred form of them take some, after the model's own smoothing."""
    network = Blocks(0.0)
    model = CustomGenerativeModel(network, CustomScheduler(), objective="rectified_flow", image_size=16)
    training = training_images(network.image)
    found = search_strength("sharpening", model, 1, training, count=8)
    assert min(found, key=found.get) == 0
    network.image.copy_((network.image + blurred(network.image[None])[0]) / 2)
    found = search_strength("sharpening", model, 1, training, count=8)
    best = min(found, key=found.get)
    assert best > 0 and found[best] < 0.3 * found[0.0]
    model.scheduler = CustomScheduler(smoothing={1: 10.0}, sharpening={1: 0.1})
    smoothed = search_strength("sharpening", model, 1, training, count=8)
    assert smoothed[0.0] > 1.5 * found[0.0]
    assert model.scheduler.sharpening == {1: 0.1}  # the model itself is left as it was


class BestAsked(Blocks):
    """Samples are the image, and the more grain the further the last jump asks for from d = 0.375."""

    use_additional_condition = True

    def forward(self, x, timestep, d):
        t, d = timestep[:, None, None, None] / 1000, d[:, None, None, None] / 1000
        return (x - self.image) / t + torch.where(t <= 0.5, (d - 0.375).abs() * self.grain, 0.0) * x


def test_asking_is_searched_where_a_part_of_a_jump_is_better():
    network = BestAsked(0.2)
    model = CustomGenerativeModel(network, CustomScheduler(asking={2: 0.5}), objective="shortcut", image_size=16)
    training = training_images(network.image)
    found = search_strength("asking", model, 2, training, count=8)
    assert search_strength("smoothing", model, 2, training, count=8)[0.0] == found[0.0]  # of samples not asked yet
    assert min(found, key=found.get) == 0.75 and found[0.75] < 0.3 * found[0.0]
    assert model.scheduler.asking == {2: 0.5}  # the model itself is left as it was
    model.scheduler = CustomScheduler(smoothing={2: 10.0})
    smoothed = search_strength("asking", model, 2, training, count=8)
    assert smoothed[0.75] > 10 * found[0.75]  # of samples as the model filters them


def test_commands_write_what_sampling_reads(workdir, faces, tiny_network):
    model = load_model(ROOT / "checkpoints/small32/float16.pt", create_custom_model)
    config = {"unet": "small", "image_size": 32, "objective": "adversarial", "smoothing": {"3": 0.5}}
    save_model(model, "run/model.pt", config, provenance={"citations": ["liu2023flow"]})
    command = ["src.evaluation", "smoothing", "--checkpoint", "run/model.pt", "--nfe", "2",
               "--out", "smooth", "--count", "8", "--data_root", str(faces), "--split_dir", str(faces),
               "--features", str(tiny_network)]  # fmt: skip
    result = run_here(workdir, *command)
    assert result.returncode == 0, result.stderr
    loaded = load_model("smooth/model.pt", create_custom_model)
    told = float(result.stdout.split("sigma ")[1].split(",")[0])
    assert told > 0 and loaded.scheduler.smoothing == {3: 0.5, 2: told}  # the test's faces have no grain
    bad = run_here(workdir, *command, "--nfe", "0")
    assert (
        bad.returncode == 1
        and "at least 1 and 8 samples or more, got NFE 0" in bad.stderr
        and "Traceback" not in bad.stderr
    )
    cited = torch.load("smooth/model.pt", weights_only=True)["provenance"]["citations"]
    assert cited == ["liu2023flow", "buades2005nonlocal"]
    save_model(model, "blurred/model.pt", {**config, "smoothing": {"2": 10.0}}, provenance={})
    command[1] = "sharpening"
    command[3] = "blurred/model.pt"
    result = run_here(workdir, *command)
    assert result.returncode == 0, result.stderr
    loaded = load_model("smooth/model.pt", create_custom_model)
    assert loaded.scheduler.smoothing == {2: 10.0} and loaded.scheduler.sharpening[2] > 0
    cited = torch.load("smooth/model.pt", weights_only=True)["provenance"]["citations"]
    assert cited == ["liu2023flow", "buades2005nonlocal", "gonzalez2018digital"]
    command[1], command[3], command[7] = "smoothing", "smooth/model.pt", "anew"
    result = run_here(workdir, *command)
    assert load_model("anew/model.pt", create_custom_model).scheduler.smoothing != {2: 10.0}
    assert "its sharpening at NFE 2 was for other samples and is left out" in result.stdout
    assert not load_model("anew/model.pt", create_custom_model).scheduler.sharpening
    saved = torch.load("anew/model.pt", weights_only=True)
    assert saved["model_config"]["sharpening"] == {} and "gonzalez2018digital" not in saved["provenance"]["citations"]
    command[1], command[3] = "asking", "smooth/model.pt"
    command[7] = "asked"
    result = run_here(workdir, *command)
    assert result.returncode == 0, result.stderr
    told = float(result.stdout.split("part ")[1].split(",")[0])
    asked = load_model("asked/model.pt", create_custom_model).scheduler
    assert asked.asking == ({2: told} if told else {}) and asked.sharpening == loaded.scheduler.sharpening
    bad = run_here(workdir, *command, "--nfe", "1")
    command[7] = "smooth"
    own = run_here(workdir, *command)
    assert own.returncode == 1 and "error: --out smooth is the folder of smooth/model.pt" in own.stderr
    assert bad.returncode == 1 and "asking takes NFEs of at least 2" in bad.stderr and "Traceback" not in bad.stderr


def test_no_search_begins_that_would_spoil_a_model_or_finds_nothing(workdir):
    config = {"unet": "small", "image_size": 32, "objective": "consistency"}
    save_model(create_custom_model(**config), "run/final_model.pt", config)
    Path("other").mkdir()
    Path("other/best_model.pt").touch()  # as of the same run, smoothed before, whose config is beside it
    Path("another").mkdir()
    Path("another/training_config.json").touch()
    Path("file").touch()
    for out, name, told in (
        ("other", "smoothing", "--out other holds other models"),
        ("another", "smoothing", "--out another holds other models"),
        ("file", "smoothing", "--out file is a file: name a folder"),
        ("run", "smoothing", "--out run is the folder of run/final_model.pt"),
        ("out", "asking", "Consistency is not asked for parts of jumps"),
    ):
        with pytest.raises(UserError, match=told):
            choose_strength(
                name, Path("run/final_model.pt"), Path(out), [2], 8, 0, ("no", "no"), None, torch.device("cpu")
            )


def test_what_the_search_found_no_use_for_is_unset(workdir, randomised):
    weights = quantised(randomised(create_custom_model(unet="small", image_size=32)).state_dict())
    save_weights(weights, "run/model.pt", {"unet": "small", "image_size": 32, "smoothing": {"1": 0.5, "2": 0.5}})
    save_chosen(Path("run/model.pt"), Path("out"), "smoothing", {"1": None, "4": 0.1})
    assert load_model("out/model.pt", create_custom_model).scheduler.smoothing == {2: 0.5, 4: 0.1}
    save_chosen(Path("run/model.pt"), Path("none"), "smoothing", {"1": None, "2": None})
    written = [read_checkpoint(f"{folder}/model.pt") for folder in ("out", "none")]
    assert all(torch.equal(one["state_dict"][name], value) for one in written for name, value in weights.items())
    cited = [one["provenance"].get("citations") for one in written]
    assert cited == [["liu2023flow", "buades2005nonlocal"], None]


def test_time_grid_command_writes_what_sampling_reads(workdir, randomised):
    model = randomised(create_custom_model(unet="small", image_size=32, objective="rectified_flow"))
    config = {"unet": "small", "image_size": 32, "objective": "rectified_flow", "time_grids": {"3": [1, 0.5, 0.2, 0]}}
    save_model(model, "run/model.pt", config)
    flags = ["--checkpoint", "run/model.pt", "--nfe", "2", "--out", "timed", "--count", "8"]
    result = run_here(workdir, "src.evaluation", "time_grid", *flags)
    assert result.returncode == 0, result.stderr
    loaded = load_model("timed/model.pt", create_custom_model)
    assert loaded.scheduler.time_grid(3) == [1, 0.5, 0.2, 0]
    told = json.loads(result.stdout.split("NFE 2: ")[1].split(", error")[0])
    assert loaded.scheduler.time_grid(2) == ([1, 0.5, 0] if "no gain" in result.stdout else told)


def test_frechet_distance_of_known_gaussians():
    # Rows with exactly these means and (unbiased) variances, axes uncorrelated.
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)
    a, b = corners * [1, 2] + [0, 0], corners * [3, 5] + [4, -3]
    assert frechet_distance(a, b) == pytest.approx(4**2 + 3**2 + (3 - 1) ** 2 + (5 - 2) ** 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))


@pytest.fixture
def folders(faces, workdir):
    module = SimpsonsDataModule(str(faces), split_dir=str(faces))
    write_reference(module.train_ds, workdir / "train")
    write_reference(module.val_ds, workdir / "val")
    return workdir


def test_score_names_the_distance_after_its_features_and_caches_the_reference(folders, tiny_network, script_env):
    command = ["src.evaluation", "score", "--generated", "train", "--reference", "val"]
    command += ["--features", str(tiny_network), "--device", "cpu"]
    begun = subprocess.run([sys.executable, "-m", *command], cwd=folders, env=script_env, capture_output=True)
    assert begun.returncode == 0, begun.stderr
    result = run_here(folders, *command)
    assert result.returncode == 0, result.stderr
    line = result.stdout.strip().splitlines()[-1]
    assert line.startswith("FD[tiny]: ") and line.endswith("(24 images against 8)")
    assert len(list((folders / "data/cache").glob("features-*.npy"))) == 1
    assert "features of val" not in result.stderr  # the second time they come from the cache

    network = torch.jit.load(tiny_network).layers
    a, b = (
        cleanfid.fid.get_folder_features(
            name, lambda x: network((x - 128) / 128), num_workers=0, device=torch.device("cpu"), verbose=False
        )
        for name in ("train", "val")
    )
    assert float(line.split()[1]) == pytest.approx(cleanfid.fid.fid_from_feats(a, b), rel=1e-3, abs=1e-4)


def test_cache_follows_the_content(folders, tiny_network):
    device = torch.device("cpu")
    network = room.load_features(tiny_network, device)
    first = room.folder_features("val", network, device, cache=True)
    assert np.array_equal(first, room.folder_features("val", network, device, cache=True))
    (folders / "val/0000.png").write_bytes((folders / "train/0003.png").read_bytes())
    assert not np.array_equal(first, room.folder_features("val", network, device, cache=True))


def test_only_the_official_network_gives_an_fid(tiny_network, monkeypatch):
    """The name follows the file's hash, not its place."""
    device = torch.device("cpu")
    network = room.load_features(tiny_network, device)
    assert network.distance == "FD[tiny]"
    assert [name for name in room.DISTANCES.values() if name == "FID"] == ["FID"]
    monkeypatch.setitem(room.DISTANCES, network.key, "FID")
    assert room.load_features(tiny_network, device).distance == "FID"


def test_a_network_that_did_not_come_whole_is_not_kept(tmp_path, monkeypatch):
    class Broken(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 100)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(room, "OFFICIAL", tmp_path / "inception.pt")
    with HTTPServer(("127.0.0.1", 0), Broken) as server:
        server.timeout = 60
        monkeypatch.setenv("no_proxy", "*")
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(room, "inception_url", f"http://127.0.0.1:{server.server_port}/inception.pt")
        with pytest.raises(UserError, match=r"could not be downloaded \(100 of 1,000 bytes came\)"):
            room.official_inception()
    assert not list(tmp_path.iterdir())


def test_missing_networks_and_images_get_one_line(folders, tmp_path, tiny_network, monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(room, "OFFICIAL", tmp_path / "none/inception.pt")
    monkeypatch.setattr(room, "inception_url", "http://127.0.0.1:9/inception.pt")
    with pytest.raises(UserError, match="could not be downloaded.*--features"):
        room.official_inception()
    with pytest.raises(UserError, match="no feature network"):
        room.load_features("absent.pt", device)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a TorchScript"):
        room.load_features(tmp_path / "junk.pt", device)
    shutil.copytree(folders / "val", folders / "val [1]")
    (folders / "val [1]/.hidden").mkdir()
    for name in (".0000.png", "._0000.png", ".hidden/0000.png"):  # clean-fid does not count them
        (folders / "val [1]" / name).write_bytes(b"of another system")
    assert len(room.image_files(folders / "val [1]")) == len(room.image_files(folders / "val"))
    tiny = room.load_features(tiny_network, device)
    named = [room.folder_features(folders / name, tiny, device) for name in ("val", "val [1]")]
    assert np.array_equal(*named)  # nor is a name a pattern
    broken = folders / "broken"
    for kind, message in (
        (lambda path: Image.new("L", (64, 64)).save(path), "9.png is L, 64 x 64: all images must be RGB"),
        (lambda path: Image.new("RGB", (32, 64)).save(path), "9.png is RGB, 32 x 64: .* like the first, 64 x 64"),
        (lambda path: path.write_bytes((folders / "val/0001.png").read_bytes()[:900]), "9.png cannot be read"),
        (lambda path: path.write_text("no image"), "9.png cannot be read"),
    ):
        shutil.copytree(folders / "val", broken)
        kind(broken / "9.png")
        with pytest.raises(UserError, match=message):
            room.image_files(broken)
        shutil.rmtree(broken)
    (folders / "empty").mkdir()
    with pytest.raises(UserError, match="0 images"):
        room.image_files(folders / "empty")
    with pytest.raises(UserError, match="not empty"):
        write_reference([], folders / "val")
    (folders / "half").mkdir()
    for path in (folders / "val").iterdir():
        Image.open(path).resize((32, 32)).save(folders / "half" / path.name)
    names = ["--generated", str(folders / "half"), "--reference", str(folders / "val")]
    monkeypatch.setattr(sys, "argv", ["src.evaluation", "score", *names, "--features", str(tiny_network)])
    with pytest.raises(UserError, match="half holds images of 32 x 32, .*val of 64 x 64"):
        main()
    monkeypatch.setattr(sys, "argv", ["src.evaluation", "reference", "--out", "small", "--size", "0"])
    with pytest.raises(UserError, match="--size 0: at least 1 pixel"):
        main()


def test_scores_in_memory_are_those_of_the_written_folders(folders, faces, tiny_network):
    model = create_custom_model(unet="small", image_size=32, objective="rectified_flow")
    device = torch.device("cpu")
    scorer = Scorer(str(faces), str(faces), 32, 5, str(tiny_network), device, seed=9)
    scores = scorer(model)
    assert list(scores) == ["FD[tiny] NFE 1", "FD[tiny] NFE 2", "FD[tiny] NFE 4", "floor", "ratio"]

    module = SimpsonsDataModule(str(faces), transform=to_pixels(32), split_dir=str(faces))
    write_reference(module.val_ds, folders / "val32")
    write_reference([module.train_ds[i] for i in (0, 5, 11, 17, 23)], folders / "train32")
    noise = [torch.Generator().manual_seed(9 + i) for i in range(5)]
    write_reference(list(model.sample((5, 3, 32, 32), 2, generator=noise)), folders / "two")
    network = room.load_features(tiny_network, device)
    a, b, c = (room.folder_features(name, network, device) for name in ("two", "val32", "train32"))
    assert scores["FD[tiny] NFE 2"] == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert scores["floor"] == pytest.approx(frechet_distance(c, b), rel=1e-4)
    mean = sum(scores[f"FD[tiny] NFE {nfe}"] for nfe in (1, 2, 4)) / 3
    assert scores["ratio"] == pytest.approx(mean / scores["floor"])
    assert scorer(model) == scores  # always from the same noise

    shutil.copyfile(faces / "val_split.txt", folders / "val_split.txt")
    shutil.copyfile(faces / "val_split.txt", folders / "train_split.txt")
    with pytest.raises(UserError, match="the validation images are the training images"):
        Scorer(str(faces), str(folders), 32, 24, str(tiny_network), device, seed=9)


def test_scores_download_the_faces_too(workdir, monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=asked.append))
    monkeypatch.setattr(sys, "argv", ["src.evaluation", "reference", "--out", "val"])
    with pytest.raises(UserError, match="downloaded the faces to None, but .* is still missing"):
        main()
    with pytest.raises(UserError, match="downloaded the faces to None, but .* is still missing"):
        Data("nowhere", "data", "val", 64, None, torch.device("cpu"))
    assert asked == ["kostastokis/simpsons-faces"] * 2


def test_pytorch_fid_is_matched_on_its_own_features(shared, monkeypatch):
    """Unmodified pytorch-fid 0.3.0 with --dims 768, on 60 + 60 real faces."""
    monkeypatch.setenv("TORCH_HOME", str(shared / "fid/torch_home"))
    model = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[768]]).eval()
    files = sorted(map(str, (shared / "data/val_64px").glob("*.png")))
    halves = [fid_score.get_activations(files[i : i + 60], model, 20, 768, "cpu", 0) for i in (0, 60)]
    statistics = [value for half in halves for value in (half.mean(0), np.cov(half, rowvar=False))]
    theirs = fid_score.calculate_frechet_distance(*statistics)
    assert frechet_distance(*halves) == pytest.approx(theirs, rel=1e-3)
    assert theirs == pytest.approx(GOLDEN_PYTORCH_FID_768, rel=1e-3)


GOLDEN_PYTORCH_FID_768 = 0.447699  # torch 2.6.0, float32 on a CPU


def test_fd_mid_of_real_faces(shared, tmp_path):
    """Pinned to clean-fid's value of the same 40 + 40 images; the halves share no image."""
    device = torch.device("cpu")
    network = room.load_features(shared / "fid/inception-2015-12-05-mixed7.pt", device)
    assert network.distance == "FD-mid"
    halves = []
    for start in (0, 40):
        folder = tmp_path / str(start)
        folder.mkdir()
        for i in range(start, start + 40):
            (folder / f"{i:04d}.png").symlink_to(shared / f"data/val_64px/{i:04d}.png")
        halves.append(room.folder_features(folder, network, device))
    assert halves[0].shape == (40, 2048)
    ours = frechet_distance(*halves)
    assert ours == pytest.approx(cleanfid.fid.fid_from_feats(*halves), rel=1e-5)
    assert ours == pytest.approx(GOLDEN_FD_MID_40, rel=1e-3)


GOLDEN_FD_MID_40 = 9.476418  # clean-fid 0.1.35, torch 2.6.0, float32 on a CPU


@pytest.mark.parametrize("free, batch_size, expected", [(2**26, 64, 0), (2**30, 64, 4), (2**30, 256, 0)])
def test_nothing_is_loaded_beside_where_shared_memory_is_small(monkeypatch, free, batch_size, expected):
    """A Docker container has 64 MB, if nothing else was asked for."""
    monkeypatch.setattr(room.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(room.Path, "is_dir", lambda path: True)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert room.loading_workers(batch_size) == expected
    monkeypatch.setattr(room.multiprocessing, "get_start_method", lambda: "spawn")
    assert room.loading_workers(batch_size) == 0
