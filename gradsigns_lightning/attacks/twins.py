"""A thief's own unmarked network: what such a network usually looks like, without a mark."""

from __future__ import annotations

import torch
from torch import nn

from gradsigns_lightning.attacks.base import AttackData, copied, seeded
from gradsigns_lightning.attacks.training import train


def train_twin(model: nn.Module, data: AttackData, *, seed: int = 0) -> nn.Module:
    """Train a network of the same architecture from scratch on the thief's images, by the recipe."""
    return train(with_random_weights(model, seed=seed), data, data.recipe, seed=seed)


def with_random_weights(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Return a copy with random weights: those of each layer's ``reset_parameters``.

    Tables that belong to no such layer (a class token, positions) are drawn normally, with a standard
    deviation of 0.02; vectors of this kind stay as they are.
    """
    fresh = copied(model)
    drawn: set[int] = set()
    with seeded(seed, fresh), torch.no_grad():
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                drawn |= {id(p) for p in module.parameters(recurse=False)}
        for parameter in fresh.parameters():
            if id(parameter) not in drawn and parameter.ndim > 1:
                parameter.normal_(std=0.02)
    return fresh
