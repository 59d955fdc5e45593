import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from src.faces import write_dataset

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def same_beginning(monkeypatch):
    """Whatever ran before, and whoever calls: the same random numbers, and no other repository for git."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """A folder of 24 training and 8 validation faces with their split files."""
    root = tmp_path_factory.mktemp("faces")
    write_dataset(root, train=24, val=8, size=64)
    return root


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """An empty current folder, for everything that writes to relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shared() -> Path:
    """The optional folder of test assets that lies beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the optional assets in ../shared are not here")
    return SHARED


@pytest.fixture
def randomised():
    """Give a fresh U-Net weights that do something: its last layers start near zero."""

    def apply(model, seed=3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        return model

    return apply


@pytest.fixture
def script_env() -> dict:
    """For scripts run as a user would: our root on the path, and as many threads as here, for equal rounding."""
    root = Path(__file__).resolve().parents[1]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads())}


class Layers(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 99).flatten(1)


class TinyNetwork(torch.nn.Module):
    """Of the same form as the Inception network's file: `layers` takes [B, 3, 299, 299] to features, here [B, 27]."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def tiny_network(tmp_path) -> Path:
    torch.jit.script(TinyNetwork()).save(tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"
