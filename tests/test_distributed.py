"""Several processes through torchrun (gloo on the CPU)."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import started

from src.errors import UserError
from src.training.distributed import World, joined

ROOT = Path(__file__).resolve().parents[1]


def torchrun(processes, cwd, env, script, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(script), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(command, cwd=cwd, env={**env, "OMP_NUM_THREADS": "1"}, **pipes) as process:
        told = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, *told)


def test_two_processes_give_the_gradient_of_one(faces, workdir, script_env):
    for processes in (1, 2):
        result = torchrun(processes, workdir, script_env, ROOT / "tests/ddp_worker.py", faces, workdir)
        assert result.returncode == 0, result.stderr
    one, left, right = (torch.load(workdir / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(left["gradient"], right["gradient"])
    difference = (one["gradient"] - left["gradient"]).norm() / one["gradient"].norm()
    assert difference < 1e-5, f"{difference:.1e}"
    assert one["loss"] == pytest.approx(left["loss"], rel=1e-5) and left["loss"] == right["loss"]
    assert torch.equal(one["noise"], torch.cat([left["noise"], right["noise"]]))
    assert torch.equal(one["data"], torch.cat([left["data"], right["data"]]))
    assert not torch.equal(left["noise"], right["noise"])
    assert left["heard"]["name"] == right["heard"]["name"] == "rank 0"
    for name in ("halves", "steps", "images"):  # a checkpoint's tensors travel as they are
        torch.testing.assert_close(right["heard"][name], left["own"][name], rtol=0, atol=0)


def test_two_processes_train_and_one_goes_on(faces, workdir, script_env):
    flags = ["--data_root", faces, "--split_dir", faces, "--unet", "small", "--image_size", "32", "--device", "cpu",
             "--batch_size", "8", "--save_dir", "run", "--log_interval", "1"]  # fmt: skip
    result = torchrun(2, workdir, script_env, ROOT / "train.py", *flags, "--num_iterations", "3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 x cpu") == 1  # only one process talks
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, flags), "--num_iterations", "5"],
        cwd=workdir, env=script_env, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line)["step"] for line in (workdir / "run/metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5]
    sessions = json.loads((workdir / "run/run.json").read_text())["sessions"]
    assert [(one["processes"], one["first_step"], one["last_step"]) for one in sessions] == [(2, 0, 3), (1, 3, 5)]

    result = torchrun(2, workdir, script_env, ROOT / "train.py", *flags, "--num_iterations", "6", "--batch_size", "7")
    assert result.returncode != 0 and result.stderr.count("error: --batch_size 7 does not split over 2") == 1


def test_two_processes_go_through_stages_with_pairs_and_a_critic(faces, workdir, script_env):
    stages = "rectified_flow:0.34,reflow/pairs=100/solver_steps=1:0.33,adversarial:0.33"
    result = torchrun(
        2, workdir, script_env, ROOT / "train.py", "--data_root", faces, "--split_dir", faces, "--unet", "small",
        "--image_size", "32", "--device", "cpu", "--batch_size", "4", "--save_dir", "run", "--log_interval", "1",
        "--stages", stages, "--num_iterations", "6",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (workdir / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == [0, 0, 1, 1, 2, 2] and "critic_right" in rows[-1]
    # Of two chunks, one for each process; that the images are the teacher's, the run has checked itself.
    (folder,) = (workdir / "data/cache").glob("pairs-*")
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "pairs.npy"]
    assert (np.abs(np.load(folder / "pairs.npy").astype(np.float32)).reshape(200, -1).max(axis=1) > 0.5).all()
    kept = torch.load(workdir / "run/last.ckpt", weights_only=True)
    assert set(kept["training"]) >= {"teacher", "critic", "critic_optimizer"}
    exported = torch.load(workdir / "run/final_model.pt", weights_only=True)
    assert set(exported) == {"state_dict", "model_config", "provenance"}
    assert not [name for name in exported["state_dict"] if not name.startswith("network.")]


def test_a_signal_to_torchrun_saves_before_all_stop(faces, workdir, script_env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train.py"), "--data_root", str(faces), "--split_dir", str(faces), "--unet", "small",
               "--image_size", "32", "--device", "cpu", "--batch_size", "8", "--save_dir", "run",
               "--log_interval", "5"]  # fmt: skip
    metrics, env = workdir / "run/metrics.jsonl", {**script_env, "OMP_NUM_THREADS": "1"}
    with (workdir / "log").open("w") as log, started(command, cwd=workdir, env=env, stderr=log) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.1)
        assert metrics.exists()
        process.terminate()
        assert process.wait(60) != 0
    assert "and saved: the same command with --save_dir run goes on" in (workdir / "log").read_text()
    assert torch.load(workdir / "run/last.ckpt", weights_only=True)["training"]["step"] >= 5


def test_a_fault_of_one_machine_is_told_there(faces, workdir, script_env):
    for port in range(29_600, 30_000):  # below those that are given to who asks for any
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            break
    command = [sys.executable, str(ROOT / "train.py"), "--unet", "small", "--image_size", "32", "--device", "cpu",
               "--batch_size", "4", "--save_dir", "run", "--data_root", str(faces), "--split_dir"]  # fmt: skip
    with contextlib.ExitStack() as both:
        processes = []
        for rank, split in enumerate((faces, "nowhere")):  # as torchrun would on two machines, with one process each
            (workdir / str(rank)).mkdir()
            env = {**script_env, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            options = {"cwd": workdir / str(rank), "env": env, "stderr": subprocess.PIPE}
            processes.append(both.enter_context(started([*command, str(split)], **options)))
        (_, other), (_, told) = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [1, 1]
    assert "error: no split file nowhere/train_split.txt" in told.splitlines()[-1] and "Traceback" not in other


WORKER = """
import atexit
from src.errors import UserError
from src.training.distributed import joined
atexit.register(print, 'taken down')
with joined('cpu') as (world, device):
    print(f'rank {{world.rank}} {{world.any(world.rank == 1)}};', end='')
    {then}
"""


def test_a_process_of_several_ends_at_once(workdir, script_env):
    """Taking the interpreter down beside gloo's threads aborted or hung now and then."""
    told = {
        "pass": "",
        "raise UserError('a fault')": "error: a fault",
        "if world.rank: raise OSError('no space')": "error: no space",
        "1 / 0": "ZeroDivisionError: division by zero",
    }
    for then, line in told.items():
        (workdir / "worker.py").write_text(WORKER.format(then=then))
        result = torchrun(2, workdir, script_env, workdir / "worker.py")
        assert (result.returncode == 0) == (then == "pass"), result.stderr
        assert not line or line in result.stderr.splitlines()
        assert "taken down" not in result.stdout
        if then == "pass":  # otherwise torchrun ends one when the other has ended
            assert sorted(result.stdout.split(";")) == ["", "rank 0 True", "rank 1 True"]


def test_a_rank_without_torchrun_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="LOCAL_RANK.*start with torchrun"), joined("cpu"):
        pass


def test_one_process_needs_no_group():
    world = World()
    assert world.any(True) and not world.any(False)
    assert world.mean(torch.tensor([1.0, 3.0])) == 2 and world.mean(torch.zeros(0)) is None
    assert world.from_rank_0(lambda: "made") == "made"
    with pytest.raises(ZeroDivisionError):
        world.from_rank_0(lambda: 1 / 0)
