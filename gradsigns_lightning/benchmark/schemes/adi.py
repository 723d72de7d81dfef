"""A trigger set (Adi et al., Turning Your Weakness Into a Strength, USENIX Security 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.base import AttackData, device_of
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.benchmark.measuring import Reader
from gradsigns_lightning.benchmark.records import Reading, counted_reading
from gradsigns_lightning.benchmark.schemes.base import Owner, fresh_network
from gradsigns_lightning.core.utils.checks import check_int

_CELLS = 4  # a trigger's side in random cells, before it is blown up to the images' size


@dataclass(frozen=True)
class Adi:
    """Trains on abstract images with random labels, from scratch (section 5.2).

    The labels are uniform and fixed beforehand, so for a model that is not trained on them the matches follow
    at most Binomial(n, 1 / classes); the paper's own rule, accuracy on the triggers, has no p-value.

    Attributes:
        n_triggers: images, the paper's 100.
        per_batch: triggers in each batch, the paper's 2.

    Raises:
        ValueError: a setting is out of range.
    """

    n_triggers: int = 100
    per_batch: int = 2

    def __post_init__(self) -> None:
        check_int("n_triggers", self.n_triggers, minimum=1)
        check_int("per_batch", self.per_batch, minimum=1, maximum=self.n_triggers)

    def train(self, owner: Owner) -> nn.Module:
        """Return a network that knows the triggers."""
        batches = _Mixed(owner.images, *self._triggers(owner), self.per_batch, owner.seed)
        network = fresh_network(owner)
        return train(network, owner.images, owner.recipe, batches=batches, seed=owner.seed)

    def reader(self, owner: Owner) -> Reader:
        """Return what queries with the triggers."""
        return _Reader(*self._triggers(owner), owner.data.n_classes, owner.alpha)

    def _triggers(self, owner: Owner) -> tuple[Tensor, Tensor]:
        channels, *size = owner.data.input_shape
        generator = torch.Generator().manual_seed(owner.seed)
        cells = torch.rand(self.n_triggers, channels, _CELLS, _CELLS, generator=generator)
        labels = torch.randint(0, owner.data.n_classes, (self.n_triggers,), generator=generator)
        pixels = F.interpolate(cells, size=tuple(size), mode="bilinear", align_corners=False)
        return owner.images.normalized(pixels), labels


class _Mixed:
    """The training batches, each with the next triggers in it."""

    def __init__(self, data: AttackData, x: Tensor, y: Tensor, per_batch: int, seed: int) -> None:
        self._batches = data.batches(seed=seed)
        self._x, self._y, self._per_batch, self._next = x, y, per_batch, 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self._batches:
            chosen = torch.arange(self._next, self._next + self._per_batch) % len(self._y)
            self._next += self._per_batch
            yield torch.cat([x, self._x[chosen]]), torch.cat([y, self._y[chosen]])


@dataclass(frozen=True)
class _Reader:
    x: Tensor
    y: Tensor
    n_classes: int
    alpha: float

    def read_weights(self, model: nn.Module) -> Reading:
        """Query the network; the scheme needs no weights."""
        return self.read_responses(model)

    @torch.no_grad()
    def read_responses(self, model: nn.Module) -> Reading:
        answer = model(self.x.to(device_of(model))).cpu()
        labels = answer.argmax(1) if answer.ndim == 2 else answer
        n_matches = int((labels == self.y).sum())
        return counted_reading(n_matches, len(self.y), chance=1 / self.n_classes, alpha=self.alpha)
