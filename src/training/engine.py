"""The training loop that every objective shares."""

import copy
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from src.objectives.contract import Nets, Objective
from src.training import fusing
from src.training.checkpoints import best_score, clear_leftovers, load_last, save_averages, save_last
from src.training.data import batch_indices, to_batch
from src.training.distributed import World
from src.training.ema import EMA, PowerEMA
from src.training.pairs import load_pairs
from src.training.record import Metrics, RunRecord, early_preview, environment, plot_curves, save_previews
from src.utils import UserError, has_bf16, save_model, write_json


@dataclass
class Recipe:
    """How to train. A resumed run may change only what `FREE` lists.

    Args:
        batch_size: images of one optimizer step, over all processes.
        num_iterations: optimizer steps in all.
        lr: AdamW's learning rate: linear from 0 over `warmup` steps, then constant, and falling with the square
            root of the step from `lr_decay_start` on; steps of a stage, of which warming up takes a tenth at most
            where the weights come from a stage before.
        grad_clip: largest norm of the gradient.
        ema_decay: weight of the old average at each step.
        micro_batch: most images a process computes at once, in equal slices of its share of the batch; changes the
            memory, not the gradient (but for dropout's masks). 0: the whole share.
        seed: of weights, data order, noise, times and dropout.
        log_interval, save_interval, eval_interval: in steps; eval_interval 0: never.
        max_minutes: stop (and export) after this time in one session; None: never.
    """

    batch_size: int = 32  # the challenge's
    num_iterations: int = 100_000  # the challenge's
    lr: float = 1e-4  # the challenge's, and arXiv:2410.12557's
    warmup: int = 200
    lr_decay_start: int = 50_000  # inverse square root: arXiv:2312.02696
    beta1: float = 0.9
    beta2: float = 0.999  # arXiv:1412.6980
    weight_decay: float = 0.1  # arXiv:2410.12557
    grad_clip: float = 1.0  # arXiv:2209.03003's code
    ema_decay: float = 0.999  # arXiv:2410.12557
    micro_batch: int = 0
    seed: int = 42
    log_interval: int = 100
    save_interval: int = 10_000
    eval_interval: int = 0
    max_minutes: float | None = None

    def __post_init__(self):
        for name in ("batch_size", "num_iterations", "lr_decay_start", "log_interval", "save_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "micro_batch", "eval_interval"):
            if not 0 <= getattr(self, name) < math.inf:  # nor not a number
                raise UserError(f"--{name} must not be negative or infinite, got {getattr(self, name)}")
        for name in ("ema_decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr must be positive and finite, got {self.lr}")
        if not self.grad_clip > 0:
            raise UserError(f"--grad_clip must be positive, got {self.grad_clip}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UserError(f"--max_minutes must be positive, got {self.max_minutes}")

    def slices(self, count: int, world: World, stages: "list[Stage] | tuple" = ()) -> int:
        """How many equal slices a process's share of a batch is computed in; UserError if there are no such.

        Args:
            count: images in the data set.
            stages: what is trained; some want a number of images at once.
        """
        share, rest = divmod(self.batch_size, world.size)
        if rest:
            raise UserError(f"--batch_size {self.batch_size} does not split over {world.size} processes")
        if self.batch_size > count:
            raise UserError(f"{count} training images do not fill one batch of {self.batch_size}: lower --batch_size")
        most = self.micro_batch or share
        slices = next(slices for slices in range(1, share + 1) if share % slices == 0 and share // slices <= most)
        for stage in stages:
            if share // slices < stage.objective.at_once:
                raise UserError(
                    f"{stage.name} wants {stage.objective.at_once} images at once or more, not {share // slices}: "
                    "raise --micro_batch or --batch_size"
                )
        return slices

    def learning_rate(self, step: int, most_warmup: int | None = None) -> float:
        """Of the step after `step` steps."""
        warmup = self.warmup if most_warmup is None else min(self.warmup, most_warmup)
        return self.lr * min(1.0, (step + 1) / max(1, warmup)) / math.sqrt(max(1.0, step / self.lr_decay_start))


FREE = ("num_iterations", "micro_batch", "log_interval", "save_interval", "eval_interval", "max_minutes")


# Keys of references.bib for what every run builds on, beside its objectives and its path.
CITATIONS = (
    "challenge2025",
    "simpsons2018",
    "ho2020denoising",
    "paszke2019pytorch",
    "kingma2015adam",
    "loshchilov2019decoupled",
    "karras2024analyzing",
)


class Teacher(NamedTuple):
    """Where the weights that a run starts from were trained."""

    weights: str  # their hash
    stages: list[dict]  # as a run's record lists them
    seed: int | None = None  # of that run; None: an older version did not tell
    data: dict | None = None  # its images' hash and number


class Stage(NamedTuple):
    """A share of the training with one objective; each stage starts from the EMA of the one before."""

    name: str  # as `--stages` writes it
    objective: Objective
    steps: int


def plan(
    shares: list[tuple[str, float]],
    make: Callable[[str], Objective],
    num_iterations: int,
    started_from: Objective | None = None,
) -> list[Stage]:
    """Stages of whole steps from their names and shares.

    Args:
        make: the objective of a name.
        started_from: what the model before the first stage was trained with.
    Raises: UserError if a stage would have no step, or asks for a velocity that was not kept.
    """
    ends = np.cumsum([0.0] + [share for _, share in shares])
    ends = [round(end * num_iterations) for end in ends.tolist()]
    stages = [Stage(name, make(name), b - a) for (name, _), a, b in zip(shares, ends, ends[1:], strict=False)]
    for stage in stages:
        if stage.steps < 1:
            raise UserError(
                f"stage {stage.name} has no step of the {num_iterations}: raise --num_iterations or its share"
            )
    before = started_from
    for stage in stages:
        if stage.objective.asks_velocity and before is not None and not before.keeps_velocity:
            raise UserError(
                f"{stage.name} learns from the velocity of its teacher, which kept only its jumps: "
                f"name an earlier checkpoint with --teacher, or put the stage before the one that gave the velocity up"
            )
        before = stage.objective
    return stages


class Loss(nn.Module):
    """An objective's loss as a forward pass, which is what DDP synchronises the gradients of.

    Args:
        loss: `loss` or `critic_loss` of an objective.
        trained: the one of `nets` that it trains.
    """

    def __init__(self, loss: Callable, nets: Nets, trained: nn.Module):
        super().__init__()
        self.trained = trained
        self.call = [loss, nets]  # in a list, so that the others are no submodules and DDP leaves them alone

    def forward(self, data: Tensor, noise: Tensor, progress: float, draw: dict[str, Tensor]):
        loss, nets = self.call
        return loss(nets, data, noise, progress, draw)


def can_compile(device: torch.device) -> bool:
    """Whether to compile for the device: a GPU, TORCHDYNAMO_DISABLE=1 does not forbid it, and a trial shows that all
    that torch.compile needs is there."""
    return device.type == "cuda" and os.environ.get("TORCHDYNAMO_DISABLE") != "1" and compiles(device)


@cache
def compiles(device: torch.device) -> bool:
    """Try torch.compile, forward and backward; where it fails, a warning says why.

    It takes a chip since Volta, Triton, a C compiler and Python's headers, and for what a network computes on the host,
    as its time embedding does, a C++ compiler.
    """
    try:
        x = torch.ones(4, device=device, requires_grad=True)
        torch.compile(lambda x: (x * torch.arange(4.0).exp().to(x.device)).sum())(x).backward()
    except Exception as fault:
        why = str(fault).strip().split("\n")[0]
        print(f"warning: torch.compile does not work here, so training is slower: {why}", file=sys.stderr)
        return False
    return True


def seed_step(seed: int, step: int, stream: int) -> None:
    """Seed a step's randomness from these three alone, so that resuming needs no stored generator."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0]))


CRITIC = 1_000_000  # the random streams of the critic's batches and of its first weights begin here


def global_batch(
    images: Tensor,
    objective: Objective,
    batch_size: int,
    seed: int,
    step: int,
    world: World,
    pairs: tuple[np.ndarray, np.ndarray] | None = None,
    stream: int = 0,
):
    """This process's rows of the step's batch: data, noise [B, 3, H, W], and the objective's draws.

    Every process draws the whole batch's randomness and keeps its own rows, so that their number changes nothing.

    Args:
        pairs: noise and images, for the rows where the objective draws a "pair".
        stream: 0 for the student; each of the critic's rounds in a step has its own, and another order of the images.
    """
    seed_step(seed, step, stream)
    data = to_batch(images, batch_indices(len(images), batch_size, seed + stream, step))
    noise = torch.randn_like(data)
    draw = objective.draw(tuple(data.shape))
    rows = slice(world.rank * batch_size // world.size, (world.rank + 1) * batch_size // world.size)
    data, noise, draw = data[rows], noise[rows], {name: value[rows] for name, value in draw.items()}
    if pairs is not None:
        pair = draw.pop("pair")
        here = (pair >= 0).nonzero().squeeze(1)
        taken = pair[here].numpy()
        for batch, source in zip((noise, data), pairs, strict=True):
            batch[here.to(batch.device)] = torch.from_numpy(source[taken]).to(batch.device, batch.dtype)
    if data.is_cuda:  # or copying them there would wait for it
        draw = {name: value.pin_memory() for name, value in draw.items()}
    return data, noise, draw


def accumulate_gradient(
    loss_module: nn.Module,
    data: Tensor,
    noise: Tensor,
    draw: dict[str, Tensor],
    progress: float,
    slices: int = 1,
    bf16: bool = False,
    world: World = World(),  # noqa: B008 (an immutable tuple)
) -> dict[str, list[Tensor]]:
    """Add the gradient of the batch's mean loss to the model's, computed slice by slice.

    Returns: this process's per-sample losses ("loss") and the objective's logs, a list of 1-d tensors for each.
    """
    logs: dict[str, list[Tensor]] = {}
    size = len(data) // slices
    for i in range(slices):
        rows = slice(i * size, (i + 1) * size)
        with world.synchronised(loss_module, i == slices - 1):
            # Without autocast's cache: casts of weights left by a pass without gradient would serve the same network's
            # next pass, which would then train nothing.
            with torch.autocast(data.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                part = {name: value[rows] for name, value in draw.items()}
                loss, parts = loss_module(data[rows], noise[rows], progress, part)
            (loss.sum() / len(data)).backward()  # DDP averages over processes of equal shares
        for name, value in {"loss": loss.detach(), **parts}.items():
            logs.setdefault(name, []).append(value)
    return logs


class Training:
    """The state of a run, and its one step.

    Args:
        model: what the first stage starts from, and learns from if it needs a teacher.
        images: uint8 [N, 3, H, W]; kept whole on the model's device.
    """

    def __init__(self, model, images: np.ndarray, recipe: Recipe, stages: list[Stage], world: World = World()):  # noqa: B008
        self.slices = recipe.slices(len(images), world, stages)
        self.model, self.recipe, self.stages, self.world = model.train(), recipe, stages, world
        self.bf16 = has_bf16(model.device)
        self.images = torch.from_numpy(images).to(model.device)
        self.on_gpu, self.compiling = model.device.type == "cuda", can_compile(model.device)
        if self.on_gpu:  # training on CPUs is slower with it
            model.network.to(memory_format=torch.channels_last)
            torch.set_float32_matmul_precision("high")  # TF32, as convolutions: what is not in bfloat16 gets by with it
        if self.compiling:  # one network's code runs as student, average, teacher, critic, with and without gradient
            torch._dynamo.config.cache_size_limit = 64
            torch.backends.cudnn.benchmark = True  # a search of up to a minute: for those who have the time to compile
        self.ema, self.power_ema = EMA(model, recipe.ema_decay), PowerEMA(model)
        self._speed_up(model.network, self.ema.model.network)
        self.started_from = model.objective
        self.steps, self.lr = 0, 0.0
        self._begin(0)

    def _speed_up(self, *modules: nn.Module) -> None:
        """On a GPU, in place: state-dict keys stay."""
        for module in modules:
            if self.compiling:
                module.compile(dynamic=False)  # every shape of a step is fixed
            elif self.on_gpu:
                fusing.fuse(module)

    @property
    def citations(self) -> list[str]:
        """Keys of references.bib for what its steps build on, beside the objectives."""
        fused = fusing.CITATIONS if self.on_gpu and not self.compiling else ()
        return [*CITATIONS, *fused, *self.model.scheduler.citations]

    def _begin(self, index: int) -> None:
        """Set up the stage of this index, around the weights that the model has."""
        model, recipe, objective = self.model, self.recipe, self.stages[index].objective
        self.index, self.pairs = index, None
        self.first_step = sum(stage.steps for stage in self.stages[:index])
        teacher = critic = None
        if objective.needs_teacher:
            model.objective = self.stages[index - 1].objective if index else self.started_from
            teacher = copy.deepcopy(model).eval().requires_grad_(False)
            self._speed_up(teacher.network)
        if objective.critic_steps:
            seed_step(recipe.seed, self.first_step, CRITIC)
            critic = objective.make_critic(model, self.images.shape[1:]).to(model.device)
            self._speed_up(critic.network if hasattr(critic, "predict") else critic)
        model.objective = self.ema.model.objective = objective
        self.nets = Nets(model, self.ema.model, teacher, critic)
        self.optimizer = self._optimizer(model, recipe.weight_decay)
        self.loss_module = self.world.wrap(Loss(objective.loss, self.nets, model))
        if critic is not None:
            self.critic_optimizer = self._optimizer(critic, 0.0)
            self.critic_loss_module = self.world.wrap(Loss(objective.critic_loss, self.nets, critic))

    def _optimizer(self, module: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        beta1 = self.recipe.beta1 if self.stage.objective.beta1 is None else self.stage.objective.beta1
        betas = (beta1, self.recipe.beta2)
        return torch.optim.AdamW(module.parameters(), betas=betas, weight_decay=weight_decay, fused=True)

    @property
    def stage(self) -> Stage:
        return self.stages[self.index]

    @property
    def progress(self) -> float:
        """The share of the stage that is done."""
        return min(1.0, (self.steps - self.first_step) / self.stage.steps)

    def at_end_of_stage(self) -> bool:
        return self.steps == self.first_step + self.stage.steps

    def step(self) -> tuple[dict[str, list[Tensor]], Tensor]:
        """One optimizer step, which reads nothing back from the device.

        Returns: the losses and logs of `accumulate_gradient`, and the gradient's norm before clipping.
        """
        if self.at_end_of_stage() and self.index + 1 < len(self.stages):
            self.model.load_state_dict(self.ema.model.state_dict())
            self._begin(self.index + 1)
        recipe, objective, critic = self.recipe, self.stage.objective, self.nets.critic
        if objective.pairs and self.pairs is None:
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                self.pairs = load_pairs(self.nets.teacher, self.images.shape[1:], objective, recipe.seed, self.world)

        most_warmup = self.stage.steps // 10 if self.index else None
        lr = recipe.learning_rate(self.steps - self.first_step, most_warmup) * objective.fall(self.progress)
        logs = {}
        for i in range(objective.critic_steps):
            critic.requires_grad_(True)
            found = self._accumulate(self.critic_loss_module, stream=CRITIC + 1 + i)
            logs |= {name: values for name, values in found.items() if name != "loss"}
            self._apply(self.critic_optimizer, critic, lr * objective.critic_rate)
            critic.requires_grad_(False)
        logs |= self._accumulate(self.loss_module, stream=0)
        self.lr = lr * objective.rate
        norm = self._apply(self.optimizer, self.model, self.lr)
        self.steps += 1
        self.ema.update(self.model, self.steps - self.first_step)
        self.power_ema.update(self.model, self.steps - self.first_step)
        return logs, norm

    def _accumulate(self, loss_module: nn.Module, stream: int) -> dict[str, list[Tensor]]:
        recipe, world, stage = self.recipe, self.world, self.stage
        pairs = None if stream else self.pairs
        batch = global_batch(
            self.images, stage.objective, recipe.batch_size, recipe.seed, self.steps, world, pairs, stream
        )
        seed_step(recipe.seed, self.steps, stream + 1 + world.rank)  # for dropout
        return accumulate_gradient(loss_module, *batch, self.progress, self.slices, self.bf16, world)

    def _apply(self, optimizer: torch.optim.Optimizer, module: nn.Module, lr: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), self.recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict:
        """What a resumed run needs, beside the EMA."""
        state = {
            "step": self.steps,
            "stage": self.index,
            "student": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "power_ema": self.power_ema.averages,
        }
        if self.nets.teacher is not None:
            state["teacher"] = self.nets.teacher.state_dict()
        if self.nets.critic is not None:
            state |= {"critic": self.nets.critic.state_dict(), "critic_optimizer": self.critic_optimizer.state_dict()}
        return state

    def restore(self, checkpoint: dict) -> None:
        """Go on from a checkpoint of `save_last`. UserError if its critic is not the one that this code makes."""
        state = checkpoint["training"]
        self._begin(state["stage"])
        self.model.load_state_dict(state["student"])
        self.ema.model.load_state_dict(checkpoint["state_dict"])
        self.power_ema.load(state["power_ema"])
        _load_optimizer(self.optimizer, state["optimizer"])
        if self.nets.teacher is not None:
            self.nets.teacher.load_state_dict(state["teacher"])
        if self.nets.critic is not None:
            if _shapes(state["critic"]) != _shapes(self.nets.critic.state_dict()):
                raise UserError(
                    "the run was interrupted with a critic of another form than this code's: go on with the commit "
                    "that its run.json names, or choose another --save_dir"
                )
            self.nets.critic.load_state_dict(state["critic"])
            _load_optimizer(self.critic_optimizer, state["critic_optimizer"])
        self.steps = state["step"]


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    optimizer.load_state_dict(state)
    for p, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):  # in the layout of a device where they were saved, not of this one
            moments[name] = torch.empty_like(p).copy_(moments[name])


def train(
    model,
    model_config: dict,
    images: np.ndarray,
    data_hash: str,
    recipe: Recipe,
    stages: list[Stage],
    save_dir: Path,
    arguments: dict,
    world: World = World(),  # noqa: B008
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    teacher: Teacher | None = None,
) -> int:
    """Train `model` on uint8 `images` [N, 3, H, W]; go on from `save_dir`/last.ckpt if it is there.

    Writes checkpoints (the EMA's weights), `model_config.json` (what rebuilds the model), `training_config.json`
    (`arguments`), `run.json`, previews, metrics and curves.

    Args:
        model: what the first stage starts from.
        model_config: of all stages but for the objective.
        world: this process among several; the first one writes.
        evaluate: scores a model every `eval_interval` steps: numbers to log, among them "ratio", the lower the
            better; the best so far is kept as `best_model.pt`.
        teacher: where `model` has its weights from, if from another run.
    Returns: the steps that are done; fewer than planned if `max_minutes` ended the session.
    Raises: UserError if the loss is no longer finite, the run is stopped by a signal (after saving), or the
        checkpoints in `save_dir` are damaged or another run's (which is left as it is).
    """
    training = Training(model, images, recipe, stages, world)
    settings = {name: value for name, value in asdict(recipe).items() if name not in FREE}
    # The steps of a single stage may grow, unless its loss or its rates depend on how many there are.
    fixed = len(stages) > 1 or stages[0].objective.follows_progress or stages[0].objective.steady < 1
    written = [[stage.name, stage.objective.options(), *[stage.steps][:fixed]] for stage in stages]
    identity = {
        "model": model_config,
        "data": data_hash,
        "teacher": teacher and teacher.weights,
        "stages": written,
        **settings,
    }
    defaults = {stage.name: stage.objective.defaults() for stage in stages}
    checkpoint = world.from_rank_0(lambda: load_last(save_dir, identity, defaults))
    if checkpoint:
        training.restore(checkpoint)
        del checkpoint
    if training.steps > recipe.num_iterations:
        raise UserError(
            f"the run in {save_dir} has {training.steps} iterations already, more than --num_iterations "
            f"{recipe.num_iterations}: take its checkpoint of then, or choose another --save_dir"
        )

    device, start, first, average = model.device, training.steps, world.rank == 0, training.ema.model

    def config() -> dict:
        return {**model_config, "objective": training.stage.name}

    def facts() -> dict:
        """What the weights come from, so far; before them, what those of the run that they come from do."""
        trained, left = list(teacher.stages if teacher else []), training.steps
        for name, objective, planned in stages:
            if left:
                trained.append(
                    {
                        "objective": name,
                        "steps": min(planned, left),
                        "batch_size": recipe.batch_size,
                        "lr": recipe.lr * objective.rate,
                        "options": objective.options(),
                        "citations": list(objective.citations),
                    }
                )
                left -= trained[-1]["steps"]
        return {
            "seed": recipe.seed,
            "data": {"hash": data_hash, "images": len(images)},
            "bf16": training.bf16,
            "stages": trained,
            "citations": training.citations,
        }

    if first:
        clear_leftovers(save_dir)
        write_json(save_dir / "training_config.json", arguments)
        write_json(save_dir / "model_config.json", config())
        metrics = Metrics(save_dir / "metrics.jsonl", start)
        described = {
            "arguments": arguments,
            "model_config": config(),
            "teacher": teacher and teacher._asdict(),
            **facts(),
        }
        record = RunRecord(save_dir / "run.json", start, device, world.size, described)
        record.write(start, recipe.batch_size, facts())
    surroundings = environment(device)
    scorer = getattr(evaluate, "key", "")
    best = best_score(save_dir, scorer) if first and evaluate else math.inf

    def provenance() -> dict:
        return {**surroundings, **facts(), "step": training.steps}

    def export(*names: str, **scores) -> None:
        for name in names:
            save_model(average, save_dir / name, config(), provenance={**provenance(), **scores})

    def save() -> None:
        age = training.steps - training.first_step
        averages = training.power_ema.averages
        about = {"model_config": config(), "provenance": provenance()}
        save_averages(save_dir, training.steps, averages, stage=training.index, age=age, **about)
        state = {**training.state(), "identity": identity}
        save_last(save_dir, average, config(), training=state, provenance=provenance())

    logs: dict[str, list[Tensor]] = {}
    step = interval_start = start
    began = interval_began = time.monotonic()
    progress = tqdm(total=recipe.num_iterations, initial=start, desc="training", disable=not first)
    with _stop_signals() as stop_received, progress:
        finished = stopped = False
        while not (finished or stopped):
            if step < recipe.num_iterations:
                parts, norm = training.step()
                step = training.steps
                for name, values in parts.items():
                    logs.setdefault(name, []).extend(values)

            logging = step % recipe.log_interval == 0
            late = recipe.max_minutes is not None and time.monotonic() - began > 60 * recipe.max_minutes
            finished = world.any(step >= recipe.num_iterations or late)
            stopped = world.any(stop_received())
            at_interval = finished or step % recipe.save_interval == 0 or training.at_end_of_stage()
            scoring = recipe.eval_interval and (finished or step % recipe.eval_interval == 0)
            if logs and (logging or at_interval or scoring or stopped):
                row = {name: world.mean(torch.cat(values)) for name, values in logs.items()}
                row["gradient_norm"] = norm.item()
                if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
                    last = save_dir / "last.ckpt"
                    kept = f"{last} is still good" if last.exists() else "nothing was saved yet"
                    raise UserError(
                        f"the loss or its gradient is not finite around iteration {step}; {kept}; "
                        "start again with a lower --lr in a new --save_dir"
                    )
                now = time.monotonic()
                speed = (step - interval_start) * recipe.batch_size / (now - interval_began)
                row |= {"stage": training.index, "lr": training.lr, "images_per_second": speed}
                if first:
                    metrics.add({"step": step, "images": step * recipe.batch_size, **row})
                    record.write(step, recipe.batch_size, facts())
                progress.update(step - progress.n)
                progress.set_postfix(loss=f"{row['loss']:.4f}", img_s=f"{speed:.1f}")
                logs, interval_start, interval_began = {}, step, now
            left = time.monotonic()
            if first and (at_interval or stopped):
                if at_interval:
                    export(f"checkpoint_iter_{step}.pt", *["final_model.pt"] * finished)
                save()
            if first and evaluate and scoring and not metrics.scored(step):  # saved before: it takes a while
                with torch.compiler.set_stance("force_eager"):  # its batches have other shapes
                    scores = evaluate(average)
                metrics.add({"step": step, **scores})
                if scores["ratio"] < best:
                    best = scores["ratio"]
                    export("best_model.pt", ratio=best, scorer=scorer)
            if first and (at_interval or stopped):
                plot_curves(metrics.rows, save_dir / "training_curves.png")
            if first and (at_interval or early_preview(step)):
                low = torch.autocast(device.type, torch.bfloat16, enabled=training.bf16)  # half the time on a CPU
                with torch.compiler.set_stance("force_eager"), low:
                    save_previews(average, save_dir, step, recipe.seed)
            interval_began += time.monotonic() - left  # saving and scoring are not training
    if not finished:
        raise UserError(f"stopped at iteration {step} and saved: the same command with --save_dir {save_dir} goes on")
    return step


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM has come, so that the loop can save first."""
    received = []
    note = lambda number, frame: received.append(number)  # noqa: E731
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
