"""What every objective must pass. A new one joins by its line in OBJECTIVES."""

import copy
import json
from functools import cache

import numpy as np
import pytest
import torch
from toy import distances, train_on_mixture

from custom_model import create_custom_model
from src.objectives import OBJECTIVES
from src.objectives.contract import Nets
from src.training.data import load_images
from src.training.engine import Loss, Recipe, accumulate_gradient, train

FEW_STEP = [name for name, objective in OBJECTIVES.items() if objective.learns_jumps]


@pytest.fixture(params=OBJECTIVES)
def name(request):
    return request.param


@pytest.fixture
def model(name, randomised):
    return randomised(create_custom_model(objective=name, unet="small", image_size=32))


def batch(count=8, size=32):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(count, 3, size, size, generator=generator) for _ in range(2)]


def test_loss_and_gradients_are_finite(model):
    data, noise = batch()
    draw = model.objective.draw(len(data))
    loss, logs = model.objective.loss(Nets(model, copy.deepcopy(model).eval()), data, noise, 0, draw)
    assert loss.shape == (8,) and loss.isfinite().all() and (loss > 0).all()
    assert all(values.ndim == 1 and not values.requires_grad for values in logs.values())
    loss.mean().backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), parameter_name
    assert model.compute_loss(data, noise).ndim == 0


def test_loss_of_a_plain_loop_reaches_every_weight_under_autocast(model):
    data, noise = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.compute_loss(data, noise)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_loss_is_a_function_of_its_draw(model):
    model.eval()
    data, noise = batch()
    draw = model.objective.draw(len(data))
    first, second = (model.objective.loss(Nets(model, model), data, noise, 0, draw)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_one_network_call_a_jump(model, nfe):
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    images = model.sample((3, 3, 32, 32), num_inference_timesteps=nfe)
    assert len(calls) == nfe
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.float32 and images.isfinite().all()


def test_images_do_not_depend_on_batch_size(model):
    together = model.sample((4, 3, 32, 32), 2, generator=[torch.Generator().manual_seed(i) for i in range(4)])
    for i, image in enumerate(together):
        alone = model.sample((1, 3, 32, 32), 2, generator=[torch.Generator().manual_seed(i)])[0]
        torch.testing.assert_close(alone, image, rtol=1e-4, atol=1e-4)


def test_accumulation_does_not_change_the_gradient(model):
    model.eval()  # dropout's masks do depend on the slices
    ema = copy.deepcopy(model)
    data, noise = batch(16)
    gradients = []
    draw = model.objective.draw(16)
    for slices in (1, 2, 8):
        model.zero_grad()
        accumulate_gradient(Loss(model, ema), data, noise, draw, 0, slices)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_resumed_training_is_bitwise_equal(name, faces, workdir):
    images, key = load_images(str(faces), str(faces), 32)

    def run(folder, *stops):
        for stop in stops:
            torch.manual_seed(0)
            model = create_custom_model(objective=name, unet="small", image_size=32)
            recipe = Recipe(batch_size=8, num_iterations=stop, lr=1e-3, warmup=2, log_interval=2, save_interval=100)
            train(model, {"objective": name}, images, key, recipe, workdir / folder, {})
        return torch.load(workdir / folder / "last.ckpt", weights_only=True)

    straight, resumed = run("straight", 7), run("resumed", 3, 7)

    def tensors(tree):
        if isinstance(tree, torch.Tensor):
            return [tree]
        return [t for value in (tree.values() if isinstance(tree, dict) else []) for t in tensors(value)]

    sessions = json.loads((workdir / "resumed/run.json").read_text())["sessions"]
    assert [one["first_step"] for one in sessions] == [0, 3]
    pairs = list(zip(tensors(straight), tensors(resumed), strict=True))
    assert len(pairs) > 300 and all(torch.equal(a, b) for a, b in pairs)


@cache
def mixture_distances(name):
    return distances(train_on_mixture(name))


def test_rectified_flow_reaches_the_mixture_with_many_steps():
    fine = distances(train_on_mixture("rectified_flow"), nfes=(128,))
    assert fine[128] < 0.1 and mixture_distances("rectified_flow")[1] > 0.4  # one Euler step finds the mean


@pytest.mark.parametrize("name", FEW_STEP)
def test_few_step_samples_are_closer_than_rectified_flows(name):
    ours, baseline = mixture_distances(name), mixture_distances("rectified_flow")
    assert ours[1] < 0.5 * baseline[1], (ours, baseline)
    assert ours[2] < baseline[2] and ours[4] <= baseline[4], (ours, baseline)


def test_shortcut_draws_the_dyadic_grid():
    torch.manual_seed(0)
    model = create_custom_model(objective="shortcut", unet="small")
    draw = model.objective.draw(80_000)
    t, d = draw["t"], draw["d"]
    jumps = d > 0
    assert jumps.float().mean().item() == pytest.approx(1 / 8, abs=1e-3)
    assert sorted(d[jumps].unique().tolist()) == [2.0**-k for k in range(6, -1, -1)]
    counts = np.array([(d == 2.0**-k).sum().item() for k in range(7)])
    assert counts.min() > 0.9 * counts.mean()
    multiples = t[jumps] / d[jumps]
    assert torch.equal(multiples, multiples.round()) and (t >= d).all() and (t <= 1).all()


def test_shortcut_target_is_two_teacher_steps():
    """On the exact flow map of a point mass, two half jumps land where one whole jump does."""

    class Exact(torch.nn.Module):
        asked = []

        def predict(self, xt, t, d):
            self.asked.append(d)
            return (xt - 0.5) / t[:, None]  # every path ends at 0.5

    model = create_custom_model(objective="shortcut", unet="small")
    x = torch.linspace(-1.5, 1.5, 10).reshape(5, 2)
    t, d = torch.tensor([1.0, 1.0, 0.5, 0.25, 1 / 64]), torch.tensor([1.0, 0.5, 0.5, 0.125, 1 / 64])
    target = model.objective._two_steps(Exact(), x, t, d)
    torch.testing.assert_close(target, ((x - 0.5) / t[:, None]).clamp(-4, 4), rtol=1e-4, atol=1e-4)
    assert Exact.asked[0].tolist() == [0.5, 0.25, 0.25, 0.0625, 0]  # 1/128 is asked for as 0


def test_shortcut_learns_from_the_average_in_eval_mode_within_the_clip():
    class Wild(torch.nn.Module):
        """A teacher that jumps far out, and remembers how it was called."""

        def __init__(self):
            super().__init__()
            self.states, self.modes = [], []

        def predict(self, xt, t, d):
            self.states.append(xt)
            self.modes.append(self.training)
            return torch.full_like(xt, -100.0)

    model = create_custom_model(objective="shortcut", unet="small", image_size=32)
    teacher = Wild().train()
    data, noise = batch(16)
    draw = model.objective.draw(16)
    loss, logs = model.objective.loss(Nets(student=model, ema=teacher), data, noise, 0, draw)
    assert teacher.modes == [False, False] and teacher.training
    assert teacher.states[1].max() == 4  # the state between the two steps is clipped
    # A new network predicts about 0, so the bootstrapped loss is the clipped target's square.
    assert logs["loss_bootstrap"].tolist() == pytest.approx([16.0] * 2, rel=1e-2)
    assert len(logs["loss_flow"]) == 14 and loss.shape == (16,)
