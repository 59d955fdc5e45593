"""What every objective must pass. A new one joins by its line in OBJECTIVES."""

import copy
import json
import re
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial, partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from operations import Operations
from toy import MLP, distances, one_stage, train_on_mixture

from custom_model import TIME_SAMPLINGS, CustomGenerativeModel, CustomScheduler, create_custom_model
from src.errors import UserError
from src.evaluation.report import CITATIONS as SCORES
from src.objectives import OBJECTIVES, drifting, make_objective, parse_objective, parse_stages
from src.objectives.adversarial import DRAWN, WOBBLE, feature_gap, octave_noise, wobble
from src.objectives.contract import Nets
from src.objectives.critics import ConvCritic, augment, warp
from src.objectives.drifting import drift
from src.objectives.rollout import in_turn, roll_out, sample_through
from src.training import engine, fusing, muon, run_folder
from src.training.data import load_images
from src.training.distributed import World
from src.training.engine import Loss, Training, accumulate_gradient
from src.training.loop import train
from src.training.recipe import CITATIONS as TRAINING
from src.training.recipe import Recipe, plan

ROOT = Path(__file__).resolve().parents[1]

# Each objective as it is tested alone, and on the mixture after a rectified flow that it may learn from.
VARIANTS = {
    **{name: f"rectified_flow:0.5,{name}:0.5" for name in OBJECTIVES},
    "progressive/steps=2": "rectified_flow:0.4,progressive:0.6",
    "mean_flow/improved=true": "rectified_flow:0.5,mean_flow/improved=true/power=1/flow=0.5:0.5",
    "alpha_flow/anneal=12": "rectified_flow:0.5,alpha_flow/anneal=12:0.5",
    "alpha_flow/own=true": "rectified_flow:0.5,alpha_flow/own=true:0.5",
    "distribution_matching/told=true": "rectified_flow:0.5,distribution_matching/told=true:0.5",
    "adversarial/critic=conv": "rectified_flow:0.8,adversarial/critic=conv/augmented=false:0.2",
}
del VARIANTS["progressive"], VARIANTS["adversarial"], VARIANTS["drifting"]
# The encoder is a U-Net's, which the mixture has not.
ALONE = [*VARIANTS, "adversarial", "adversarial/warped=0.25", "drifting"]
FEW_STEP = [name for name in VARIANTS if name != "rectified_flow"]


@pytest.fixture(params=ALONE)
def name(request):
    return request.param


@pytest.fixture
def model(name, randomised):
    return randomised(create_custom_model(objective=name, unet="small", image_size=32))


def batch(count=8, size=32):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(count, 3, size, size, generator=generator) for _ in range(2)]


def nets_of(model):
    """The student and all the others, after a rectified flow and some training on: their weights differ."""

    def moved(net):
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        return net

    ema = copy.deepcopy(model).eval().requires_grad_(False)
    teacher = moved(copy.deepcopy(ema))
    teacher.objective = make_objective("rectified_flow", model.scheduler)
    torch.manual_seed(1)
    critic = model.objective.make_critic(teacher, (3, 32, 32))
    if critic is not None:
        moved(critic)
    return Nets(model, ema, teacher, critic)


def losses_of(objective, nets, shape):
    """Each loss, the network that it trains, and what it draws."""
    yield objective.loss, nets.student, objective.draw(shape)
    if nets.critic is not None:
        yield objective.critic_loss, nets.critic, objective.draw_for_critic(shape)


def test_loss_and_gradients_are_finite(name, model):
    data, noise = batch()
    nets = nets_of(model)
    # The gradient does go through the EMA's jump, and through the teacher's features.
    targets = {"trajectory": [nets.teacher], "drifting": [nets.ema]}.get(name, [nets.teacher, nets.ema])
    for other in targets:  # so that they could have a gradient
        other.requires_grad_(True)
    for loss_function, trained, draw in losses_of(model.objective, nets, data.shape):
        loss, logs = loss_function(nets, data, noise, 0.3, draw)
        assert loss.shape == (8,) and loss.isfinite().all() and (loss > 0).all()
        assert all(values.ndim == 1 and not values.requires_grad for values in logs.values())
        trained.zero_grad()
        loss.mean().backward()
        for parameter_name, p in trained.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), parameter_name
    for other in targets:
        assert all(p.grad is None for p in other.parameters())


def test_loss_of_a_plain_loop_reaches_every_weight_under_autocast(model):
    data, noise = batch()
    if model.objective.needs_teacher:
        with pytest.raises(UserError, match="learns from a trained model"):
            model.compute_loss(data, noise)
        return
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.compute_loss(data, noise)
    assert loss.ndim == 0
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_engine_trains_every_weight(model):
    """Under bfloat16, a pass of the student without gradient must not take the gradient from the next."""
    images = np.random.default_rng(0).integers(0, 255, (16, 3, 32, 32), np.uint8)
    # Without decay, which moves weights whose gradient is 0 as well.
    training = Training(model, images, Recipe(batch_size=8, warmup=0, weight_decay=0.0), one_stage(model))
    training.bf16 = True
    nets = [net for net in (model, training.nets.critic) if net is not None]
    before = [p.detach().clone() for net in nets for p in net.parameters()]
    if model.objective.pairs:
        training.pairs = np.random.default_rng(1).standard_normal((2, model.objective.pairs, 3, 32, 32), np.float32)
    training.step()
    after = [p for net in nets for p in net.parameters()]
    assert all((a != b).any() for a, b in zip(before, after, strict=True))


def test_all_jumps_with_a_gradient_share_one_cast_of_each_weight():
    """Not one a jump: a GPU that runs uncompiled waits for each."""
    model = create_custom_model(objective="adversarial", unet="small", image_size=32)
    nets, (data, noise) = nets_of(model), batch(8)
    draw = model.objective.draw(data.shape)
    assert draw["nfe"].max() == 4
    with torch.autocast("cpu", torch.bfloat16), Operations() as done:
        loss, _ = model.objective.loss(nets, data, noise, 0.5, draw)
    loss.mean().backward()
    convolutions = [part for part in model.modules() if isinstance(part, torch.nn.Conv2d)]
    casts = Counter(first for name, first in done.calls if name == "_to_copy")
    assert {casts[id(part.weight)] for part in convolutions} == {1}
    assert all(part.weight.grad is not None for part in convolutions)


def test_a_step_never_waits_for_its_device_nor_mixes_devices(name, monkeypatch):
    """On the meta device, which has shapes and no numbers: reading one, or joining tensors of two devices, fails."""
    if name == "reflow":
        pytest.skip("its pairs are numbers")
    if name == "adversarial/warped=0.25":
        name += "/matching=1"  # of 16 images or more
    model = create_custom_model(
        objective="rectified_flow", use_additional_condition=True, unet="small", image_size=32
    ).to("meta")
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **options: adamw(*args, foreach=True, **options))
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # there is none for meta
    stages = plan([(name, 1.0)], lambda name: make_objective(name, model.scheduler), 2)
    training = Training(model, np.zeros((32, 3, 32, 32), np.uint8), Recipe(batch_size=16), stages)
    logs, norm = training.step()
    assert {tensor.device.type for tensors in logs.values() for tensor in tensors} == {norm.device.type} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        norm.item()  # what such a wait would meet


@pytest.mark.parametrize(
    ("name", "programs"),
    [
        ("shortcut", 1),
        ("alpha_flow", 1),
        ("adversarial/critic=conv/augmented=false", 7),
        ("adversarial/critic=conv/augmented=false/warped=0.25/matching=1", 7),
        ("distribution_matching", 3),
    ],
)
def test_a_stage_compiles_at_its_first_step_alone(name, programs, monkeypatch):
    """Each program costs a GPU many seconds: none may depend on how many rows a step happens to draw."""
    model = CustomGenerativeModel(MLP(use_additional_condition=True), CustomScheduler(1000), objective="rectified_flow")
    compiled = torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(engine, "can_compile", lambda device: True)
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    stages = plan([("rectified_flow", 0.2), (name, 0.8)], lambda name: make_objective(name, model.scheduler), 10)
    training = Training(model, np.zeros((64, 1, 1, 2), np.uint8), Recipe(batch_size=16), stages)
    counts = []
    for _ in range(10):
        training.step()
        counts.append(compiled["unique_graphs"])
    torch._dynamo.reset()
    assert 0 < counts[0] == counts[1]  # a rectified flow
    assert counts[2] == counts[-1] == counts[1] + programs


def test_a_second_training_finds_what_the_first_compiled(monkeypatch):
    """A timed chain's trial pays for the chain itself."""
    compiled = torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(engine, "can_compile", lambda device: True)
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    counts = [compiled["unique_graphs"]]
    for seed in range(2):
        torch.manual_seed(seed)
        model = CustomGenerativeModel(MLP(True), CustomScheduler(1000), objective="rectified_flow")
        shares = [("rectified_flow", 0.5), ("alpha_flow", 0.5)]
        stages = plan(shares, lambda name: make_objective(name, model.scheduler), 4)  # noqa: B023 (used at once)
        training = Training(model, np.zeros((64, 1, 1, 2), np.uint8), Recipe(batch_size=16), stages)
        for _ in range(4):
            training.step()
        counts.append(compiled["unique_graphs"])
    torch._dynamo.reset()
    assert counts[0] < counts[1] == counts[2]


def test_a_plain_loops_loss_is_that_of_the_stages_end():
    model = CustomGenerativeModel(MLP(True), CustomScheduler(16), objective="alpha_flow/anneal=12")
    data, noise = torch.randn(2, 8, 1, 1, 2)
    torch.manual_seed(0)
    found = model.compute_loss(data, noise)
    torch.manual_seed(0)
    draw = model.objective.draw(data.shape)
    ended, began = (model.objective.loss(Nets(model, model), data, noise, p, draw)[0].mean() for p in (1.0, 0.0))
    assert torch.equal(found, ended) and not torch.equal(found, began)


def small_training(stages, steps, **recipe):
    model = CustomGenerativeModel(MLP(use_additional_condition=True), CustomScheduler(16), objective="rectified_flow")
    planned = plan(parse_stages(stages), lambda name: make_objective(name, model.scheduler), steps)
    images = np.random.default_rng(0).integers(0, 255, (32, 1, 1, 2), np.uint8)
    return Training(model, images, Recipe(**{"batch_size": 8, "warmup": 0, **recipe}), planned)


def test_averages_forget_the_stage_before():
    training = small_training("rectified_flow:0.9,alpha_flow:0.1", 20, lr=0.01)
    for _ in range(18):
        training.step()
    assert not torch.equal(training.ema.model.network.layers[0].weight, training.model.network.layers[0].weight)
    training.step()  # the stage's first, of which an average knows nothing else
    student = dict(training.model.named_parameters())
    for average in (dict(training.ema.model.named_parameters()), *training.power_ema.averages.values()):
        assert all(torch.equal(average[name], value) for name, value in student.items())


def test_a_stages_optimizers_are_as_recipe_and_objective_say():
    training = small_training(
        "rectified_flow:0.5,adversarial/critic=conv:0.5", 4, beta1=0.8, beta2=0.98, weight_decay=0.2
    )
    settings = [(group["betas"], group["weight_decay"]) for group in training.optimizer.param_groups]
    assert settings == [((0.8, 0.98), 0.2)]
    seen = []
    for _ in range(3):
        training.step()
        seen.append(training.progress)
    assert seen == [0.5, 1.0, 0.5]  # of each stage
    for optimizer, decay in ((training.optimizer, 0.2), (training.critic_optimizer, 0.0)):
        settings = [(group["betas"], group["weight_decay"]) for group in optimizer.param_groups]
        assert settings == [((0.0, 0.98), decay)]
    # The student's loss leaves no gradient with the critic, which would go into the critic's next step.
    assert all(p.grad is None for net in (training.model, training.nets.critic) for p in net.parameters())


def test_a_stage_lets_go_of_the_critic_and_the_teacher_before_its_own_are_made(monkeypatch):
    critics = "adversarial/critic=conv:0.3,adversarial/critic=conv/gamma=1:0.3"
    training = small_training(f"rectified_flow:0.4,{critics}", 10)
    for _ in range(6):
        training.step()
    old = [training.nets.critic, training.nets.teacher, training.optimizer, training.critic_optimizer]
    before, alive, copied = [weakref.ref(net) for net in old], [], copy.deepcopy
    old.clear()
    monkeypatch.setattr(
        engine.copy,
        "deepcopy",
        lambda net, *memo: alive.append([one() is not None for one in before]) or copied(net, *memo),
    )
    for _ in range(2):
        training.step()
    assert alive[0] == [False] * 4 and training.index == 2


def test_the_students_batch_draws_nothing_for_the_critic():
    objective = make_objective("adversarial/warped=0.5", CustomScheduler(16))
    images = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
    student, critic = (engine.global_batch(images, objective, 8, 0, 0, World(), None, s)[2] for s in (0, 1))
    assert set(critic) - set(student) == {"penalised", "step", "warped", "displacement"}


def test_every_step_stream_and_seed_has_its_own_images_and_noise():
    objective = make_objective("rectified_flow", CustomScheduler())
    images = torch.arange(200, dtype=torch.uint8).reshape(200, 1, 1, 1).expand(200, 1, 1, 2)

    def batch(seed, step, stream):
        return engine.global_batch(images, objective, 16, seed, step, World(), None, stream)

    drawn = (1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, engine.CRITIC_STREAM + 1)
    batches = {each: batch(*each) for each in drawn}
    assert all(torch.equal(a, b) for a, b in zip(batch(1, 0, 0)[:2], batches[1, 0, 0][:2], strict=True))
    for part in (0, 1):
        values = [found[part] for found in batches.values()]
        assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    times = [found[2]["t"] for found in batches.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(times) for b in times[:i])


def test_rates_fall_after_their_steady_share_of_the_stage():
    model = CustomGenerativeModel(MLP(use_additional_condition=True), CustomScheduler(1000), objective="rectified_flow")
    name = "adversarial/critic=conv/augmented=false/rate=0.5/critic_rate=2/steady=0.25"
    stages = plan([("rectified_flow", 0.2), (name, 0.8)], lambda name: make_objective(name, model.scheduler), 5)
    recipe = Recipe(batch_size=16, lr=1e-3, warmup=100)  # which a later stage of four steps has no time for
    training = Training(model, np.zeros((64, 1, 1, 2), np.uint8), recipe, stages)
    found = []
    for _ in range(5):
        training.step()
        critic = training.critic_optimizer.param_groups[0]["lr"] if training.index else None
        found.append((training.lr, critic))
    falls = [1, 1, 2**-0.5, 3**-0.5]
    assert found[0] == (pytest.approx(1e-5), None)
    assert [lr for lr, _ in found[1:]] == pytest.approx([0.5e-3 * fall for fall in falls])
    assert [lr for _, lr in found[1:]] == pytest.approx([2e-3 * fall for fall in falls])


def test_loss_is_a_function_of_its_draw(model):
    model.eval()
    data, noise = batch()
    nets = nets_of(model)
    draw = model.objective.draw(data.shape)
    first, second = (model.objective.loss(nets, data, noise, 0.3, draw)[0] for _ in range(2))
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


def test_accumulation_does_not_change_the_gradient(name, model):
    if name == "drifting":
        pytest.skip("a slice's samples drift among one another")
    model.eval()  # dropout's masks do depend on the slices
    nets = nets_of(model)
    data, noise = batch(16)
    for loss_function, trained, draw in losses_of(model.objective, nets, data.shape):
        gradients = []
        for slices in (1, 2, 8):
            trained.zero_grad()
            accumulate_gradient(Loss(loss_function, nets, trained), data, noise, draw, 0.3, slices)
            gradients.append(torch.cat([p.grad.flatten() for p in trained.parameters()]))
        for gradient in gradients[1:]:
            # Samples that went through several networks carry more rounding, and a slope by finite differences more
            # still: 1.3e-3 on a chip with AVX512. A sample too few, or twice, would be some hundredths.
            assert (gradient - gradients[0]).norm() < (5e-3 if nets.critic else 3e-5) * gradients[0].norm()


def test_resumed_training_is_bitwise_equal(name, faces, workdir, monkeypatch):
    if name != "shortcut":  # pictures must not disturb randomness: once is enough, they are half of the time
        monkeypatch.setattr(run_folder, "save_previews", lambda *_: None)
        monkeypatch.setattr(run_folder, "plot_curves", lambda *_: None)
    images, key = load_images(str(faces), str(faces), 32)
    stages = f"rectified_flow/muon=true:0.5,{name}{'/pairs=16/solver_steps=2' if name == 'reflow' else ''}:0.5"

    def run(folder, *session_steps):
        for most in session_steps:
            torch.manual_seed(0)
            model = create_custom_model(objective=name, unet="small", image_size=32)
            planned = plan(parse_stages(stages), partial(make_objective, scheduler=model.scheduler), 6)
            recipe = Recipe(batch_size=8, num_iterations=most, lr=1e-3, warmup=2, log_interval=2, save_interval=100)
            train(model, {}, images, key, recipe, planned, workdir / folder, {})
        return torch.load(workdir / folder / "last.ckpt", weights_only=True)

    # Stopped before, at, and after the seam between the stages.
    straight, resumed = run("straight", 6), run("resumed", 2, 3, 5, 6)
    assert straight["model_config"]["objective"] == stages.split(",")[1].rsplit(":", 1)[0]

    def tensors(tree):
        if isinstance(tree, torch.Tensor):
            return [tree]
        return [t for value in (tree.values() if isinstance(tree, dict) else []) for t in tensors(value)]

    sessions = json.loads((workdir / "resumed/run.json").read_text())["sessions"]
    assert [one["first_step"] for one in sessions] == [0, 2, 3, 5]
    exported = torch.load(workdir / "resumed/final_model.pt", weights_only=True)["state_dict"]
    assert set(exported) == set(straight["state_dict"])  # a critic or teacher stays behind
    assert set(exported) == set(create_custom_model(objective=name, unet="small", image_size=32).state_dict())
    pairs = list(zip(tensors(straight), tensors(resumed), strict=True))
    assert len(pairs) > 300 and all(torch.equal(a, b) for a, b in pairs)


@cache
def on_mixture(name, time_scale=1000):
    return train_on_mixture(VARIANTS[name], time_scale=time_scale)


@cache
def mixture_distances(name, time_scale=1000):
    return distances(on_mixture(name, time_scale))


def test_rectified_flow_reaches_the_mixture_with_many_steps():
    fine = distances(on_mixture("rectified_flow"), nfes=(128,))
    assert fine[128] < 0.1 and mixture_distances("rectified_flow")[1] > 0.4  # one Euler step finds the mean


@pytest.mark.parametrize("name", FEW_STEP)
def test_few_step_samples_are_closer_than_rectified_flows(name, workdir):
    # MeanFlow differentiates the time embedding, which at the full scale is too wild for it.
    time_scale = 60 if name.startswith("mean_flow") else 1000
    ours, baseline = (mixture_distances(each, time_scale) for each in (name, "rectified_flow"))
    assert ours[1] < 0.5 * baseline[1], (ours, baseline)
    assert ours[2] < baseline[2] and ours[4] <= baseline[4], (ours, baseline)


def test_a_second_reflow_has_the_first_as_its_teacher(workdir):
    chain = "rectified_flow:0.5,reflow/pairs=2000:0.25,reflow/pairs=2000:0.25"
    found, baseline = distances(train_on_mixture(chain)), mixture_distances("rectified_flow")
    assert found[1] < 0.5 * baseline[1] and found[4] <= baseline[4], (found, baseline)
    manifests = [json.loads(path.read_text()) for path in (workdir / "data/cache").glob("*/manifest.json")]
    assert len({one["teacher"] for one in manifests}) == 2


def test_shortcut_draws_the_dyadic_grid():
    torch.manual_seed(0)
    model = create_custom_model(objective="shortcut", unet="small")
    draw = model.objective.draw((80_000, 3, 1, 1))
    t, d = draw["t"], draw["d"]
    jumps = d > 0
    assert jumps.float().mean().item() == pytest.approx(1 / 8, abs=1e-3)
    assert sorted(d[jumps].unique().tolist()) == [2.0**-k for k in range(6, -1, -1)]
    counts = np.array([(d == 2.0**-k).sum().item() for k in range(7)])
    assert counts.min() > 0.9 * counts.mean()
    multiples = t[jumps] / d[jumps]
    assert torch.equal(multiples, multiples.round()) and (t >= d).all() and (t <= 1).all()


@pytest.mark.parametrize(("batch_size", "flow"), [(1, 0.5), (4, 7 / 8), (12, 7 / 8), (2, 0.25), (32, 0.25)])
def test_the_share_of_jumps_is_kept_in_small_batches(batch_size, flow):
    objective = make_objective(f"alpha_flow/flow={flow}", create_custom_model(unet="small").scheduler)
    torch.manual_seed(0)
    counts = [(objective.draw((batch_size, 3, 8, 8))["d"] > 0).sum().item() for _ in range(2000)]
    assert np.mean(counts) == pytest.approx(batch_size * (1 - flow), abs=0.06)
    assert max(counts) - min(counts) <= 1


def test_shortcut_target_is_two_teacher_steps():
    """On the exact flow map of a point mass, two half jumps land where one whole jump does."""
    model = create_custom_model(objective="shortcut", unet="small")
    asked = []

    def exact(xt, t, d):
        asked.append(d)
        return (xt - 0.5) / t[:, None]  # every path ends at 0.5

    model.predict = exact
    x = torch.linspace(-1.5, 1.5, 10).reshape(5, 2)
    t, d = torch.tensor([1.0, 1.0, 0.5, 0.25, 1 / 64]), torch.tensor([1.0, 0.5, 0.5, 0.125, 1 / 64])
    target = model.objective.target(Nets(None, model), x, t, d, None, 0.0)
    torch.testing.assert_close(target[:-1], ((x - 0.5) / t[:, None])[:-1], rtol=1e-4, atol=1e-4)
    assert asked[0].tolist() == [0.5, 0.25, 0.25, 0.0625, 0]  # 1/128 is asked for as 0


def test_shortcut_learns_from_the_average_in_eval_mode_within_the_clip():
    class Wild(torch.nn.Module):
        """A teacher that jumps far out, and remembers how it was called."""

        def __init__(self):
            super().__init__()
            self.states, self.modes = [], []

        def velocity(self, xt, t, t_next):
            self.states.append(xt)
            self.modes.append(self.training)
            return torch.full_like(xt, -100.0)

    model = create_custom_model(objective="shortcut", unet="small", image_size=32)
    teacher = Wild().train()
    data, noise = batch(16)
    draw = model.objective.draw(data.shape)
    loss, logs = model.objective.loss(Nets(student=model, ema=teacher), data, noise, 0.0, draw)
    assert teacher.modes == [False, False] and teacher.training
    assert teacher.states[1].max() == 4  # the state between the two steps is clipped
    # A new network predicts about 0, so the bootstrapped loss is the clipped target's square.
    assert logs["loss_jump"].tolist() == pytest.approx([16.0] * 2, rel=1e-2)
    assert len(logs["loss_flow"]) == 14 and loss.shape == (16,)


def test_jumps_are_drawn_evenly():
    """NFE 1 six times in each eight rows, 2 and 4 once, and each jump of an NFE as often as its others."""
    torch.manual_seed(0)
    counts = Counter()
    for _ in range(600):
        nfe, position = in_turn(DRAWN, 16).unbind(1)
        assert sorted(nfe[:8].tolist()) == sorted(nfe[8:].tolist()) == [1, 1, 1, 1, 1, 1, 2, 4]
        counts.update(zip(nfe.tolist(), position.tolist(), strict=True))
    assert set(counts) == {(nfe, i) for nfe in (1, 2, 4) for i in range(nfe)}
    for (nfe, _), count in counts.items():
        assert count == pytest.approx(600 * 16 * {1: 3 / 4, 2: 1 / 16, 4: 1 / 32}[nfe], rel=0.15)


def test_rolled_out_states_are_the_samplers():
    model = create_custom_model(objective="shortcut", unet="small", image_size=32, time_grids={2: [1, 0.7, 0]})
    noise = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nfe = torch.tensor([1, 2, 2, 4, 4, 4, 4])
    position = torch.tensor([0, 0, 1, 0, 1, 2, 3])
    x, t, s = roll_out(model, noise, nfe, position)
    assert t.tolist() == pytest.approx([1, 1, 0.7, 1, 0.75, 0.5, 0.25])
    assert s.tolist() == pytest.approx([0, 0.7, 0, 0.75, 0.5, 0.25, 0])
    for i in range(7):
        model._noise = lambda *_, i=i: noise[i : i + 1]
        states = model.sample((1, 3, 32, 32), int(nfe[i]), return_traj=True)
        torch.testing.assert_close(x[i], states[position[i]][0], rtol=1e-4, atol=1e-5)


def test_the_gradient_goes_through_all_jumps(randomised):
    model = randomised(
        create_custom_model(objective="shortcut", unet="small", image_size=32, time_grids={2: [1, 0.7, 0]})
    )
    noise = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nfe, position = torch.tensor([2, 1, 4, 1, 2, 4]), torch.tensor([1, 0, 2, 0, 0, 0])
    x, x_t, u = sample_through(model, noise, nfe, position)
    x.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.eval()
    total = 0
    for i in range(6):
        times = torch.tensor(model.scheduler.time_grid(int(nfe[i])))
        state = noise[i : i + 1]
        for j, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
            if j == position[i]:
                torch.testing.assert_close(x_t[i], state[0], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(u[i], model.velocity(state, t[None], s[None])[0], rtol=1e-4, atol=1e-4)
            state = model.jump(state, t[None], s[None])
        torch.testing.assert_close(x[i], state[0], rtol=1e-4, atol=1e-4)
        total = total + state.square().sum()
    total.backward()
    scale = max(p.grad.abs().max().item() for p in model.parameters())  # some are zero but for rounding
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(
            gradient, p.grad, rtol=1e-3, atol=max(1e-3 * p.grad.abs().max().item(), 1e-6 * scale)
        )
    assert not x_t.requires_grad and u.requires_grad


def test_mean_flow_target_is_the_identitys():
    """The flow map of a Gaussian is known: u there equals v's mean minus d du/dt along the marginal velocity."""
    objective = make_objective("mean_flow/improved=true", create_custom_model(unet="small").scheduler)
    sigma = 0.5  # data N(0, sigma^2): x_t has the scale sqrt((1-t)^2 sigma^2 + t^2), kept in proportion by the flow

    class Exact(torch.nn.Module):
        def predict(self, xt, t, d):
            scale = lambda t: ((1 - t).square() * sigma**2 + t.square()).sqrt()  # noqa: E731
            slope = (t - (1 - t) * sigma**2) / scale(t).square()  # of log scale: the marginal velocity is slope x
            r = t - d
            u = torch.where(d == 0, slope, (1 - scale(r) / scale(t)) / torch.where(d == 0, 1.0, d))
            return u[:, None] * xt

    exact = Exact()
    t, d = torch.tensor([1.0, 0.9, 0.5, 0.3]), torch.tensor([1.0, 0.5, 0.25, 0.3])
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    v = exact.predict(x, t, torch.zeros(4))
    target = objective.target(Nets(exact, exact), x, t, d, v, 0.0)
    torch.testing.assert_close(target, exact.predict(x, t, d), rtol=1e-4, atol=1e-4)


def test_mean_flow_differentiates_in_float32():
    model = create_custom_model(objective="mean_flow", unet="small", image_size=32)
    nets, (x, v) = nets_of(model), batch(4)
    t, d = torch.full((4,), 0.8), torch.full((4,), 0.5)
    target, u = model.objective.target(nets, x, t, d, v, 0.0), model.predict(x, t, d)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.objective.target(nets, x, t, d, v, 0.0), target)
        assert not torch.equal(model.predict(x, t, d), u)  # as all else is rounded

    def precision():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    seen, before = [], precision()
    model.network.head.register_forward_hook(lambda *_: seen.append(precision()))
    model.objective.target(nets, x, t, d, v, 0.0)
    assert seen == [("highest", False)] and precision() == before  # on GPUs TF32 would round it


class Known(torch.nn.Module):
    """A flow map in a formula, which tells nets, states, times and jumps apart."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.scheduler = torch.nn.Parameter(torch.tensor(scale)), CustomScheduler(16)
        self.network, self.modes = torch.nn.Identity(), []

    def predict(self, x, t, d=None):
        self.modes.append(self.training)
        d = torch.zeros_like(t) if d is None else d
        return self.scale * x + (t.square() + 3 * d)[:, None]

    def velocity(self, x, t, t_next):
        return self.predict(x, t, t - t_next)

    def jump(self, x, t, t_next):
        return x - (t - t_next)[:, None] * self.velocity(x, t, t_next)


def known_nets():
    student, ema, teacher, critic = (Known(scale) for scale in (0.1, 0.2, 0.3, 0.4))
    ema.requires_grad_(False), teacher.requires_grad_(False)
    return Nets(student, ema, teacher, critic)


JUMPED = ["alpha_flow/anneal=12", "alpha_flow/own=true", "consistency", "progressive/steps=2", "shortcut"]


@pytest.mark.parametrize("name", [*JUMPED, "mean_flow", "mean_flow/improved=true"])
def test_a_jumps_target_is_its_papers(name):
    objective, nets = make_objective(name, CustomScheduler(16)), known_nets()
    x, v = 0.5 * torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    t, d = torch.tensor([1.0, 0.9, 0.5, 0.5]), torch.tensor([1.0, 0.5, 0.25, 0.5])
    ema, student = nets.ema, nets.student
    if name == "consistency":  # f(x_t) = x_t - t u, which should be what it is at r
        d = t
        r = t * (1 - (1 + 8 / (1 + (t / (1 - t).clamp(min=1e-4)).exp())) / 16)
        x_r = x - (t - r)[:, None] * v
        expected = (x - (x_r - r[:, None] * ema.predict(x_r, r, r))) / t[:, None]
    elif name.startswith("alpha_flow"):
        alpha = 0.125 if "own" in name else 1 / (1 + np.exp(12 * (0.6 - 0.5)))
        first = ema.predict(x, t) if "own" in name else v
        rest = ema.predict(x - alpha * d[:, None] * first, t - alpha * d, (1 - alpha) * d)
        expected = alpha * first + (1 - alpha) * rest
    elif name.startswith("mean_flow"):
        along = student.predict(x, t) if "improved" in name else v
        expected = v - d[:, None] * (student.scale * along + (2 * t + 3)[:, None])
    else:
        teacher = nets.teacher if name.startswith("progressive") else ema
        end = teacher.jump(teacher.jump(x, t, t - d / 2), t - d / 2, t - d)
        expected = (x - end) / d[:, None]
    target = objective.target(nets, x, t, d, v, 0.6)
    torch.testing.assert_close(target, expected.detach(), rtol=1e-4, atol=1e-4, check_stride=False)


@pytest.mark.parametrize("name", [*JUMPED, "mean_flow", "mean_flow/improved=true"])
def test_no_gradient_goes_through_a_target(name, monkeypatch):
    """Nor where a plain loop has the student stand in for its average."""
    model = CustomGenerativeModel(MLP(True), CustomScheduler(16), objective=f"{name}/flow=0.5")
    targets, target = [], model.objective.target
    monkeypatch.setattr(model.objective, "target", lambda *args: targets.append(target(*args)) or targets[0])
    data, noise = torch.randn(2, 8, 1, 1, 2)
    loss, _ = model.objective.loss(Nets(model, model, model), data, noise, 0.5, model.objective.draw(data.shape))
    assert loss.requires_grad and len(targets) == 1 and not targets[0].requires_grad


def test_errors_are_weighed_as_the_papers_weigh_them():
    scheduler = CustomScheduler(16)
    error, t, d = torch.tensor([0.5, 2.0]), torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.0])  # a jump, a velocity
    ratio = torch.tensor([0.125, 1.0])
    n = torch.tensor([1 + 8 / (1 + np.e), 1.0])
    for name, gradient in (
        ("alpha_flow", ratio**0.5 / (error + 1e-3) ** 0.75),
        ("alpha_flow/power=1", ratio / (error + 1e-3)),
        ("mean_flow", 1 / (error + 1e-3) ** 0.75),
        ("mean_flow/power=0", torch.ones(2)),
        ("consistency", 0.5 / (error + 1e-6).sqrt() / n),
    ):
        given = error.clone().requires_grad_(True)
        weighed = make_objective(name, scheduler).weigh(given, t, d, 0.5)
        weighed.sum().backward()
        torch.testing.assert_close(given.grad, gradient, msg=lambda told, name=name: f"{name}: {told}")
        if name != "consistency":
            torch.testing.assert_close(weighed.detach(), gradient * error)


@pytest.mark.parametrize("name", ["alpha_flow/grid=0", "mean_flow"])
def test_no_jump_ends_below_the_data(name, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.full(shape, 1e-5))
    monkeypatch.setattr(torch, "randn", lambda *shape: torch.full(shape, -20.0))
    t, d = make_objective(name, CustomScheduler(16)).jumps(8)
    assert (d > 0).all() and (t - d >= 0).all()


def test_jumps_are_drawn_as_the_papers_draw_them():
    torch.manual_seed(0)
    scheduler, count = CustomScheduler(16), 40_000

    def on_grid(t, d):
        return torch.isin(d, torch.tensor([1.0, 0.5, 0.25])) & (t / d == (t / d).round())

    t, d = make_objective("alpha_flow/grid=0.25", scheduler).jumps(count)
    grid = on_grid(t, d)
    assert grid.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert ((d > 0) & (d <= t) & (t <= 1))[~grid].all()
    assert t[~grid].mean().item() == pytest.approx(2 / 3, abs=0.01)  # the larger of two uniform times
    assert (t - d)[~grid].mean().item() == pytest.approx(1 / 3, abs=0.01)

    t, d = make_objective("consistency/grid=0.25", scheduler).jumps(count)
    grid = torch.isin(t, torch.tensor([1.0, 0.5, 0.25]))
    assert torch.equal(t, d) and grid.float().mean().item() == pytest.approx(0.25, abs=0.01)
    sigma = (t / (1 - t))[~grid].log()
    assert sigma.median().item() == pytest.approx(-1.1, abs=0.1)
    assert sigma.quantile(0.84).item() == pytest.approx(0.9, abs=0.1)  # a standard deviation of 2

    t, d = make_objective("mean_flow", scheduler).jumps(count)
    t_r = (torch.randn(2, count) * 1.6 + torch.tensor([[-0.6], [-4.0]])).sigmoid().sort(dim=0).values
    for found, expected in ((t - d, t_r[0]), (t, t_r[1])):
        for share in (0.1, 0.5, 0.9):
            assert found.quantile(share).item() == pytest.approx(expected.quantile(share).item(), rel=0.1)

    draw = make_objective("trajectory/levels=8", scheduler).draw((count, 1))
    t, s = 8 * draw["t"], 8 * draw["s"]
    assert set(t.tolist()) == set(range(1, 9)) and set(s.tolist()) == set(range(8)) and (s < t).all()
    assert (t == 8).float().mean().item() == pytest.approx(0.25 + 0.75 / 8, abs=0.01)
    assert (s[t == 8] == 0).float().mean().item() == pytest.approx(0.5 + 0.5 / 8, abs=0.01)


def test_only_the_last_jump_is_asked_of_a_consistency_model():
    t, t_next = torch.tensor([1.0, 1.0, 0.5]), torch.tensor([0.5, 0.0, 0.0])
    assert make_objective("consistency", CustomScheduler()).asked(t, t_next).tolist() == [0.0, 1.0, 0.5]


def test_a_trajectorys_loss_is_its_formula():
    objective, nets = make_objective("trajectory/levels=4/flow=0.25", CustomScheduler(16)), known_nets()
    data, noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    t, s, v_t = (torch.tensor(times) for times in ([1.0, 0.75, 0.5], [0.5, 0.0, 0.25], [0.2, 0.5, 0.9]))
    student, ema, teacher, _ = nets
    x_t, x_v = ((1 - time[:, None]) * data + time[:, None] * noise for time in (t, v_t))
    near, zero = t - 0.25, torch.zeros(3)
    slope = teacher.predict(x_t, t)
    slope = (slope + teacher.predict(x_t - 0.25 * slope, near)) / 2
    wanted = ema.jump(ema.jump(x_t - 0.25 * slope, near, s), s, zero)
    jump = (ema.jump(student.jump(x_t, t, s), s, zero) - wanted).square().mean(1)
    flow = (student.predict(x_v, v_t) - (noise - data)).square().mean(1)
    ema.modes.clear(), teacher.modes.clear()
    loss, logs = objective.loss(nets, data, noise, 0.0, {"t": t, "s": s, "v_t": v_t})
    assert not any(ema.modes + teacher.modes) and all(student.modes)
    torch.testing.assert_close(loss, jump + 0.25 * flow)
    torch.testing.assert_close(logs["loss_flow"], flow.detach())
    loss.sum().backward()
    assert student.scale.grad != 0


def drift_in_loops(x, y):
    """As the paper's equations 8 and 11 and appendix A.6 have it, number by number, of one place: [N, D], [M, D]."""
    n, m, d = len(x), len(y), x.shape[1]
    deviation = ((y - y.mean(0)) ** 2).mean(0).sqrt()
    x, y = x / deviation, y / deviation
    pairs = [(a - b).norm() for a in x for b in y]
    pairs += [(x[i] - x[j]).norm() for i in range(n) for j in range(n) if i != j]
    scale = sum(pairs) / len(pairs) / d**0.5
    x, y = x / scale, y / scale
    total = torch.zeros_like(x)
    for tau in (0.02, 0.05, 0.2):
        v = torch.zeros_like(x)
        for i in range(n):
            near = [(-(x[i] - y[j]).norm() / (tau * d**0.5)).exp() for j in range(m)]
            far = [(-(x[i] - x[j]).norm() / (tau * d**0.5)).exp() if j != i else 0.0 for j in range(n)]
            v[i] += sum(k * (other - x[i]) for k, other in zip(near, y, strict=True)) / sum(near)
            v[i] -= sum(k * (other - x[i]) for k, other in zip(far, x, strict=True)) / sum(far)
        total += v / (v.square().sum(1) / d).mean().sqrt()
    return scale * deviation, total


def test_drift_is_its_formula_also_under_autocast():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64) + 101
    y = torch.randn(7, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 9.0]) + 100
    expected = drift_in_loops(x, y)
    for found, wanted in zip(drift(x[None], y[None]), expected, strict=True):
        torch.testing.assert_close(found.squeeze(0).squeeze(0), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        _, v = drift(x[None].float(), y[None].float())
    torch.testing.assert_close(v[0], expected[1].float(), rtol=1e-3, atol=1e-3)


def test_points_drift_to_the_data_in_all_its_parts():
    generator = torch.Generator().manual_seed(0)

    def faces():
        y = torch.randn(1, 64, 2, generator=generator)
        y[0, :16] -= 5.0  # a quarter of the data lies apart
        return y

    x = 4 * torch.randn(1, 64, 2, generator=generator)
    for i in range(300):
        scale, v = drift(x, faces())
        x = x + 0.05 * 0.01 ** (i / 300) * scale * v
    apart = x[0].sum(1) < -5
    assert 0.2 < apart.float().mean() < 0.35
    for part, centre in ((apart, -5.0), (~apart, 0.0)):
        torch.testing.assert_close(x[0, part].mean(0), torch.full((2,), centre), rtol=0, atol=0.5)
        torch.testing.assert_close(x[0, part].std(0), torch.ones(2), rtol=0, atol=0.5)


def test_loss_of_drifting_moves_each_nfes_samples_by_their_own_drift(monkeypatch):
    objective, nets = make_objective("drifting/t=0.25", CustomScheduler(16)), known_nets()
    data, noise = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    asked = []

    def seen(model, x, t):
        asked.append((model, t))
        return [x.reshape(len(x), 2, 3).transpose(0, 1), 5 * x[None, :, :2]]  # two places of three, one of two

    monkeypatch.setattr(drifting, "features", seen)
    draw = objective.draw(data.shape)
    assert sorted(draw["nfe"].tolist()) == [1, 1, 1, 1, 2, 2, 4, 4]
    loss, logs = objective.loss(nets, data, noise, 0.0, draw)
    assert asked == [(nets.teacher, 0.25)] * 2
    for k in (1, 2, 4):
        rows = draw["nfe"] == k
        x, times = noise[rows], torch.linspace(1, 0, k + 1)
        for t, s in zip(times, times[1:], strict=False):
            x = nets.student.jump(x, t.expand(len(x)), s.expand(len(x)))
        expected = gradient = 0.0
        for found, wanted in zip(seen(None, x, None), seen(None, data, None), strict=True):
            scale, v = drift(found.detach(), wanted)
            expected = expected + v.square().mean((0, 2)) / 2
            gradient = gradient - (2 * v / scale * found).mean((0, 2)).sum() / 2  # down it samples go along v
        torch.testing.assert_close(loss[rows], expected)
        torch.testing.assert_close(logs[f"loss_drift_{k}"], expected)
        found, wanted = (
            torch.autograd.grad(of, nets.student.scale, retain_graph=True)[0] for of in (loss[rows].sum(), gradient)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_features_that_samples_drift_in(randomised):
    model = randomised(create_custom_model(objective="drifting", unet="small", image_size=32)).eval()
    x, _ = batch(2)
    found = drifting.features(model, x, 0.25)
    # Places, means and deviations: of 32x32 no places, of 4x4 the patches of four are all there is.
    places = [256, 256, 64, 64, 1, 1, 256, 64, 64, 16, 16, 1, 1, 64, 16, 16, 4, 4, 1, 1, 16, 4, 4, 1, 1]
    assert [f.shape[:2] for f in found] == [(count, 2) for count in places]
    seen = []
    model.network.middleblocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.predict(x, 0.25)
    whole = seen[0].flatten(2)
    torch.testing.assert_close(found[-2][0], whole.mean(2))
    torch.testing.assert_close(found[-1][0], whole.std(2, correction=0))
    torch.testing.assert_close(found[-5].transpose(0, 1), whole.transpose(1, 2))


@pytest.mark.parametrize("told", ["true", "false"])
def test_losses_of_distribution_matching_are_their_formulas(told):
    objective, nets = make_objective(f"distribution_matching/told={told}", CustomScheduler(16)), known_nets()
    data, noise, tau_noise = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    draw = {
        "nfe": torch.tensor([1, 2, 4, 2, 4]),
        "position": torch.tensor([0, 1, 3, 0, 2]),
        "hold": torch.tensor([False, False, False, True, True]),
        "tau": torch.tensor([0.1, 0.5, 0.9, 0.3, 0.7]),
        "tau_noise": tau_noise,
    }
    student, _, teacher, critic = nets
    expected, gradients, critics = [], [], []
    for i, (nfe, position) in enumerate(zip(draw["nfe"].tolist(), draw["position"].tolist(), strict=True)):
        times = torch.linspace(1, 0, nfe + 1)[:, None]
        x = noise[i : i + 1]
        with torch.no_grad():
            for j in range(nfe - 1):
                x = student.jump(x, times[j], times[j + 1])
        end = student.jump(x, times[-2], times[-1])
        tau = draw["tau"][i : i + 1]
        x_0 = end.detach()
        x_tau = (1 - tau) * x_0 + tau * tau_noise[i]
        v_samples = critic.predict(x_tau, tau, torch.tensor([1 / nfe]) if told == "true" else None)
        critics.append((v_samples - (tau_noise[i] - x_0)).square().mean())
        if draw["hold"][i]:
            t, s = times[position], times[position + 1]
            x_t = (1 - t) * data[i : i + 1] + t * noise[i]
            expected.append(((student.jump(x_t, t, s) - teacher.jump(x_t, t, s)) / (t - s)).square().mean())
            gradients.append(torch.autograd.grad(expected[-1], student.scale)[0])
        else:
            v_data = teacher.predict(x_tau, tau)
            way = tau * (v_data - v_samples.detach()) / (x_0 - (x_tau - tau * v_data)).abs().mean()
            expected.append(way.square().mean())
            # Down the gradient a sample moves along the data's velocity at tau less the samples': to the data.
            gradients.append(torch.autograd.grad((2 * way * end).mean(), student.scale)[0])
    student.modes.clear(), teacher.modes.clear()
    loss, _ = objective.loss(nets, data, noise, 0.0, draw)
    assert student.training and not any(student.modes + teacher.modes)  # without dropout, as samples are
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-4, atol=1e-4)
    for one, gradient in zip(loss, gradients, strict=True):
        found = torch.autograd.grad(one, student.scale, retain_graph=True)[0]
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)
    student.modes.clear()
    loss, _ = objective.critic_loss(nets, data, noise, 0.0, draw)
    assert not any(student.modes)
    torch.testing.assert_close(loss, torch.stack(critics), rtol=1e-4, atol=1e-4)


def test_held_jumps_are_all_but_the_last():
    torch.manual_seed(0)
    draw = make_objective("distribution_matching/hold=0.5", CustomScheduler(16)).draw((4000, 1))
    nfe, position, hold = draw["nfe"], draw["position"], draw["hold"]
    held = Counter(zip(nfe[hold].tolist(), position[hold].tolist(), strict=True))
    assert set(held) == {(2, 0), (4, 0), (4, 1), (4, 2)} and min(held.values()) > 400
    assert torch.equal(position[~hold], nfe[~hold] - 1)


@pytest.mark.parametrize("hold", [0.25, 0.75])
def test_the_samples_score_learns_from_the_nfes_that_are_moved(hold):
    torch.manual_seed(0)
    objective = make_objective(f"distribution_matching/hold={hold}", CustomScheduler(16))
    moved, seen = Counter(), Counter()
    for _ in range(100):
        draw = objective.draw((60, 1))
        moved.update(draw["nfe"][~draw["hold"]].tolist())
        seen.update(objective.draw_for_critic((60, 1))["nfe"].tolist())
    for nfe in (1, 2, 4):
        assert moved[nfe] / moved.total() == pytest.approx(1 / 3, abs=0.02)
        assert seen[nfe] == 2000


@pytest.mark.parametrize("name", ["distribution_matching", "adversarial/critic=conv", "adversarial/warped=0.25"])
def test_a_critics_loss_leaves_the_student_alone(name, randomised):
    model = randomised(create_custom_model(objective=name, unet="small", image_size=32))
    nets, (data, noise) = nets_of(model), batch(4)
    draw = model.objective.draw_for_critic(data.shape)
    model.objective.critic_loss(nets, data, noise, 0.3, draw)[0].mean().backward()
    assert all(p.grad is None for p in model.parameters())


def test_alpha_flow_goes_from_the_velocity_to_a_small_ratio():
    scheduler = create_custom_model(unet="small").scheduler
    t = torch.ones(3)
    annealed = make_objective("alpha_flow/anneal=20/alpha=0.05", scheduler)
    ratios = [annealed.ratio(t, progress)[0].item() for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert ratios == sorted(ratios, reverse=True) and ratios[0] > 0.99 and ratios[-1] == pytest.approx(0.05)
    constant = make_objective("alpha_flow", scheduler)
    assert {constant.ratio(t, progress)[0].item() for progress in (0.0, 0.5, 1.0)} == {0.125}
    assert annealed.follows_progress and not constant.follows_progress


def test_progressive_halves_its_steps_stage_by_stage():
    stages = parse_stages("rectified_flow:0.5,progressive/levels=8/keep=0.25:0.5")
    assert [name for name, _ in stages] == [
        "rectified_flow",
        *(f"progressive/levels=8/keep=0.25/steps={steps}" for steps in (4, 2, 1)),
    ]
    assert [share for _, share in stages] == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6])
    scheduler = create_custom_model(unet="small").scheduler
    first, last = (make_objective(f"progressive/levels=8/steps={steps}", scheduler) for steps in (4, 1))
    assert set(first.jumps(1000)[1].tolist()) == {0.25}
    d = last.jumps(8000)[1]
    assert set(d.tolist()) == {1.0, 0.5, 0.25} and (d == 1).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_each_stage_learns_from_the_average_that_the_one_before_left():
    model = CustomGenerativeModel(MLP(use_additional_condition=True), CustomScheduler(1000), objective="rectified_flow")
    stages = plan(parse_stages("progressive/levels=4:1"), lambda name: make_objective(name, model.scheduler), 4)
    training = Training(model, np.zeros((16, 1, 1, 2), np.uint8), Recipe(batch_size=8, lr=0.1, warmup=0), stages)
    teachers = [training.nets.teacher]
    for _ in range(2):
        training.step()
    left = copy.deepcopy(training.ema.model.state_dict())
    training.step()
    teachers.append(training.nets.teacher)
    first, second = (teacher.state_dict() for teacher in teachers)
    assert all(torch.equal(second[key], left[key]) for key in left)
    assert any(not torch.equal(second[key], first[key]) for key in left)
    assert teachers[1].objective.steps == 2  # and is asked as that stage taught it


def test_losses_and_penalty_of_a_linear_critic(randomised):
    class Linear(torch.nn.Module):
        def forward(self, x, nfe):
            return 0.01 * nfe * x.sum((1, 2, 3)), x.flatten(1)

    objective = "adversarial/gamma=0.3/augmented=false"
    model = randomised(create_custom_model(objective=objective, unet="small", image_size=32))
    data, noise = batch(8)
    nets, draw = nets_of(model)._replace(critic=Linear()), model.objective.draw_for_critic(data.shape)
    assert draw["penalised"].sum() == 2
    draw["penalised"] = draw["nfe"] > 1  # two as well: one of each
    loss, logs = model.objective.critic_loss(nets, data, noise, 0.0, draw)
    rows = draw["penalised"].nonzero().squeeze(1)
    assert len(rows) == 2
    slope = 0.01 * draw["nfe"][rows] * draw["step"][rows].sum((1, 2, 3)) / 0.01
    steepness = 2 * slope.square()  # at the real and at the generated state
    torch.testing.assert_close(logs["critic_steepness"], steepness, rtol=0.02, atol=1e-3)
    without = replace(model.objective, gamma=0.0).critic_loss(nets, data, noise, 0.0, draw)[0]
    torch.testing.assert_close((loss - without)[rows], 4 * 0.15 * steepness, rtol=0.02, atol=1e-3)
    # Both sides judge each pair as samples of its NFE.
    fake = sample_through(model, noise, draw["nfe"], draw["position"])[0]
    ahead = 0.01 * draw["nfe"] * (data - fake).sum((1, 2, 3))
    torch.testing.assert_close(without, torch.nn.functional.softplus(-ahead), rtol=1e-3, atol=1e-4)
    student = model.objective.loss(nets, data, noise, 0.0, draw)[1]["loss_adversarial"]
    torch.testing.assert_close(student, torch.nn.functional.softplus(ahead).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["encoder", "conv"])
def test_each_nfe_is_judged_by_a_last_layer_of_its_own(kind, randomised):
    model = randomised(create_custom_model(objective=f"adversarial/critic={kind}", unet="small", image_size=32))
    critic = nets_of(model).critic
    x, nfe = batch(6)[0], torch.tensor([4, 1, 2, 1, 4, 2])
    before, _ = critic(x, nfe)
    for image, k, judged in zip(x, nfe, before, strict=True):  # whoever else is in the batch
        torch.testing.assert_close(critic(image[None], k[None])[0], judged[None], rtol=1e-4, atol=1e-4)
    last = [critic.tail] if kind == "conv" else [head[-1] for head in critic.heads]
    with torch.no_grad():
        for layer in last:
            layer.weight[2] += 1
    assert torch.equal(critic(x, nfe)[0] != before, nfe == 4)


@pytest.mark.parametrize("size", [32, 64])
def test_octave_noise_has_unit_variance_and_as_much_of_each_octave(size):
    torch.manual_seed(0)
    z = octave_noise((512, 3, size, size))
    assert z.var().item() == pytest.approx(1, abs=0.03) and z.dtype == torch.float32
    power = torch.fft.fft2(z).abs().square().mean(dim=(0, 1)) / size**4  # its sum is z's mean square
    torch.testing.assert_close(power, power.T, rtol=0.3, atol=0.0)
    assert 0.25 < power[0, 0] < 0.35  # of one colour
    cycles = torch.fft.fftfreq(size) * size
    f = torch.hypot(cycles[:, None], cycles)
    octaves = [power[(f >= 2**k) & (f < 2 ** (k + 1))].sum() for k in range(size.bit_length() - 2)]
    assert all(0.5 < octave / octaves[0] < 2 for octave in octaves), octaves
    objective = make_objective("adversarial", create_custom_model(unet="small").scheduler)
    draw = objective.draw_for_critic((254, 3, size, size))  # 63 or 64 of them are penalised
    step = draw["step"][draw["penalised"]]
    assert len(step) >= 63 and not draw["step"][~draw["penalised"]].any()
    assert step.std().item() == pytest.approx(0.01, rel=0.1)
    assert step.diff(dim=-1).var() < step.var()  # twice of it in white noise


def test_pairs_lie_in_the_rows_that_were_drawn():
    objective = make_objective("reflow/pairs=5/real=0.5", create_custom_model(unet="small").scheduler)
    images = torch.zeros(32, 3, 8, 8, dtype=torch.uint8)
    pairs = [np.full((5, 3, 8, 8), sign, np.float16) * np.arange(1, 6).reshape(5, 1, 1, 1) for sign in (1.0, -1.0)]
    torch.manual_seed(0)
    paired = 0
    for step in range(20):
        data, noise, draw = engine.global_batch(images, objective, 16, 0, step, World(), pairs)
        from_pair = data[:, 0, 0, 0] < -1
        assert "pair" not in draw
        # An image goes with its own noise; the others are data, black here, with noise of their own.
        assert torch.equal(noise[from_pair], -data[from_pair]) and (data[~from_pair] == -1).all()
        assert 0.5 < noise[~from_pair].std() < 1.5
        paired += from_pair.sum().item()
    # One in five pairs is the image -1, black too.
    assert paired == pytest.approx(20 * 16 * 0.5 * 0.8, rel=0.2)


def test_the_anchor_lets_go_of_long_jumps_most(randomised):
    objective = "adversarial/anchor=2/anchor_end=0.1"
    model = randomised(create_custom_model(objective=objective, unet="small", image_size=32))
    data, noise = batch(12)
    nets, draw = nets_of(model), model.objective.draw(data.shape)
    with torch.no_grad():
        (began, logs), (ended, _) = (model.objective.loss(nets, data, noise, progress, draw) for progress in (0.0, 1.0))
    torch.testing.assert_close(began, logs["loss_adversarial"] / draw["nfe"].sqrt() + 2 * logs["anchor"])
    weight_lost = (began - ended) / logs["anchor"]
    length = 1 / draw["nfe"]
    assert set(length.tolist()) == {1.0, 0.5, 0.25}
    torch.testing.assert_close(weight_lost, 2 - 2 * 0.05**length, rtol=1e-3, atol=1e-3)


def test_augmentation_is_differentiable_and_treats_pixels_alike():
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    neutral = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.5, 0.5]).expand(5, 6)  # no flip, no shift, factors of 1
    torch.testing.assert_close(augment(x, neutral), x)
    shifted = augment(x, torch.tensor([0.9, 0.99, 0.5, 0.5, 0.5, 0.5]).expand(5, 6))
    torch.testing.assert_close(shifted[..., 2:], x[..., :-2])
    assert (shifted[..., :2] == 0).all()
    augment(x, torch.rand(5, 6)).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_each_augmentation_does_what_it_says():
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    neutral = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.5, 0.5])

    def changed(place, value):
        draw = neutral.clone()
        draw[place] = value
        return augment(x, draw[None])

    torch.testing.assert_close(changed(0, 0.1), x.flip(-1))  # faces look left or right, not down
    down = changed(2, 0.99)
    torch.testing.assert_close(down[..., 2:, :], x[..., :-2, :])
    assert (down[..., :2, :] == 0).all()
    mean = x.mean()
    torch.testing.assert_close(changed(3, 0.0), mean + 0.5 * (x - mean))
    torch.testing.assert_close(changed(4, 0.0), x.mean(1, keepdim=True).expand_as(x))
    torch.testing.assert_close(changed(5, 0.75), x + 0.25)


@torch.no_grad()
def test_a_critic_sees_both_images_augmented_alike_and_slopes_in_float32(randomised):
    model = randomised(create_custom_model(objective="adversarial/critic=conv", unet="small", image_size=32))
    nets, (data, noise) = nets_of(model), batch(4)
    draw, seen, kinds = model.objective.draw_for_critic(data.shape), [], []
    fake = sample_through(model, noise, draw["nfe"], draw["position"])[0]
    nets.critic.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    nets.critic.head.register_forward_hook(lambda _, inputs, output: kinds.append(output.dtype))
    model.objective.critic_loss(nets, data, noise, 0.3, draw)
    expected = torch.cat([augment(image, draw["augmentation"]) for image in (data, fake)])
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)
    kinds.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model.objective.critic_loss(nets, data, noise, 0.3, draw)
    assert kinds == [torch.bfloat16, torch.float32]  # small differences would be rounded away


def test_an_encoder_critic_has_no_dropout(randomised):
    model = randomised(create_custom_model(objective="adversarial", unet="small", image_size=32)).train()
    critic = model.objective.make_critic(model, (3, 32, 32)).train()  # as the engine makes it
    x, nfe = batch(2)[0], torch.tensor([1, 4])
    asked = []
    critic.network.time_embedding.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].tolist()))
    assert torch.equal(critic(x, nfe)[0], critic(x, nfe)[0])
    assert asked == [[0, 0], [0, 0]]  # at the time of images without noise


def test_a_critics_gradient_does_not_depend_on_how_threads_race():
    critic, threads = ConvCritic((3, 32, 32)), torch.get_num_threads()
    x, nfe = batch(32)[0], torch.tensor([1, 2, 4, 1]).repeat(8)
    torch.set_num_threads(4)
    try:
        last = [torch.autograd.grad(critic(x, nfe)[0].sum(), critic.tail.weight)[0] for _ in range(10)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, last[0]) for gradient in last)


def test_a_warp_moves_pixels_smoothly_from_where_its_displacements_point():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(warp(x, torch.zeros(2, 2, 32, 32)), x, rtol=0, atol=1e-5)
    right, down = torch.tensor([2 / 32, 0]).reshape(1, 2, 1, 1), torch.tensor([0, 3 / 32]).reshape(1, 2, 1, 1)
    torch.testing.assert_close(warp(x, right.expand(2, 2, 32, 32))[..., :-2], x[..., 2:], rtol=0, atol=1e-4)
    torch.testing.assert_close(warp(x, down.expand(2, 2, 32, 32))[..., :-3, :], x[..., 3:, :], rtol=0, atol=1e-4)
    for size in (32, 64):
        moved = wobble((64, 3, size, size))
        assert moved.square().mean().sqrt().item() == pytest.approx(WOBBLE)
        assert moved.diff(dim=-1).square().mean() < moved.square().mean()  # twice of it in white noise


def test_a_feature_gap_is_that_of_the_means_alone():
    """Unbiased, whatever spread and number; 0 on average where the means agree; the same NFEs in both halves."""
    generator = torch.Generator().manual_seed(0)

    def gaps(shift, spread, count=32):
        z = torch.randn(2, 2000, count, 4, generator=generator) * torch.tensor([1.0, 2.0, 3.0, 0.1])
        return torch.stack([feature_gap(real, spread * fake + shift) for real, fake in zip(*z, strict=True)])

    expected = 0.25 * sum(1 / v**2 for v in (1, 2, 3)) / 4
    for spread, count in ((0.5, 32), (1, 16), (1, 128), (2, 32)):
        gap = gaps(torch.tensor([0.5, 0.5, 0.5, 0.0]), spread, count)
        assert abs(gap.mean() - expected) < 4 * gap.std() / 2000**0.5
        gap = gaps(0.0, spread, count)
        assert abs(gap.mean()) < 4 * gap.std() / 2000**0.5 and 0.3 < (gap < 0).float().mean() < 0.7
    nfe = in_turn(DRAWN, 32)[:, 0]
    first = torch.arange(32) // 8 % 2 == 0
    assert torch.equal(nfe[first].sort().values, nfe[~first].sort().values)


@pytest.mark.parametrize("critic", ["encoder", "conv"])
def test_matching_moves_the_student_toward_the_means_of_the_critics_features(critic, randomised):
    model = randomised(create_custom_model(objective=f"adversarial/critic={critic}", unet="small", image_size=32))
    matched = make_objective(f"adversarial/critic={critic}/matching=3", model.scheduler)
    nets, (data, noise) = nets_of(model), batch(16)
    draw = model.objective.draw(data.shape)
    (plain, _), (loss, logs) = (o.loss(nets, data, noise, 0.3, draw) for o in (model.objective, matched))
    gap = logs["feature_gap"][0]
    torch.testing.assert_close(loss - plain, (3 * gap).expand(16), rtol=1e-3, atol=1e-3)
    (loss - plain).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-4 * p.grad / p.grad.norm().clamp(min=1e-12)
        assert matched.loss(nets, data, noise, 0.3, draw)[1]["feature_gap"][0] < gap


@torch.no_grad()
def test_the_critic_learns_from_a_share_of_faces_whose_lines_wobble():
    """Their rows alone change, to real images warped; the student does not see them."""
    model = create_custom_model(objective="adversarial/warped=0.5/augmented=false", unet="small", image_size=32)
    plain = make_objective("adversarial/augmented=false", model.scheduler)
    nets, (data, noise) = nets_of(model), batch(32)
    draw = model.objective.draw_for_critic(data.shape)
    assert set(draw) - set(plain.draw_for_critic(data.shape)) == {"warped", "displacement"}
    rows = draw["warped"].flatten()
    assert 6 < rows.sum() < 26
    seen = []
    critic = nets.critic.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.objective.critic_loss(nets, data, noise, 0.3, draw)
    ours, _ = seen
    plain.critic_loss(nets, data, noise, 0.3, draw)
    critic.remove()
    (real, fake), (same, generated) = ours.chunk(2), seen[2].chunk(2)
    assert torch.equal(real, data) and torch.equal(same, data)
    torch.testing.assert_close(fake[~rows], generated[~rows])
    torch.testing.assert_close(fake[rows], warp(data, draw["displacement"])[rows])
    assert (fake[rows] - data[rows]).abs().mean() < 0.9 * (generated[rows] - data[rows]).abs().mean()
    losses = [objective.loss(nets, data, noise, 0.3, draw)[0] for objective in (model.objective, plain)]
    assert torch.equal(*losses)
    assert "sinha2021negative" in model.objective.citations and "sinha2021negative" not in plain.citations


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_objective("gan"), "unknown objective 'gan': choose one of rectified_flow, reflow, shortcut"),
        (lambda: parse_objective("mean_flow/ratio=1"), "mean_flow has no option 'ratio': its options are .*improved"),
        (lambda: parse_objective("mean_flow/improved=yes"), "mean_flow/improved must be true or false, got 'yes'"),
        (lambda: parse_objective("shortcut/levels=many"), "shortcut/levels must be of type int, got 'many'"),
        (lambda: parse_objective("shortcut/levels=4/levels=8"), "shortcut/levels=4/levels=8 sets levels twice"),
        (lambda: make_objective("shortcut/levels=12", None), "levels must be a power of two, from 2 on, got 12"),
        (lambda: make_objective("shortcut/flow=2", None), r"the option flow must lie in \[0, 1\], got 2.0"),
        (lambda: make_objective("trajectory/levels=0", None), "the option levels must be at least 1, got 0"),
        (lambda: make_objective("adversarial/critic_steps=0", None), "critic_steps must be at least 1"),
        (lambda: make_objective("adversarial/anchor=0", None), "the option anchor must be positive, got 0.0"),
        (lambda: make_objective("adversarial/gamma=-1", None), "the option gamma must not be negative, got -1.0"),
        (lambda: make_objective("mean_flow/power=nan", None), "the option power must not be negative, got nan"),
        (lambda: make_objective("adversarial/rate=inf", None), "the option rate must be positive, got inf"),
        (lambda: make_objective("alpha_flow/alpha=2", None), "the option alpha must be at most 1, got 2.0"),
        (lambda: parse_stages("progressive/levels=1:1"), "levels must be a power of two, from 2 on, got 1"),
        (lambda: make_objective("reflow/pairs=0", None), "the option pairs must be at least 1, got 0"),
        (lambda: make_objective("progressive/steps=3", None), "steps must divide levels/2 = 8, got 3"),
        (lambda: make_objective("adversarial/critic=big", None), "unknown critic 'big': choose encoder or conv"),
        (
            lambda: parse_stages("rectified_flow:0.5,shortcut:0.4"),
            r"must add up to 1, but 0.5 \(rectified_flow\) \+ 0.4 \(shortcut\) = 0.9",
        ),
        (lambda: parse_stages("rectified_flow"), "not of the form objective:share"),
        (lambda: parse_stages("rectified_flow:2"), "not of the form objective:share"),
        (
            lambda: plan([("shortcut", 0.001), ("reflow", 0.999)], lambda _: None, 100),
            "shortcut has no step of the 100",
        ),
    ],
)
def test_bad_objectives_and_stages_get_one_clear_line(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_mean_flow_warns_of_steep_times(recwarn):
    make_objective("mean_flow", CustomScheduler(16))
    assert not recwarn
    with pytest.warns(UserWarning, match="--num_train_timesteps 16 or so, not 1000"):
        make_objective("mean_flow", CustomScheduler(1000))


@pytest.mark.parametrize("name", ["reflow", "trajectory", "distribution_matching", "progressive"])
def test_a_teacher_without_velocity_is_refused(name):
    scheduler = create_custom_model(unet="small").scheduler
    make = partial(make_objective, scheduler=scheduler)
    with pytest.raises(UserError, match=rf"{name}\S* learns from the velocity of its teacher"):
        plan(parse_stages(f"rectified_flow:0.4,adversarial:0.3,{name}:0.3"), make, 100)
    with pytest.raises(UserError, match=rf"{name}\S* learns from the velocity of its teacher"):
        plan(parse_stages(f"{name}:1"), make, 100, make("adversarial"))
    for without in ("alpha_flow/flow=0", "trajectory/flow=0"):
        with pytest.raises(UserError, match=rf"{name}\S* learns from the velocity of its teacher"):
            plan(parse_stages(f"{without}:0.5,{name}:0.5"), make, 100)
    plan(parse_stages(f"rectified_flow:0.4,{name}:0.3,adversarial:0.3"), make, 100, make("shortcut"))


def test_progressive_without_its_flow_asks_a_velocity_only_in_its_first_stage():
    make = partial(make_objective, scheduler=create_custom_model(unet="small").scheduler)
    plan(parse_stages("rectified_flow:0.5,progressive/flow=0/keep=0:0.5"), make, 100)
    with pytest.raises(UserError, match="progressive/flow=0/steps=4 learns from the velocity"):
        plan(parse_stages("rectified_flow:0.5,progressive/flow=0:0.5"), make, 100)  # for the jumps that it keeps


def test_every_objective_says_what_its_options_mean_and_whom_it_cites():
    for name, kind in OBJECTIVES.items():
        told = "".join(base.__doc__ or "" for base in kind.__mro__)
        for option in kind.defaults():
            assert option in told, (name, option)
        assert kind.citations, name
    known = set(re.findall(r"@\w+\{([^,\s]+),", (ROOT / "references.bib").read_text()))
    cited = {name: make_objective(name, CustomScheduler(16)).citations for name in OBJECTIVES}
    # What an option adds is cited where it is on, and only there.
    for name, key in (
        ("adversarial/warped=0.5", "sinha2021negative"),
        ("adversarial/matching=1", "salimans2016improved"),
        ("mean_flow/improved=true", "geng2025improved"),
    ):
        cited[name] = make_objective(name, CustomScheduler(16)).citations
        assert key in cited[name] and key not in cited[name.split("/")[0]]
    for name, key in (
        ("adversarial/augmented=false", "zhao2020differentiable"),
        ("adversarial/critic=conv", "sauer2024fast"),
        ("alpha_flow/anneal=10", "luo2025soflow"),
    ):
        assert key not in make_objective(name, CustomScheduler(16)).citations and key in cited[name.split("/")[0]]
    named = (
        {key for keys in cited.values() for key in keys}
        | set(TRAINING)
        | set(SCORES)
        | set(fusing.CITATIONS)
        | set(muon.CITATIONS)
    )
    named |= {key for keys in TIME_SAMPLINGS.values() for key in keys}
    filtered = CustomScheduler(16, time_grids={2: [1, 0.4, 0]}, smoothing={2: 0.1}, sharpening={2: 0.1}).citations
    assert {"nelder1965simplex", "buades2005nonlocal", "gonzalez2018digital"} <= set(filtered)
    named |= set(filtered)
    assert named <= known, named - known
    described = (ROOT / "writeup/methods.typ").read_text()
    for name in OBJECTIVES:
        assert f"\n  {name}: o => [" in described, name
