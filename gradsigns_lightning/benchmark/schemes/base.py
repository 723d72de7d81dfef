"""What a watermarking scheme has to offer to be attacked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from gradsigns_lightning.attacks.base import AttackData, Recipe
from gradsigns_lightning.benchmark.measuring import Reader
from gradsigns_lightning.runs.own import build_network


@dataclass(frozen=True)
class Owner:
    """Whose model is signed, and with what.

    Attributes:
        settings: resolved configuration of ``gradsigns train``: network, data, optimizer, Trainer, seed.
        data: the data module, set up.
        recipe: how networks are trained on it.
        alpha: significance level of a proof.
        max_queries: budget of a reading through responses.
    """

    settings: dict[str, Any]
    data: Any
    recipe: Recipe
    alpha: float
    max_queries: int

    @property
    def seed(self) -> int:
        """Seed of weights and batches, and of the scheme's secret."""
        return int(self.settings["seed"])

    @property
    def images(self) -> AttackData:
        """All training images, for schemes that train in a loop of their own."""
        return AttackData.of(self.data, self.recipe, share=1.0)


def fresh_network(owner: Owner) -> nn.Module:
    """Return the configuration's network with weights that follow from the owner's seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(owner.seed)
        return build_network(owner.settings["model"])


class Scheme(Protocol):
    """A watermarking scheme.

    A secret follows from the owner's seed, so that a model that was trained before can be read again.
    """

    def train(self, owner: Owner) -> nn.Module:
        """Return a marked network that maps normalized inputs to logits, in evaluation mode."""

    def reader(self, owner: Owner) -> Reader:
        """Return what reads the mark of that owner's network."""
