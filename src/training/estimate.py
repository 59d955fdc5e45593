"""What a run will need, without training: parameters, memory, time."""

import copy
import time
from dataclasses import replace

import numpy as np
import torch

from src.training.distributed import World
from src.training.engine import Training
from src.training.pairs import CHUNK, solve
from src.training.recipe import Recipe, Stage


def estimate(
    model,
    images: np.ndarray,
    recipe: Recipe,
    stages: list[Stage],
    world: World,
    critic: dict[str, torch.Tensor] | None = None,
) -> dict:
    """Parameters, memory of one process in GB, and hours, from a step of a few images in each stage.

    Weights, gradient, two moments (Muon has one) and three averages take 28 bytes a parameter, a teacher 4 more, a
    critic 16 of its own; activations are measured as what autograd keeps for one image. Time and activations are those
    of uncompiled steps: upper bounds where the engine compiles.

    Args:
        critic: weights that the first stage's critic, if it has one, would begin with.
    Raises: UserError where training would not begin: slices that do not fit, a critic of another form.
    """
    count = min(max(8, *(stage.objective.at_once for stage in stages)), len(images))
    few = replace(recipe, batch_size=count, micro_batch=0)
    at_once = recipe.batch_size // world.size // recipe.slices(len(images), world, stages)
    parameters = sum(p.numel() for p in model.parameters())
    weights_bytes = activation_bytes = seconds = 0.0
    for stage in stages:
        with torch.compiler.set_stance("force_eager"):
            training = rehearsal(model, images, few, stage)
            if critic and stage is stages[0]:
                training.take_critic(critic)
            kept = _kept_by_autograd(training)
            seconds_a_step = _seconds(model.device, training.step)
            if stage.objective.pairs:
                noise = torch.randn(CHUNK, *training.images.shape[1:], device=model.device)
                one_step = training.nets.teacher, noise, stage.objective.solver, 1
                steps = stage.objective.solver_steps * stage.objective.pairs / CHUNK / world.size
                with torch.autocast(model.device.type, torch.bfloat16, enabled=training.bf16):
                    seconds += steps * _seconds(model.device, lambda one_step=one_step: solve(*one_step))
        nets = training.nets
        others = 4 * parameters * (nets.teacher is not None)
        others += 16 * sum(p.numel() for p in nets.critic.parameters()) if nets.critic is not None else 0
        weights_bytes = max(weights_bytes, 28 * parameters + others)
        activation_bytes = max(activation_bytes, kept / count * at_once)
        seconds += stage.steps * seconds_a_step * recipe.batch_size / count / world.size
    return {
        "parameters": parameters,
        "weights_and_averages_gb": round(weights_bytes / 1e9, 2),
        "activations_gb": round(activation_bytes / 1e9, 2),
        "images_per_second": round(recipe.num_iterations * recipe.batch_size / seconds, 2),
        "hours": round(seconds / 3600, 2),
    }


def rehearsal(model, images: np.ndarray, recipe: Recipe, stage: Stage) -> Training:
    """A stage by itself, on a copy of the model, without its pairs, which are counted apart."""
    objective = copy.copy(stage.objective)
    objective.pairs = 0
    return Training(copy.deepcopy(model), images, recipe, [stage._replace(objective=objective)])


def _kept_by_autograd(training: Training) -> int:
    """Bytes of activations that one step's largest graph holds, weights not counted.

    A critic's graph is gone before the student's begins, so what is kept after a backward pass began is another's.
    """
    graphs: list[dict[int, int]] = [{}]
    begun = False
    weights = {p.untyped_storage().data_ptr() for net in training.nets if net is not None for p in net.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal begun
        if begun:
            graphs.append({})
            begun = False
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            graphs[-1][storage.data_ptr()] = storage.nbytes()
        return tensor

    def use(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal begun
        begun = True
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, use):
        training.step()
    return max(sum(graph.values()) for graph in graphs)


def _seconds(device: torch.device, work) -> float:
    for _ in range(2):  # the second time counts
        began = time.monotonic()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.monotonic() - began
