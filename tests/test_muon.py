"""Muon: orthogonal steps of the right length for hidden matrices, AdamW's own for the rest."""

import copy

import pytest
import torch

from custom_model import create_custom_model
from src.training.muon import MOMENTUM, Muon, orthogonal

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
        # As far as AdamW's rate goes at most: 0.2 to 0.4 of it is usual for AdamW.
        assert 0.1 < (once[name] - weight).square().mean().sqrt() / 0.01 < 0.3
    stepped(model, optimizer, [1])
    generator = torch.Generator().manual_seed(1)
    second = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    for name, p in names.items():
        torch.testing.assert_close(optimizer.state[p]["momentum"], MOMENTUM * first[name] + second[name])


def test_a_step_reads_nothing_back_from_the_device():
    model = create_custom_model(unet="small", image_size=32).to("meta")
    optimizer = Muon(model, **SETTINGS, foreach=True)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()  # where reading a number is an error
    assert all(p.grad is None for p in hidden(model).values())
