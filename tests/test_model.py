"""Scheduler, flow map and factory."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from custom_model import CustomGenerativeModel, CustomScheduler, create_custom_model
from src.errors import UserError
from src.filters import non_local_means, unsharp_mask


def test_path_round_trips_in_float64():
    scheduler = CustomScheduler()
    data, noise = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    t = torch.rand(6, dtype=torch.float64)
    x_t = scheduler.forward_process(data, noise, t)
    v = scheduler.get_target(data, noise, t)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    torch.testing.assert_close(scheduler.reverse_process_step(x_t, v, t, zero), data, rtol=0, atol=1e-12)
    torch.testing.assert_close(scheduler.reverse_process_step(x_t, v, t, one), noise, rtol=0, atol=1e-12)
    assert torch.equal(scheduler.forward_process(data, noise, zero), data)
    assert torch.equal(scheduler.forward_process(data, noise, one), noise)


@pytest.mark.parametrize(
    "name, distribution",
    [
        ("uniform", lambda t: t),
        ("u_shaped", lambda t: (1 + math.sinh(4 * (t - 0.5)) / math.sinh(2)) / 2),
        ("logit_normal", lambda t: (1 + math.erf(math.log(t / (1 - t)) / math.sqrt(2))) / 2),
    ],
)
def test_times_follow_their_density(name, distribution):
    torch.manual_seed(0)
    t = CustomScheduler(time_sampling=name).sample_timesteps(100_000, "cpu")
    assert t.shape == (100_000,) and t.min() >= 0 and t.max() <= 1
    for threshold in (0.05, 0.3, 0.5, 0.8, 0.95):
        assert (t <= threshold).double().mean().item() == pytest.approx(distribution(threshold), abs=0.006)


class GaussianFlow(nn.Module):
    """The exact flow map of N(mean, 0.5^2): each noise has one path, and jumps along it are exact."""

    use_additional_condition = True
    mean, std = 0.3, 0.5

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.calls = []

    def forward(self, x, timestep, condition):
        self.calls.append((timestep[0].item(), condition[0].item()))
        t, r = timestep[0] / 1000, (timestep[0] - condition[0]) / 1000
        spread = [((1 - s) ** 2 * self.std**2 + s**2).sqrt() for s in (t, r)]
        x_r = (1 - r) * self.mean + (x - (1 - t) * self.mean) * spread[1] / spread[0]
        return (x - x_r) / (t - r)


@pytest.mark.parametrize("nfe", [1, 2, 3, 4])
def test_jumps_of_an_exact_flow_map_are_exact(nfe):
    network = GaussianFlow()
    model = CustomGenerativeModel(network, CustomScheduler(), objective="shortcut")
    noise = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    images = model.sample((5, 3, 2, 2), nfe, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(images, 0.3 + 0.5 * noise, rtol=0, atol=1e-5)
    times = [1000 * (1 - i / nfe) for i in range(nfe)]
    assert [t for t, _ in network.calls] == pytest.approx(times)
    assert [d for _, d in network.calls] == pytest.approx([1000 / nfe] * nfe, rel=1e-4)


def test_time_grid_of_the_config_is_walked():
    network = GaussianFlow()
    scheduler = CustomScheduler(time_grids={"2": [1, 0.7, 0]})  # JSON has string keys
    model = CustomGenerativeModel(network, scheduler, objective="shortcut")
    model.sample((1, 3, 2, 2), 2)
    assert network.calls == [pytest.approx((1000, 300), rel=1e-4), pytest.approx((700, 700), rel=1e-4)]
    for bad in ([1, 0], [1, 0.5, 0.1], [0.9, 0.5, 0], [1, 0, 0]):
        with pytest.raises(UserError, match="NFE 2"):
            CustomScheduler(time_grids={"2": bad})


def test_smoothing_takes_grain_from_even_areas_and_leaves_edges():
    scheduler = CustomScheduler(smoothing={"2": 0.06})  # JSON has string keys
    halves = torch.full((4, 3, 16, 16), -0.5)
    halves[..., 8:] = 0.5
    grain = 0.03 * torch.randn(halves.shape, generator=torch.Generator().manual_seed(0))
    smooth = scheduler.filtered(halves + grain, 2)
    assert (smooth - halves).std() < 0.4 * grain.std()
    assert (smooth - halves)[..., 7:9].std() < 0.5 * grain.std()  # a plain mean would be off by a third of the step
    strong = 4 * grain  # twice sigma: a pixel alone would be taken for an edge
    assert (scheduler.filtered(halves + strong, 2) - halves).std() < 0.35 * strong.std()
    clouds = F.interpolate(grain[..., ::4, ::4], scale_factor=4, mode="bilinear")  # wider than a few pixels
    assert (scheduler.filtered(halves + clouds, 2) - halves).std() < 0.7 * clouds.std()
    torch.testing.assert_close(scheduler.filtered(halves, 2), halves)
    assert torch.equal(scheduler.filtered(halves + grain, 1), halves + grain)  # an NFE that is not named
    with pytest.raises(UserError, match="smoothing for NFE 2 must be a positive number, got 0.0"):
        CustomScheduler(smoothing={"2": 0})


def test_smoothing_is_the_means_that_it_says():
    """Four times, over 17x17 pixels, by how alike the 3x3 around them are; in loops."""
    sigma = 0.3
    x = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = x[0].numpy()
    rows, columns = np.mgrid[:4, :5]
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    for _ in range(4):
        total, norm = 0, 0
        for i, j in itertools.product(range(-8, 9), repeat=2):
            near = expected[:, np.clip(rows + i, 0, 3), np.clip(columns + j, 0, 4)]
            apart = np.pad(((near - expected) ** 2).mean(0), 1, mode="edge")
            apart = sum(weights[k, m] * apart[k : k + 4, m : m + 5] for k in range(3) for m in range(3))
            weight = np.exp(-apart / (2 * sigma**2))
            total, norm = total + weight * near, norm + weight
        expected = total / norm
    found = non_local_means(x, sigma)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_sharpening_raises_edges_and_leaves_even_areas():
    scheduler = CustomScheduler(sharpening={"2": 0.5})
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1.0
    sharp = scheduler.filtered(step, 2)
    # The blur, weights 1/4, 1/2, 1/4, makes 0 and 1 at the edge 1/4 and 3/4: half of that difference goes on top.
    torch.testing.assert_close(sharp[0, 0, 0], torch.tensor([0, 0, 0, -0.125, 1.125, 1, 1, 1]))
    torch.testing.assert_close(sharp, sharp[..., :1, :].expand_as(sharp))  # edges of the image too
    assert torch.equal(scheduler.filtered(step, 1), step)  # an NFE that is not named
    with pytest.raises(UserError, match="sharpening for NFE 2 must be a positive number, got -1.0"):
        CustomScheduler(sharpening={"2": -1})
    assert "gonzalez2018digital" in scheduler.citations


def test_a_part_of_late_jumps_is_asked_for_and_the_whole_is_jumped(randomised):
    asking = {"4": 0.75}  # JSON has string keys
    model = randomised(create_custom_model(unet="small", image_size=32, asking=asking)).eval()
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = model.sample(noise.shape, 4, return_traj=True, noise=noise)
    for i, (t, d) in enumerate(((1.0, 0.25), (0.75, 0.25), (0.5, 0.1875), (0.25, 0.1875))):
        torch.testing.assert_close(x[i + 1], x[i] - 0.25 * model.predict(x[i], t, d))
    x = model.sample(noise.shape, 2, return_traj=True, noise=noise)  # an NFE that is not named
    torch.testing.assert_close(x[2], x[1] - 0.5 * model.predict(x[1], 0.5, 0.5))
    for nfe, part in (("2", 1.5), ("1", 0.5)):
        with pytest.raises(
            UserError, match=f"asking for NFE {nfe} is a part of a jump, at most 1, from NFE 2 on, got {part}"
        ):
            CustomScheduler(asking={nfe: part})


def test_samples_are_filtered_as_the_config_says(randomised):
    model = randomised(create_custom_model(unet="small", image_size=32))
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = model.sample(noise.shape, 2, return_traj=True, noise=noise)
    model.scheduler = CustomScheduler(smoothing={2: 0.1}, sharpening={2: 0.5})
    filtered = model.sample(noise.shape, 2, return_traj=True, noise=noise)
    assert torch.equal(filtered[1], plain[1]) and not torch.equal(filtered[2], plain[2])
    assert torch.equal(filtered[2], unsharp_mask(non_local_means(plain[2], 0.1), 0.5))
    assert torch.equal(model.sample(noise.shape, 2, noise=noise), filtered[2])


def test_a_flow_without_jumps_is_asked_for_the_velocity_even_with_a_condition():
    network = GaussianFlow()
    asked = []
    network.forward = lambda x, t, d: asked.append(d.tolist()) or torch.zeros_like(x)
    CustomGenerativeModel(network, CustomScheduler(), objective="rectified_flow").sample((2, 3, 2, 2), 2)
    assert asked == [[0, 0], [0, 0]]


def test_sampling_leaves_every_module_in_its_mode_and_makes_no_graph(randomised):
    model = randomised(create_custom_model(unet="small")).train()
    model.network.middleblocks.eval()
    before = [module.training for module in model.modules()]
    traj = model.sample((2, 3, 32, 32), 2, return_traj=True, generator=torch.Generator().manual_seed(0))
    assert [module.training for module in model.modules()] == before
    assert len(traj) == 3 and not traj[-1].requires_grad
    again = model.sample((2, 3, 32, 32), 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(traj[-1], again)  # no dropout although the model is in train mode


def test_scalars_reach_the_network_scaled():
    model = create_custom_model(unet="small", num_train_timesteps=500)
    seen = {}
    model.network.register_forward_pre_hook(lambda _, inputs: seen.update(t=inputs[1], d=inputs[2]))
    model.predict(torch.zeros(2, 3, 32, 32), torch.tensor([0.5, 1.0]), d=0.25)
    assert seen["t"].tolist() == [250, 500] and seen["d"].tolist() == [125, 125]


@pytest.mark.parametrize("objective", ["shortcut", "rectified_flow"])
def test_a_velocity_has_its_states_precision_under_autocast(objective):
    model = create_custom_model(objective=objective, unet="small", image_size=32)
    kinds = []
    model.network.tail.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.predict(torch.zeros(1, 3, 32, 32), 0.5).dtype == torch.float32
    assert kinds == [torch.bfloat16]


def test_jump_without_a_condition_is_refused():
    model = create_custom_model(objective="rectified_flow", unet="small")
    with pytest.raises(ValueError, match="no extra condition"):
        model.predict(torch.zeros(1, 3, 32, 32), 1.0, d=1.0)


def test_bad_calls_of_sample_are_refused():
    model = create_custom_model(objective="rectified_flow", unet="small")
    with pytest.raises(ValueError, match="at least one"):
        model.sample((1, 3, 32, 32), 0)
    with pytest.raises(ValueError, match="1 generators for 2"):
        model.sample((2, 3, 32, 32), 1, generator=[torch.Generator()])


@pytest.mark.parametrize(
    "config, objective, condition",
    [
        ({}, "shortcut", True),
        ({"use_additional_condition": False}, "rectified_flow", False),  # what the base code saves
        ({"use_additional_condition": True}, "shortcut", True),
        ({"objective": "rectified_flow"}, "rectified_flow", False),
        ({"objective": "rectified_flow", "use_additional_condition": True}, "rectified_flow", True),
        ({"model_type": "A", "scheduler_type": "B", "num_train_timesteps": 1000}, "shortcut", True),
    ],
)
def test_factory_settles_objective_and_condition(config, objective, condition):
    model = create_custom_model(unet="small", **config)
    assert type(model.objective).__name__.lower() == objective.replace("_", "")
    assert model.network.use_additional_condition is condition
    assert all(name.startswith("network.") for name in model.state_dict())


@pytest.mark.parametrize(
    "config, message",
    [
        ({"lr": 1e-4}, "unknown model setting 'lr'"),
        ({"objective": "gan"}, "unknown objective 'gan'.*rectified_flow, reflow, shortcut"),
        ({"unet": "huge"}, "unknown unet"),
        ({"image_size": 48}, "unknown image_size 48"),
        ({"time_sampling": "cosine"}, "unknown time_sampling"),
        ({"num_train_timesteps": math.nan}, "num_train_timesteps must be a positive number, got nan"),
        ({"use_additional_condition": "false"}, "use_additional_condition must be true or false, got 'false'"),
        ({"objective": "shortcut", "use_additional_condition": False}, "needs the extra condition"),
    ],
)
def test_factory_refuses_by_name(config, message):
    with pytest.raises(UserError, match=message):
        create_custom_model(**{"unet": "small", **config})


def test_the_challenges_network_is_the_default():
    model = create_custom_model()
    assert sum(p.numel() for p in model.network.parameters()) == 59_934_979
    assert model.network.time_embedding.mlp[0].out_features == 512 and model.image_size == 64
