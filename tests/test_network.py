"""The U-Net against figures of the challenge's own network (tests/golden/)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from src.module import TimeEmbedding
from src.network import UNet

GOLDEN = Path(__file__).parent / "golden"
SMALL = dict(ch=32, num_res_blocks=1)
VARIANTS = {
    "full_plain": dict(),
    "full_cond": dict(use_additional_condition=True),
    "small_plain": dict(SMALL),
    "small_cond": dict(SMALL, use_additional_condition=True),
}


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "unet_golden.npz")


def fill(network):
    """The golden parameters: a sine for each entry, scaled by its kind."""
    state = network.state_dict()
    for k, (name, p) in enumerate(state.items()):
        v = np.sin(0.37 * np.arange(p.numel(), dtype=np.float64) + 0.11 * k).reshape(p.shape)
        if p.ndim > 1:
            v = v * np.sqrt(2 * p.shape[0] / p.numel())
        elif name.endswith("weight"):
            v = 1 + 0.1 * v
        else:
            v = 0.1 * v
        p.copy_(torch.from_numpy(v.astype(np.float32)))
    return network


@pytest.mark.parametrize("variant", VARIANTS)
def test_layout_and_output_are_the_challenges(variant, golden):
    layout = json.loads((GOLDEN / "state_dict_layout.json").read_text())[variant]
    network = UNet(**VARIANTS[variant]).eval()
    assert [[name, list(p.shape)] for name, p in network.state_dict().items()] == layout

    fill(network)
    B = golden[variant].shape[0]
    x = torch.from_numpy(np.sin(0.37 * np.arange(B * 3 * 64 * 64)).astype(np.float32)).reshape(B, 3, 64, 64)
    t = torch.tensor([0, 250.5, 999])[:B]
    condition = torch.tensor([1000.0, 500.0, 0.0])[:B] if network.use_additional_condition else None
    with torch.no_grad():
        out = network(x, t, condition).numpy()
    error = np.abs(out - golden[variant]).max() / np.abs(golden[variant]).max()
    assert error < 1e-4, f"largest error {error:.2e} of the largest output"


@pytest.mark.parametrize("condition, parameters", [(False, 58_753_283), (True, 59_934_979)])
def test_seed_zero_initialisation_is_the_challenges(condition, parameters):
    expected = json.loads((GOLDEN / "seed0_init_fingerprint.json").read_text())["cond" if condition else "plain"]
    torch.manual_seed(0)
    network = UNet(use_additional_condition=condition)
    assert sum(p.numel() for p in network.parameters()) == parameters
    for name, p in network.named_parameters():
        total, largest = expected[name]
        assert p.double().sum().item() == pytest.approx(total, rel=1e-6, abs=1e-4), name
        assert p.abs().max().item() == pytest.approx(largest, rel=1e-6), name


def test_time_embedding(golden):
    t = torch.tensor([0, 0.5, 1, 250.5, 999])
    ours = TimeEmbedding.timestep_embedding(t, 256).numpy()
    np.testing.assert_allclose(ours, golden["timestep_embedding_256"], atol=1e-4)


def test_condition_is_required_where_the_network_has_it_and_ignored_where_not():
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10.0, 900.0])
    with pytest.raises(ValueError, match="condition"):
        UNet(**SMALL, use_additional_condition=True)(x, t)
    plain = UNet(**SMALL).eval()
    assert torch.equal(plain(x, t), plain(x, t, torch.tensor([1.0, 2.0])))
