"""Reports, comparisons, and the measures behind them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cleanfid.fid
import numpy as np
import pytest
import torch
from commands import run_here, run_to_the_end_here
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import train as train_py
from custom_model import create_custom_model
from src.errors import UserError
from src.evaluation import page
from src.evaluation.__main__ import main
from src.evaluation.compare import differences, plot_distances
from src.evaluation.distances import frechet_distance, kernel_distance, manifold_scores
from src.evaluation.failures import copies, failure_rates, nearest, saturation, sharpness, variety
from src.evaluation.features import load_features
from src.evaluation.intervals import at_infinity, mean_interval
from src.evaluation.report import Model, flattened
from src.evaluation.scoring import Data, evenly
from src.evaluation.speed import seconds
from src.files import write_json
from src.utils import has_bf16, load_model, save_model, tensor_to_pil_image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def features(count, width=16, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (count, width)).astype(np.float32)


def test_kernel_distance_is_clean_fids_formula_on_all_images():
    a, b = features(120, seed=1), features(120, seed=2, shift=0.3)
    # Subsets as large as the sets are the sets themselves, in another order.
    theirs = cleanfid.fid.kernel_distance(a.astype(np.float64), b.astype(np.float64), num_subsets=1)
    ours, _ = kernel_distance(a, b)
    # clean-fid's cross term keeps b.sum() * 2 / m, ours the same mean: equal but for rounding.
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_kernel_distances_error_is_its_spread():
    found = [kernel_distance(features(200, seed=i), features(200, seed=1000 + i, shift=0.3)) for i in range(60)]
    spread = np.std([distance for distance, _ in found], ddof=1)
    assert np.mean([error for _, error in found]) == pytest.approx(spread, rel=0.35)
    null = [kernel_distance(features(200, seed=i), features(200, seed=1000 + i))[0] for i in range(60)]
    assert abs(np.mean(null)) < 3 * np.std(null) / np.sqrt(60)  # unbiased


def test_manifold_scores_by_their_definitions():
    real, fake, k = features(40, 3, seed=1), features(50, 3, seed=2, shift=0.5), 5
    distance = lambda x, y: float(np.linalg.norm(x.astype(np.float64) - y))  # noqa: E731
    ball = lambda x, own: sorted(distance(x, y) for y in own)[k]  # noqa: E731 (the first is x itself)
    real_balls, fake_balls = [ball(x, real) for x in real], [ball(x, fake) for x in fake]
    inside = np.array([[distance(r, f) < radius for f in fake] for r, radius in zip(real, real_balls, strict=True)])
    of_fakes = np.array([[distance(r, f) < radius for f, radius in zip(fake, fake_balls, strict=True)] for r in real])
    assert manifold_scores(real, fake, k) == pytest.approx(
        {
            "precision": inside.any(0).mean(),
            "recall": of_fakes.any(1).mean(),
            "density": inside.sum() / (k * len(fake)),
            "coverage": inside.any(1).mean(),
        }
    )
    assert manifold_scores(real, real + 100, k) == dict.fromkeys(("precision", "recall", "density", "coverage"), 0)


def test_intervals_and_limits():
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.303 / np.sqrt(3)), rel=1e-3)
    assert mean_interval([5.0]) == (5, 0)
    covered = 0
    for seed in range(400):
        mean, half = mean_interval(np.random.default_rng(seed).normal(3, 2, 4).tolist())
        covered += abs(mean - 3) < half
    assert 0.92 < covered / 400 < 0.98
    assert at_infinity([100, 200, 400], [5 + 300 / n for n in (100, 200, 400)]) == pytest.approx(5)
    # The bias is real: two samples of one distribution, whose distance is 0.
    sizes = [100, 200, 400]
    falling = [frechet_distance(features(n, seed=n), features(20_000, seed=1)) for n in sizes]
    assert falling == sorted(falling, reverse=True) and abs(at_infinity(sizes, falling)) < 0.5 * falling[-1]


def test_failures_are_found_where_they_are():
    rng = np.random.default_rng(0)
    data = rng.integers(20, 235, (200, 16, 16, 3), np.uint8)
    data_features = features(200)
    rates = failure_rates(data, data_features, data, data_features)
    assert all(rate <= 0.015 for name, rate in rates.items() if name != "far from data"), rates

    broken = data[:100].copy()
    broken[:10] = 128
    broken[10:30] = 255
    twins = data_features[:100].copy()
    twins[:40] = twins[40:80] + 1e-4
    twins[90:] += 50
    rates = failure_rates(broken, twins, data, data_features)
    assert rates["blurred"] == pytest.approx(0.30, abs=0.03)  # a constant image has no detail, white ones too
    assert rates["saturated"] >= 0.2 and rates["near-duplicates"] == pytest.approx(0.8, abs=0.05)
    assert rates["far from data"] >= 0.1
    assert variety(data, data) == 1 and variety(data[:1].repeat(9, 0), data) == 0
    grey = np.full_like(data, 128)
    assert variety(np.where(data < 128, grey - 10, grey + 10), np.where(data < 128, grey - 40, grey + 40)) == 0.25
    assert sharpness(broken[:1]) == 0 and saturation(broken[10:11]) == 1


def test_few_samples_are_compared_with_as_few_images():
    """Nearest neighbours are the farther apart the fewer there are."""
    data, found = np.random.default_rng(0).integers(20, 235, (400, 8, 8, 3), np.uint8), features(400, 4)
    apart = np.linalg.norm(found[:40, None].astype(np.float64) - found[:40], axis=-1) + np.diag([np.inf] * 40)
    twins = found[:40].copy()
    twins[20:] = twins[:20] + 0.45 * np.quantile(apart.min(1), 0.01)  # as much in each of four dimensions
    assert failure_rates(data[:40], twins, data, found)["near-duplicates"] == 1
    fresh = features(40, 4, seed=1, shift=0.5)
    away = np.linalg.norm(fresh[:, None].astype(np.float64) - found[:40], axis=-1).min(1)
    expected = (away > np.quantile(apart.min(1), 0.99)).mean()
    assert expected > 0 and failure_rates(data[:40], fresh, data, found)["far from data"] == expected


def test_grain_is_told_from_the_datas_detail():
    rng = np.random.default_rng(0)
    data, found = rng.integers(100, 155, (200, 8, 8, 3), np.uint8), features(200)
    grain = data[:100].copy()
    grain[:25] = rng.integers(80, 175, (25, 8, 8, 3), np.uint8)
    assert failure_rates(grain, found[:100], data, found)["noisy"] == pytest.approx(0.25, abs=0.02)


def test_copies_of_training_images_are_found():
    train, unseen = features(300, seed=1), features(200, seed=2)
    honest, copied = features(200, seed=3), train[:200] + 0.01
    assert copies(honest, train, unseen)["share of copies"] < 0.05
    assert copies(honest, train, unseen)["nearer than unseen"] == pytest.approx(0.5, abs=0.1)
    assert copies(copied, train, unseen) == {"share of copies": 1, "nearer than unseen": 1}
    assert nearest(copied, train)[0].tolist() == list(range(200))
    index, distance = nearest(train, train, same=True)
    assert (index != np.arange(300)).all() and (distance > 0).all()


def test_differences_are_paired_over_seeds():
    noise = np.random.default_rng(0).normal(0, 5, 4)
    found = differences({"a": list(10 + noise), "b": list(11 + noise + [0.01, -0.01, 0.02, 0]), "c": list(10 - noise)})
    assert found["a"]["difference"] == (0, 0) and not found["a"]["exceeds noise"]
    assert found["b"]["difference"][0] == pytest.approx(1, abs=0.02) and found["b"]["exceeds noise"]
    assert not found["c"]["exceeds noise"]


@pytest.fixture
def runs(faces, workdir, randomised):
    """Two small models as finished runs."""
    for seed in (1, 2):
        model = randomised(create_custom_model(unet="small", image_size=32, objective="shortcut"), seed)
        save_model(model, workdir / f"run{seed}/final_model.pt", {"unet": "small", "image_size": 32})
    return workdir


def evaluation(cwd, *arguments):
    return run_here(cwd, "src.evaluation", *arguments, "--device", "cpu")


def test_report_is_whole_reproducible_and_reads_without_a_network(runs, faces, tiny_network):
    flags = ["--data_root", faces, "--split_dir", faces, "--features", tiny_network, "--samples", "16", "--seeds", "2"]
    command = ["report", "--checkpoint", "run1/final_model.pt", "--sweep", "1", "3", *flags, "--bf16"]
    result = evaluation(runs, *command, "--out", "out")
    assert result.returncode == 0, result.stderr
    content = json.loads((runs / "out/report.json").read_text())
    assert content["bf16"] == has_bf16(torch.device("cpu"))
    assert content["distance"] == "FD[tiny]" and list(content["nfe"]) == ["1", "2", "4"]
    assert list(content["sweep"]) == ["1", "3"] and content["training images"] == 24
    for found in content["nfe"].values():
        mean, half = found["intervals"]["frechet"]
        values = [row["frechet"] for row in found["seeds"]]
        assert mean == pytest.approx(np.mean(values)) and half > 0 and values[0] != values[1]
        assert found["ratio"] == pytest.approx(mean / content["floor"]["frechet"])
        assert found["samples"]["counts"] == [32, 16, 8]
    assert content["sweep"]["1"] == content["nfe"]["1"]["seeds"][0]["frechet"]
    cached = len(list((runs / "data/cache").glob("samples-*")))
    assert cached == 2 * 3 + 1  # two seeds at three NFEs, and the sweep's third
    result = evaluation(runs, *command, "--out", "again")  # from the cache
    assert len(list((runs / "data/cache").glob("samples-*"))) == cached
    assert json.loads((runs / "again/report.json").read_text()) == content

    page = (runs / "out/report.html").read_text()
    pictures = re.compile('src="data:image/png;base64,[A-Za-z0-9+/=]+"')
    assert page.count("<figure") == len(pictures.findall(page))
    for name in ("sweep", "limit", "memory", "samples", "farthest"):
        assert (runs / f"out/{name}.png").read_bytes().startswith(b"\x89PNG"), name
    told_without = pictures.sub("", page)  # a picture's base64 may spell anything
    assert "http" not in told_without and "src=" not in told_without
    precision = ", sampled in bfloat16" if content["bf16"] else ""
    for told in ("FD[tiny]", f"32 px{precision};", "color-scheme: light dark", "width=device-width", "id=nfe"):
        assert told in page
    assert f"{content['nfe']['1']['ratio']:.2f}" in page


def test_models_that_differ_in_filters_alone_share_their_samples(runs, tiny_network, monkeypatch):
    settings = {"unet": "small", "image_size": 32, "smoothing": {"2": 1.0}, "sharpening": {"2": 0.5}}
    plain = runs / "run1/final_model.pt"
    save_model(load_model(plain, create_custom_model), runs / "smooth/final_model.pt", settings)
    features, device = load_features(tiny_network, torch.device("cpu")), torch.device("cpu")
    models = [Model(path, features, device, 16) for path in (plain, runs / "smooth/final_model.pt")]
    for model in models:
        noise = [torch.Generator().manual_seed(i) for i in range(16)]
        expected = tensor_to_pil_image(model.net.sample((16, 3, 32, 32), 2, generator=noise))
        expected = np.stack([np.asarray(image) for image in expected])
        assert np.abs(model.pixels(2, 0).astype(int) - expected).max() <= 1  # other batches, other roundings
    assert len(list((runs / "data/cache").glob("samples-*"))) == 1
    assert not np.array_equal(models[0].embedded(2, 0), models[1].embedded(2, 0))
    assert np.array_equal(models[0].pixels(1, 0), models[1].pixels(1, 0))  # not filtered at this NFE
    save_model(models[0].net, runs / "asked/final_model.pt", {**settings, "asking": {"2": 0.75}})
    assert Model(runs / "asked/final_model.pt", features, device, 16).key != models[0].key  # other jumps
    with monkeypatch.context() as edited:  # samples of older code are another model's
        edited.setattr("src.evaluation.report.inspect.getsource", lambda part: "x = 0.5 * x")
        assert Model(plain, features, device, 16).key != models[0].key
    before = models[1].embedded(2, 0)
    monkeypatch.setattr("src.filters.RADIUS", 1)  # a filter of another form, and of the same strength
    assert np.array_equal(models[1].embedded(2, 0), before)  # filtered once
    assert not np.array_equal(Model(runs / "smooth/final_model.pt", features, device, 16).embedded(2, 0), before)

    for here in (False, True):  # where the chip has no bfloat16, it would take many times as long as float32
        monkeypatch.setattr("src.evaluation.report.has_bf16", lambda device, here=here: here)
        low = Model(plain, features, device, 16, bf16=True)
        apart = np.abs(low.pixels(2, 0).astype(int) - models[0].pixels(2, 0))
        assert (0 < apart.mean() < 2) == here  # other roundings, the same images


def test_each_sampling_seed_has_noise_of_its_own(runs, tiny_network):
    device = torch.device("cpu")
    model = Model("run1/final_model.pt", load_features(tiny_network, device), device, 16)
    noise = [torch.Generator().manual_seed(2_000_000 + i) for i in range(16)]
    expected = np.stack(
        [np.asarray(one) for one in tensor_to_pil_image(model.net.sample((16, 3, 32, 32), 1, generator=noise))]
    )
    assert np.abs(model.pixels(1, 2).astype(int) - expected).max() <= 1  # other batches, other roundings


def test_reports_and_comparisons_score_against_the_right_images(runs, faces, tiny_network, monkeypatch):
    """Every number made anew of samples, training and validation images."""
    picture = np.zeros((32, 32, 3), np.uint8)
    shown = SimpleNamespace(samples={1: [picture]}, farthest=[[picture]])
    monkeypatch.setattr("src.evaluation.report.NFES", (1,))
    monkeypatch.setattr("src.evaluation.report.figures", lambda *_: shown)
    monkeypatch.setattr("src.evaluation.report.write_page", lambda *_: None)
    flags = ["--data_root", str(faces), "--split_dir", str(faces), "--features", str(tiny_network), "--samples", "16"]
    flags += ["--seeds", "2", "--out", "out", "--device", "cpu"]
    for command in (["report", "--checkpoint", "run1/final_model.pt", "--sweep", "1"],
                    ["compare", "run2", "run1", "--nfe", "1"]):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["src.evaluation", *command, *flags])
        main()
    reported, compared = (json.loads(Path(f"out/{name}.json").read_text()) for name in ("report", "comparison"))

    device = torch.device("cpu")
    network = load_features(tiny_network, device)
    model = Model("run1/final_model.pt", network, device, 16)
    train, val = (Data(str(faces), str(faces), split, 32, network, device) for split in ("train", "val"))
    floor = frechet_distance(train.features[evenly(24, 16)], val.features)
    assert reported["floor"]["frechet"] == pytest.approx(floor) and compared["floor"] == pytest.approx(floor)
    seen_pixels, seen = train.either_way()
    found, pixels, embedded = reported["nfe"]["1"], model.pixels(1, 0), model.embedded(1, 0)
    distances = [frechet_distance(model.embedded(1, seed), val.features) for seed in (0, 1)]
    kernel, error = kernel_distance(embedded, val.features)
    scored = {"frechet": distances[0], "kernel": kernel, "kernel_error": error}
    assert found["seeds"][0] == pytest.approx(scored | manifold_scores(val.features, embedded))
    assert found["failures"] == pytest.approx(failure_rates(pixels, embedded, val.pixels, val.features))
    assert found["variety"] == pytest.approx(variety(pixels, val.pixels))
    assert found["memory"]["features"] == pytest.approx(copies(embedded, seen, val.features))
    of_pixels = copies(*map(flattened, (pixels, seen_pixels, val.pixels)))
    assert found["memory"]["pixels"] == pytest.approx(of_pixels)
    assert compared["nfe"]["1"]["run1"]["distance"] == pytest.approx(mean_interval(distances))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page's look is not tested")
def test_page_works_in_a_browser(runs, faces, tiny_network):
    flags = ["--data_root", faces, "--split_dir", faces, "--features", tiny_network, "--samples", "16", "--seeds", "2"]
    result = evaluation(runs, "report", "--checkpoint", "run1/final_model.pt", "--sweep", "1", *flags, "--out", "out")
    assert result.returncode == 0, result.stderr
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update", "--window-size=390,3000",
               f"--user-data-dir={runs / 'profile'}", "--virtual-time-budget=2000"]  # fmt: skip
    url = (runs / "out/report.html").as_uri()
    shown = subprocess.run([CHROMIUM, *options, "--dump-dom", url], capture_output=True, text=True, timeout=120).stdout
    assert shown.count("data-nfe") >= 3 and len(re.findall(r"data-nfe[^>]*hidden", shown)) == 2  # one grid shows


def test_comparison_and_ablation(runs, faces, tiny_network, script_env, monkeypatch):
    flags = ["--data_root", faces, "--split_dir", faces, "--features", tiny_network, "--samples", "16", "--seeds", "2"]
    command = ["compare", "run1", "run1/final_model.pt", "run2", *flags, "--nfe", "3", "1", "--out", "compared"]
    result = evaluation(runs, *command)
    assert result.returncode == 0, result.stderr
    content = json.loads((runs / "compared/comparison.json").read_text())
    assert list(content["nfe"]) == ["1", "3"] and content["floor"] > 0
    found = content["nfe"]["1"]
    assert found["run1/final_model.pt"]["difference"] == [0, 0] and found["run2"]["difference"][0] != 0
    assert found["run1/final_model.pt"]["pixels"] == 0 < found["run2"]["pixels"] < 255
    assert (runs / "compared/comparison.png").stat().st_size > 1000
    assert "| run2 |" in result.stdout and "| run2 |" in (runs / "compared/comparison.md").read_text()

    base = ["--unet", "small", "--image_size", "32", "--batch_size", "8", "--num_iterations", "2"]
    (runs / "train.py").symlink_to(train_py.__file__)
    command = ["ablate", "--change", "fast:lr=1e-3", *flags, "--out", "ablated", "--device", "cpu", "--", *base]
    whole = [sys.executable, "-m", "src.evaluation", *map(str, command)]
    result = subprocess.run(whole, cwd=runs, env=script_env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    monkeypatch.setattr("src.evaluation.compare.run_to_the_end", run_to_the_end_here)
    lr = {
        name: json.loads((runs / f"ablated/{name}/training_config.json").read_text())["lr"] for name in ("base", "fast")
    }
    assert lr == {"base": 1e-4, "fast": 1e-3}
    result = run_here(runs, "src.evaluation", *command)
    assert result.returncode == 0, result.stderr
    sessions = json.loads((runs / "ablated/fast/run.json").read_text())["sessions"]
    assert [(one["first_step"], one["last_step"]) for one in sessions] == [(0, 2)]  # not trained again
    command[2] = "fast:lr=1e-2"  # another experiment under the same name
    result = run_here(runs, "src.evaluation", *command)
    assert result.returncode == 1 and "lr was 0.001 and is now 0.01" in result.stderr


def test_ablate_plans_all_before_it_trains_and_compares_no_unfinished_run(faces, workdir, tiny_network, monkeypatch):
    calls = []

    def run_to_the_end(command, **output):
        calls.append(command)
        if "--lrr" in command:
            raise UserError("unrecognized arguments: --lrr")
        if "--dry_run" not in command:
            folder = Path(command[-1])
            write_json(folder / "training_config.json", {"num_iterations": 5})
            save_model(torch.nn.Linear(1, 1), folder / "final_model.pt", {}, provenance={"step": 4})

    monkeypatch.setattr("src.evaluation.compare.run_to_the_end", run_to_the_end)
    flags = ["--data_root", faces, "--split_dir", faces, "--features", tiny_network, "--out", "out", "--device", "cpu"]
    for change, message in (
        ("typo:lrr=1e-3", "unrecognized arguments: --lrr"),
        ("condition:use_additional_condition", "out/base is at iteration 4 of 5: the same command goes on"),
        ("fast:lr=1e-3", "out/base is at iteration 4 of 5: the same command goes on"),
    ):
        monkeypatch.setattr(sys, "argv", ["src.evaluation", "ablate", "--change", change, *map(str, flags)])
        with pytest.raises(UserError, match=re.escape(message)):
            main()
    assert ["--dry_run" in command for command in calls] == [True, True, False, True, False]
    assert calls[1][-5:-3] == ["cpu", "--use_additional_condition"]  # a flag without a value
    shutil.copyfile(faces / "train_split.txt", workdir / "train_split.txt")
    sys.argv[sys.argv.index("--split_dir") + 1] = str(workdir)
    with pytest.raises(UserError, match="no split file .*val_split.txt"):  # to score against, after hours
        main()
    assert len(calls) == 6 and "--dry_run" in calls[-1]


@pytest.mark.parametrize(
    "values, floor", [((45.0, 40.0, 33.0), 22.0), ((900.0, 700.0, 600.0), 600.0), ((9.0, 3.0, 2.0), 1.8)]
)
def test_a_curves_axis_has_numbers(tmp_path, monkeypatch, values, floor):
    figures = []
    for room in ("compare", "page"):
        name = f"src.evaluation.{room}.Figure"
        monkeypatch.setattr(name, lambda **how: figures.append(Figure(**how)) or figures[-1])
    curve = {nfe: (value, 0.1) for nfe, value in zip((1, 2, 4), values, strict=True)}
    plot_distances({"one": curve}, "FD-mid", floor, "", tmp_path / "curve.png")
    sweep = {str(nfe): value for nfe, value in zip((1, 2, 4), values, strict=True)}
    page._plot_sweep({"distance": "FD-mid", "floor": {"frechet": floor}, "sweep": sweep, "sampler": {}})
    for figure in figures:
        low, high = figure.axes[0].get_ylim()
        assert sum(low <= tick <= high for tick in figure.axes[0].get_yticks()) >= 2
    assert len(figures) == 2


def test_mirrored_copies_are_found(faces, workdir, tiny_network):
    device = torch.device("cpu")
    train = Data(str(faces), str(faces), "train", 32, load_features(tiny_network, device), device)
    pixels, found = train.either_way()
    assert pixels.shape == (48, 32, 32, 3) and found.shape == (48, 27)
    mirrored = flattened(train.pixels[:5, :, ::-1])
    index, distance = nearest(mirrored, flattened(pixels))
    assert index.tolist() == [24, 25, 26, 27, 28] and (distance < 1e-5).all()


def test_a_calls_time_is_the_median_of_all_but_the_first(monkeypatch):
    for times, median in (([9.0, 1.0, 4.0], 2.5), ([9.0, 5.0, 1.0, 2.0], 2.0)):
        ticks = iter([tick for time in times for tick in (0.0, time)])
        monkeypatch.setattr("src.evaluation.speed.time", SimpleNamespace(perf_counter=ticks.__next__))
        assert seconds(lambda: None, torch.device("cpu"), len(times) - 1) == median


def test_speed_counts_the_network_calls(runs):
    result = evaluation(runs, "speed", "--checkpoint", "run1/final_model.pt", "--batches", "1", "2", "--repeats", "1")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["nfe"]
    work = [found[nfe]["GFLOP an image"] for nfe in ("1", "2", "4")]
    assert work[1] == pytest.approx(2 * work[0], rel=0.01) and work[2] == pytest.approx(4 * work[0], rel=0.01)
    assert set(found["4"]["images a second"]) == {"1", "2"} and found["4"]["latency of one image, ms"] > 0


@pytest.mark.parametrize(
    "command, message",
    [
        (["compare", "run1", "run1"], "name at least two different runs"),
        (["compare", "run1", "run2", "--seeds", "1"], "--seeds must be at least 2"),
        (["report", "--checkpoint", "run1/final_model.pt", "--sweep", "0"], "at least 1 network call, not 0"),
        (["compare", "run1", "run2", "--nfe", "4", "-1"], "at least 1 network call, not -1"),
        (["ablate", "--change", "fast"], "not of the form name:flag[=value]"),
        (["ablate", "--change", "fast:lr="], "not of the form name:flag[=value]"),
        (["ablate", "--change", "x:save_dir=y"], "--save_dir in --change is for this script to choose"),
        (["ablate", "--change", "x:image_size=64"], "--image_size in --change is for this script to choose"),
        (["report", "--checkpoint", "run1/final_model.pt", "--samples", "3"], "--samples must be at least 16"),
    ],
)
def test_bad_wishes_are_refused(runs, faces, tiny_network, monkeypatch, command, message):
    flags = ["--data_root", faces, "--split_dir", faces, "--features", tiny_network, "--out", "out", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["src.evaluation", *command, *map(str, flags)])
    with pytest.raises(UserError, match=re.escape(message)):
        main()
    assert not (runs / "out").exists()


def test_a_refusal_is_one_line(runs, faces):
    flags = ["--data_root", faces, "--split_dir", faces, "--out", "out"]
    result = evaluation(runs, "compare", "run1", "absent", *flags)
    assert result.returncode == 1 and result.stderr.startswith("error: no checkpoint at absent")
    assert result.stderr.count("\n") == 1


def test_a_sweep_tells_nfes_with_settings_of_their_own_from_others(monkeypatch):
    """A line through both would tell of the settings, not of network calls."""
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, *y, **how: drawn.append(list(x)) or plot(axes, x, *y, **how))
    content = {"distance": "FD", "floor": {"frechet": 1.0}, "sweep": {"1": 9.0, "2": 5.0, "3": 7.0, "8": 4.0}}
    for settings, told in (
        ({"smoothing": {}, "time_grids": {}}, [[1, 2, 3, 8]]),
        ({"smoothing": {1: 0.1}, "time_grids": {2: [1, 0.5, 0]}}, [[3, 8], [1, 2]]),
    ):
        drawn.clear()
        assert page._plot_sweep(content | {"sampler": settings}).startswith(b"\x89PNG") and drawn == told
