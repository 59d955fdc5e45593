"""Muon: orthogonal steps of the right length for hidden matrices, AdamW's own for the rest."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

from custom_model import create_custom_model
from src.errors import UserError
from src.objectives import make_objective, parse_stages
from src.training.engine import Training
from src.training.muon import CITATIONS, MOMENTUM, Muon, orthogonal
from src.training.recipe import Recipe, history, plan

SETTINGS = {"betas": (0.9, 0.99), "weight_decay": 0.1}


def hidden(model):
    return {name: p for name, p in model.named_parameters() if p.ndim > 1 and "blocks." in name}


def stepped(model, optimizer, gradients, lr=0.01):
    for group in optimizer.param_groups:
        group["lr"] = lr
    for seed in gradients:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [(3, 8, 40), (3, 40, 8)])
def test_orthogonal_keeps_directions_and_evens_out_their_lengths(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    found = orthogonal(x)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    along = left.mT @ found @ right.mT  # in x's own directions
    lengths = along.diagonal(dim1=1, dim2=2)
    assert (0.6 < lengths).all() and (lengths < 1.3).all()
    torch.testing.assert_close(along, torch.diag_embed(lengths), atol=1e-3, rtol=0)
    torch.testing.assert_close(left @ along @ right, found, atol=1e-3, rtol=0)


def test_hidden_matrices_move_by_muons_rule_and_the_rest_by_adamws():
    model = create_custom_model(unet="small", image_size=32)
    other, names = copy.deepcopy(model), hidden(model)
    assert len(names) > 50 and not any(name.startswith(("network.head", "network.tail")) for name in names)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Muon(model, **SETTINGS, fused=True)
    once = stepped(model, optimizer, [0])
    theirs = stepped(other, torch.optim.AdamW(other.parameters(), **SETTINGS), [0])
    generator = torch.Generator().manual_seed(0)
    first = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    for name, weight in before.items():
        if name not in names:
            torch.testing.assert_close(once[name], theirs[name])
            continue
        matrix = first[name].flatten(1)
        step = 0.2 * max(matrix.shape) ** 0.5 * orthogonal(matrix[None])[0].reshape(weight.shape)
        torch.testing.assert_close(once[name], weight - 0.01 * (step + 0.1 * weight), atol=1e-5, rtol=1e-4)
        assert 0.1 < (once[name] - weight).square().mean().sqrt() / 0.01 < 0.3  # AdamW's is usually 0.2 to 0.4
    twice = stepped(model, optimizer, [1])
    generator = torch.Generator().manual_seed(1)
    second = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    for name, p in names.items():
        momentum = MOMENTUM * first[name] + second[name]
        torch.testing.assert_close(optimizer.state[p]["momentum"], momentum)
        matrix = (second[name] + MOMENTUM * momentum).flatten(1)  # Nesterov's
        step = 0.2 * max(matrix.shape) ** 0.5 * orthogonal(matrix[None])[0].reshape(p.shape)
        torch.testing.assert_close(twice[name], once[name] - 0.01 * (step + 0.1 * once[name]), atol=1e-5, rtol=1e-4)


def test_a_step_reads_nothing_back_from_the_device():
    model = create_custom_model(unet="small", image_size=32).to("meta")
    optimizer = Muon(model, **SETTINGS, foreach=True)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()  # where reading a number is an error
    assert all(p.grad is None for p in hidden(model).values())


def test_a_stage_that_asks_for_muon_gets_it_and_cites_it():
    model = create_custom_model(objective="shortcut", unet="small", image_size=32)
    shares = parse_stages("rectified_flow/muon=true:0.3,shortcut:0.3,adversarial/critic=conv/muon=true:0.4")
    stages = plan(shares, partial(make_objective, scheduler=model.scheduler), 10)
    recipe = Recipe(batch_size=8, num_iterations=10, beta1=0.8, beta2=0.98, weight_decay=0.2)
    training = Training(model, np.zeros((8, 3, 32, 32), np.uint8), recipe, stages)
    for index, (kind, beta1) in enumerate(((Muon, 0.8), (torch.optim.AdamW, 0.8), (Muon, 0.0))):
        training._begin(index)
        assert type(training.optimizer) is kind
        assert {(g["betas"], g["weight_decay"]) for g in training.optimizer.param_groups} == {((beta1, 0.98), 0.2)}
    assert type(training.critic_optimizer) is torch.optim.AdamW
    cited = [set(CITATIONS) <= set(stage["citations"]) for stage in history(stages, 10, recipe)]
    assert cited == [True, False, True]


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UserError, match="no blocks for Muon"):
        Muon(torch.nn.Linear(2, 2), **SETTINGS)
