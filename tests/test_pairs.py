"""A teacher's (noise, image) pairs."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from toy import GaussianField

from custom_model import CustomGenerativeModel, CustomScheduler
from src.errors import UserError
from src.objectives import make_objective
from src.training import pairs as room
from src.training.pairs import TimeUp, load_pairs, solve

SHAPE = (1, 4, 4)


@pytest.fixture
def teacher():
    return CustomGenerativeModel(GaussianField(), CustomScheduler(), objective="rectified_flow")


def reflow(options="pairs=200/solver_steps=8"):
    return make_objective(f"reflow/{options}", CustomScheduler())


def test_solvers_converge_with_their_order(teacher):
    noise = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    exact = noise * GaussianField.SIGMA
    errors = {
        (solver, steps): (solve(teacher, noise, solver, steps) - exact).norm().item()
        for solver in ("euler", "heun")
        for steps in (16, 32)
    }
    assert 1.8 < errors["euler", 16] / errors["euler", 32] < 2.2
    assert 3.5 < errors["heun", 16] / errors["heun", 32] < 4.5
    calls = []
    teacher.network.register_forward_hook(lambda *_: calls.append(1))
    solve(teacher, noise, "heun", 5), solve(teacher, noise, "euler", 5)
    assert len(calls) == 15


def test_pairs_are_made_once_and_go_on_where_they_were(teacher, workdir, monkeypatch):
    noise, images = load_pairs(teacher, SHAPE, reflow(), seed=1)
    assert noise.shape == images.shape == (200, *SHAPE) and noise.dtype == np.float16
    assert np.allclose(images, noise * GaussianField.SIGMA, atol=0.02)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    (folder,) = (workdir / "data/cache").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["steps"] == 8 and len(manifest["teacher"]) == 64
    scored = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1_000_003)).half().numpy()
    assert not (noise == scored).all((1, 2, 3)).any()  # a report's second sampling seed begins at 1,000,000
    whole = np.array(images)

    # As if killed after the first of four chunks.
    both = np.load(folder / "pairs.npy")
    (folder / "pairs.npy").unlink()
    np.save(folder / "0.npy", both[:, : room.CHUNK])
    solved = []
    calls = []

    def interrupted(model, eps, *how):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return solve(model, eps, *how)

    monkeypatch.setattr(room, "solve", interrupted)
    with pytest.raises(UserError, match="stopped while generating pairs: the same command, with"):
        load_pairs(teacher, SHAPE, reflow(), seed=1)
    assert sorted(path.name for path in folder.glob("*.npy")) == ["0.npy", "1.npy"]
    monkeypatch.setattr(room, "solve", lambda model, eps, *how: solved.append(len(eps)) or solve(model, eps, *how))
    assert np.array_equal(load_pairs(teacher, SHAPE, reflow(), seed=1)[1], whole)
    assert solved == [64, 8, 16]  # what was missing, then the check
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "pairs.npy"]
    load_pairs(teacher, SHAPE, reflow(), seed=2)
    assert len(list((workdir / "data/cache").iterdir())) == 2


def test_max_minutes_end_a_session_after_each_chunk(teacher, workdir):
    for chunks in (1, 2, 3):
        with pytest.raises(TimeUp):
            load_pairs(teacher, SHAPE, reflow(), seed=1, ends=0.0)
        assert len(list(workdir.glob("data/cache/*/*.npy"))) == chunks
    noise, images = load_pairs(teacher, SHAPE, reflow(), seed=1, ends=0.0)
    assert np.allclose(images, noise * GaussianField.SIGMA, atol=0.02)


def test_pairs_that_are_not_the_teachers_are_refused(teacher, workdir):
    load_pairs(teacher, SHAPE, reflow(), seed=1)
    (folder,) = (workdir / "data/cache").iterdir()
    kept = np.load(folder / "pairs.npy")
    chunk = (np.arange(200) // room.CHUNK == 2)[:, None, None, None]
    for which in range(2):
        for damaged in (kept[which, ::-1], np.where(chunk, 0, kept[which])):
            np.save(folder / "pairs.npy", np.stack([damaged, kept[1]] if which == 0 else [kept[0], damaged]))
            with pytest.raises(UserError, match="pair .* of .* is not what the teacher makes of its noise: delete"):
                load_pairs(teacher, SHAPE, reflow(), seed=1)


def test_a_damaged_chunk_is_deleted_and_made_anew(teacher, workdir):
    whole = np.array(load_pairs(teacher, SHAPE, reflow(), seed=1))
    (folder,) = (workdir / "data/cache").iterdir()
    (folder / "pairs.npy").unlink()
    np.save(folder / "1.npy", whole[:, 64:128])
    os.truncate(folder / "1.npy", 500)
    (folder / ".pairs.npy.1234.tmp").write_bytes(b"of a killed process")
    with pytest.raises(UserError, match="1.npy was damaged and is deleted: the same command goes on"):
        load_pairs(teacher, SHAPE, reflow(), seed=1)
    assert np.array_equal(load_pairs(teacher, SHAPE, reflow(), seed=1), whole)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "pairs.npy"]


def test_no_seed_makes_pairs_of_noise_that_is_scored(teacher, workdir):
    """A CPU generator tells 32 bits of a seed apart: beyond lies 0, the first of a report's."""
    for seed in (45097, 139586):
        load_pairs(teacher, SHAPE, reflow("pairs=50000/solver=euler/solver_steps=1"), seed=seed)
    firsts = [json.loads(path.read_text())["first_noise"] for path in workdir.glob("data/cache/*/manifest.json")]
    assert len(firsts) == 2 and all(2**31 <= first <= 2**32 - 50_000 for first in firsts)


def test_bad_wishes_get_one_clear_line(teacher, workdir, monkeypatch):
    with pytest.raises(UserError, match="unknown solver 'rk4': choose heun or euler"):
        reflow("solver=rk4")
    with pytest.raises(UserError, match="needs .* GB for the pairs: make room, or ask for fewer"):
        load_pairs(teacher, (3, 64, 64), reflow("pairs=2000000000"), seed=1)
