"""One step of training, which every objective shares, and the state that it changes."""

import copy
import math
import os
import sys
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from src.errors import UserError
from src.objectives.contract import Nets, Objective
from src.training import fusing
from src.training.data import batch_indices, to_batch
from src.training.distributed import ALONE, World
from src.training.ema import EMA, PowerEMA
from src.training.muon import Muon
from src.training.pairs import load_pairs
from src.training.recipe import CITATIONS, Recipe, Stage
from src.utils import has_bf16


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

    def forward(
        self, data: Tensor, noise: Tensor, progress: float, draw: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
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


CRITIC_STREAM = 1_000_000  # the random streams of the critic's batches and of its first weights begin here


def global_batch(
    images: Tensor,
    objective: Objective,
    batch_size: int,
    seed: int,
    step: int,
    world: World,
    pairs: tuple[np.ndarray, np.ndarray] | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """This process's rows of the step's batch: data, noise [B, 3, H, W], and the objective's draws.

    Every process draws the whole batch's randomness and keeps its own rows, so that their number changes nothing.

    Args:
        pairs: noise and images, for the rows where the objective draws a "pair".
        stream: 0 for the student; each of the critic's rounds in a step has its own, and another order of the images.
    """
    seed_step(seed, step, stream)
    data = to_batch(images, batch_indices(len(images), batch_size, seed + stream, step))
    noise = torch.randn_like(data)
    draw = (objective.draw_for_critic if stream else objective.draw)(tuple(data.shape))
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
    world: World = ALONE,
) -> dict[str, list[Tensor]]:
    """Add the gradient of the batch's mean loss to the model's, computed slice by slice.

    Returns: this process's per-sample losses ("loss") and the objective's logs, a list of 1-d tensors for each.
    """
    logs: dict[str, list[Tensor]] = {}
    size = len(data) // slices
    for i in range(slices):
        rows = slice(i * size, (i + 1) * size)
        with world.synchronised(loss_module, i == slices - 1):
            with torch.autocast(data.device.type, torch.bfloat16, enabled=bf16):
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

    def __init__(self, model, images: np.ndarray, recipe: Recipe, stages: list[Stage], world: World = ALONE):
        self.ends = time.monotonic() + 60 * (recipe.max_minutes or math.inf)  # the session
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
        # Let go of the stage before, its teacher and its critic, before this one's are made.
        self.nets = self.optimizer = self.loss_module = self.critic_optimizer = self.critic_loss_module = None
        self.first_step = sum(stage.steps for stage in self.stages[:index])
        teacher = critic = None
        if objective.needs_teacher:
            model.objective = self.stages[index - 1].objective if index else self.started_from
            teacher = copy.deepcopy(model).eval().requires_grad_(False)
            self._speed_up(teacher.network)
        if objective.critic_steps:
            seed_step(recipe.seed, self.first_step, CRITIC_STREAM)
            critic = objective.make_critic(model, self.images.shape[1:]).to(model.device)
            self._speed_up(critic.network if hasattr(critic, "predict") else critic)
        model.objective = self.ema.model.objective = objective
        self.nets = Nets(model, self.ema.model, teacher, critic)
        self.optimizer = self._optimizer(model, recipe.weight_decay, objective.muon)
        self.loss_module = self.world.wrap(Loss(objective.loss, self.nets, model))
        if critic is not None:
            self.critic_optimizer = self._optimizer(critic, 0.0)
            self.critic_loss_module = self.world.wrap(Loss(objective.critic_loss, self.nets, critic))

    def _optimizer(self, module: nn.Module, weight_decay: float, muon: bool = False) -> torch.optim.AdamW:
        beta1 = self.recipe.beta1 if self.stage.objective.beta1 is None else self.stage.objective.beta1
        settings = {"betas": (beta1, self.recipe.beta2), "weight_decay": weight_decay, "fused": True}
        return Muon(module, **settings) if muon else torch.optim.AdamW(module.parameters(), **settings)

    def take_critic(self, weights: dict[str, Tensor]) -> bool:
        """Go on with a critic of another run, if the stage has one: whether it has.

        Raises: UserError if it is not the one that the stage makes.
        """
        if self.nets.critic is None:
            return False
        if _shapes(weights) != _shapes(self.nets.critic.state_dict()):
            raise UserError(
                f"the teacher's critic is of another form than that of {self.stage.name}: name a checkpoint without "
                "one (final_model.pt), or the options that it was trained with"
            )
        self.nets.critic.load_state_dict(weights)
        return True

    @property
    def stage(self) -> Stage:
        return self.stages[self.index]

    @property
    def last_trained(self) -> Stage:
        """The stage of the last step, if there was one: whose the average's weights are."""
        return self.stages[max(0, self.index - (self.age == 0))]

    @property
    def age(self) -> int:
        """The steps of the stage that are done."""
        return self.steps - self.first_step

    @property
    def progress(self) -> float:
        """The share of the stage that is done."""
        return min(1.0, self.age / self.stage.steps)

    def at_end_of_stage(self) -> bool:
        return self.age == self.stage.steps

    def step(self) -> tuple[dict[str, list[Tensor]], Tensor]:
        """One optimizer step, which reads nothing back from the device.

        Returns: the losses and logs of `accumulate_gradient`, and the gradient's norm before clipping.
        Raises: TimeUp, before the step, if the session ends while pairs are made for it.
        """
        if self.at_end_of_stage() and self.index + 1 < len(self.stages):
            self.model.load_state_dict(self.ema.model.state_dict())
            self._begin(self.index + 1)
        recipe, objective, critic = self.recipe, self.stage.objective, self.nets.critic
        if objective.pairs and self.pairs is None:
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                shape = self.images.shape[1:]
                self.pairs = load_pairs(self.nets.teacher, shape, objective, recipe.seed, self.world, self.ends)

        most_warmup = self.stage.steps // 10 if self.index else None
        lr = recipe.learning_rate(self.age, most_warmup) * objective.fall(self.progress)
        logs = {}
        for i in range(objective.critic_steps):
            critic.requires_grad_(True)
            found = self._accumulate(self.critic_loss_module, stream=CRITIC_STREAM + 1 + i)
            logs |= {name: values for name, values in found.items() if name != "loss"}
            self._apply(self.critic_optimizer, critic, lr * objective.critic_rate)
            critic.requires_grad_(False)
        logs |= self._accumulate(self.loss_module, stream=0)
        self.lr = lr * objective.rate
        norm = self._apply(self.optimizer, self.model, self.lr)
        self.steps += 1
        self.ema.update(self.model, self.age)
        self.power_ema.update(self.model, self.age)
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
        for name in moments.keys() - {"step"}:  # in the layout of a device where they were saved, not of this one
            moments[name] = torch.empty_like(p).copy_(moments[name])
