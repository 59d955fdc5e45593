"""What a run will need, without training: parameters, memory, time."""

import copy
import time

import torch

from src.training.distributed import World
from src.training.engine import Loss, Recipe, accumulate_gradient, global_batch, has_bf16


def estimate(model, images: torch.Tensor, recipe: Recipe, world: World) -> dict:
    """Parameters, memory of one process in GB, and hours, from a forward and backward pass of a few images.

    Weights, gradient, two moments and three averages take 28 bytes a parameter; activations are measured as what
    autograd keeps for one image. The time is that of uncompiled passes: an upper bound where the engine compiles.
    """
    device = model.device
    bf16 = has_bf16(device)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    count = 8
    slices = recipe.slices(len(images), world)
    # A teacher of its own, as in training: the same network under autocast's cache would lose gradients.
    loss_module = Loss(model.train(), copy.deepcopy(model).eval().requires_grad_(False))
    data, noise, draw = global_batch(images, model.objective, count, recipe.seed, 0, World())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        accumulate_gradient(loss_module, data, noise, draw, 0, bf16=bf16)
    _wait(device)
    began = time.monotonic()
    accumulate_gradient(loss_module, data, noise, draw, 0, bf16=bf16)
    _wait(device)
    seconds = (time.monotonic() - began) / count
    model.zero_grad(set_to_none=True)

    parameters = sum(p.numel() for p in model.parameters())
    at_once = recipe.batch_size // world.size // slices
    return {
        "parameters": parameters,
        "weights_and_averages_gb": round(28 * parameters / 1e9, 2),
        "activations_gb": round(sum(kept.values()) / count * at_once / 1e9, 2),
        "images_per_second": round(world.size / seconds, 2),
        "hours": round(recipe.num_iterations * recipe.batch_size * seconds / world.size / 3600, 2),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
