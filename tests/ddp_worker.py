"""One process's share of a step's gradient, and what it hears of rank 0's checkpoint, for test_distributed.py:
torchrun ddp_worker.py FOLDER_OF_FACES OUT."""

import copy
import sys

import torch

from custom_model import create_custom_model
from src.objectives.contract import Nets
from src.training.data import load_images
from src.training.distributed import joined
from src.training.engine import Loss, accumulate_gradient, global_batch

with joined("cpu") as (world, device):
    faces, out = sys.argv[1:]
    with world.one_a_machine_first():
        images = torch.from_numpy(load_images(faces, faces, 32)[0])
    torch.manual_seed(0)
    model = create_custom_model(objective="shortcut", unet="small", image_size=32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    model.eval()  # dropout's masks do differ between processes
    nets = Nets(model, copy.deepcopy(model))
    loss_module = world.wrap(Loss(model.objective.loss, nets, model))
    data, noise, draw = global_batch(images, model.objective, 16, seed=3, step=5, world=world)
    logs = accumulate_gradient(loss_module, data, noise, draw, 0.0, slices=2, world=world)
    mean = world.mean(torch.cat(logs["loss"]))
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    own = {"halves": noise.half().mT, "steps": [torch.tensor(7), 8], "images": data[0], "name": f"rank {world.rank}"}
    heard = world.from_rank_0(lambda: own)
    torch.save(
        {"gradient": gradient, "loss": mean, "noise": noise, "data": data, "own": own, "heard": heard},
        f"{out}/{world.size}-{world.rank}.pt",
    )
