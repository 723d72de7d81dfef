"""Bits in the feature attribution of trigger samples (EaaW: Shao et al., NDSS 2025)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradsigns_lightning.attacks.base import device_of
from gradsigns_lightning.attacks.training import cross_entropy, train
from gradsigns_lightning.benchmark.measuring import Reader, weighted_agreement
from gradsigns_lightning.benchmark.records import Reading, bits_reading
from gradsigns_lightning.benchmark.schemes.base import Owner, fresh_network
from gradsigns_lightning.core.result import signed_by
from gradsigns_lightning.core.utils.checks import check_int, check_number
from gradsigns_lightning.verification.api.responses import ResponseParser


@dataclass(frozen=True)
class Eaaw:
    """Trains as usual, then fine-tunes until masking blocks of trigger samples tells the bits.

    A bit is the sign of a block's weight in a ridge regression of the model's metric on which blocks of the
    trigger are kept; each masked copy lacks one block (LIME with one-block masks). The settings are those of
    the released code (shaoshuo-ss/EaaW, ``scripts/embed.sh``), but for what follows.

    - ``rate`` is 1e-6 there, for some 12,000 steps. At this project's sizes that does not embed: on digits
      (``mlp``, 540 steps) it leaves 33 of 64 bits, which is chance. 1e-4 gives 61, 1e-3 63 or 64 in three
      seeds; on Fashion-MNIST (``small_resnet``) 1e-3 gives 64 within 140 steps.
    - The rate falls with a cosine instead of by ten every tenth epoch.
    - The metric is the label's log-odds instead of its logit, so that probabilities tell the same as logits;
      for an API that gives labels alone it is 1 or 0, as there.
    - Triggers are noise with labels in turn, the README's example; uniform instead of normal, whose pixels an
      API would clip: half of them would be black, and a black block that is masked tells nothing.
    - ``n_bits`` is 256 there by default; 64 fits images of 8 x 8.

    A mark is proven by the p-value of the matching bits, which are uniform and fixed beforehand; the paper's
    own test, Pearson's chi-square of independence, stands beside it as ``own_p_value``.

    Attributes:
        n_bits: bits, one for each block of the image; a square number.
        n_triggers: trigger samples, over which the metric is averaged.
        rate: learning rate of the fine-tuning.
        epochs: of the fine-tuning.
        strength: weight of the embedding loss.
        margin: of the hinge.
        ridge: penalty of the regression.
        weight_decay: of the fine-tuning.

    Raises:
        ValueError: a setting is out of range, or the images have too few pixels for the blocks.
    """

    n_bits: int = 64
    n_triggers: int = 1
    rate: float = 1e-3
    epochs: int = 30
    strength: float = 1.0
    margin: float = 0.01
    ridge: float = 1e-3
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        check_int("n_bits", self.n_bits, minimum=4)
        if math.isqrt(self.n_bits) ** 2 != self.n_bits:
            raise ValueError(f"`n_bits` must be a square number, got {self.n_bits}.")
        check_int("n_triggers", self.n_triggers, minimum=1)
        check_int("epochs", self.epochs, minimum=1)
        for name in ("rate", "strength", "margin", "ridge", "weight_decay"):
            check_number(name, getattr(self, name), minimum=0)

    def train(self, owner: Owner) -> nn.Module:
        """Return a network whose attributions carry the bits."""
        secret = _Secret(self, owner)
        network = train(fresh_network(owner), owner.images, owner.recipe, seed=owner.seed)
        recipe = replace(
            owner.recipe,
            rate=self.rate,
            epochs=self.epochs,
            weight_decay=self.weight_decay,
            optimizer="sgd",
            schedule="cosine",
        )
        task = cross_entropy(recipe.label_smoothing)

        def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            whole, labels = secret.triggers.to(x), secret.labels.to(y)
            signed = signed_by(secret.attribution(model), secret.bits.to(x.device))
            hinge = (self.margin - signed).relu().sum()
            return task(model, torch.cat([x, whole]), torch.cat([y, labels])) + self.strength * hinge

        norms = [module for module in network.modules() if isinstance(module, (_BatchNorm, nn.LayerNorm))]
        return train(network, owner.images, recipe, loss=loss, frozen=norms, seed=owner.seed)

    def reader(self, owner: Owner) -> Reader:
        """Return what queries with the masked triggers."""
        return _Reader(_Secret(self, owner), owner.alpha)


class _Secret:
    """Trigger samples, their masked copies and the bits; they follow from the seed and the image size."""

    def __init__(self, scheme: Eaaw, owner: Owner) -> None:
        shape, n = owner.data.input_shape, scheme.n_bits
        masks = block_masks(n, shape[1:])
        generator = torch.Generator().manual_seed(owner.seed)
        pixels = torch.rand(scheme.n_triggers, *shape, generator=generator)
        self.bits = torch.randint(0, 2, (n,), generator=generator)
        self.labels = torch.arange(scheme.n_triggers) % owner.data.n_classes
        normalized = owner.images.normalized
        self.triggers = normalized(pixels)
        self.masked = [normalized(one * masks[:, None]) for one in pixels]
        self.operator = ridge_operator(n, scheme.ridge)

    def attribution(self, model: nn.Module) -> Tensor:
        """Return the attribution of a network that gives logits, shape ``(n_bits,)``."""
        answers = model(torch.cat(self.masked).to(device_of(model))).chunk(len(self.masked))
        odds = [_log_odds(answer, int(label)) for answer, label in zip(answers, self.labels, strict=True)]
        mean = torch.stack(odds).mean(0)
        return self.operator.to(mean) @ mean

    def told(self, model: nn.Module) -> Tensor:
        """Return the attribution from whatever a model answers, float64 on the CPU."""
        mean = torch.from_numpy(np.mean(list(self._odds(model)), axis=0))
        return self.operator @ mean

    @torch.no_grad()
    def _odds(self, model: nn.Module) -> Iterator[npt.NDArray[np.float64]]:
        for images, label in zip(self.masked, self.labels, strict=True):
            parser = ResponseParser(int(label))
            yield parser.log_odds(parser.array(model(images.to(device_of(model))), len(images)))


@dataclass(frozen=True)
class _Reader:
    secret: _Secret
    alpha: float

    def read_weights(self, model: nn.Module) -> Reading:
        """Query the network; the scheme needs no weights."""
        return self.read_responses(model)

    def read_responses(self, model: nn.Module) -> Reading:
        """Read the bits from logits, probabilities or, if little, labels."""
        told, bits = self.secret.told(model), self.secret.bits
        signed = signed_by(told, bits)
        n_queries = len(bits) * len(self.secret.masked)
        found = bits_reading(signed, n_queries=n_queries, alpha=self.alpha, w=weighted_agreement(signed))
        return replace(found, own_p_value=independence_p_value(told > 0, bits > 0))


def block_masks(n_blocks: int, size: tuple[int, int]) -> Tensor:
    """Return masks ``(n_blocks, height, width)``, each zero in one block of a square grid and one elsewhere.

    Raises:
        ValueError: the grid has more rows than the image.
    """
    side = math.isqrt(n_blocks)
    if side > min(size):
        raise ValueError(f"`n_bits` must be at most {min(size) ** 2} for these images, got {n_blocks}.")
    rows, columns = (torch.arange(length) * side // length for length in size)
    block = rows[:, None] * side + columns
    return (block != torch.arange(n_blocks)[:, None, None]).float()


def ridge_operator(n_blocks: int, ridge: float) -> Tensor:
    """Return the matrix that maps a metric of the masked images to each block's weight, in float64."""
    kept = 1 - torch.eye(n_blocks, dtype=torch.float64)
    penalty = ridge * torch.eye(n_blocks, dtype=torch.float64)
    operator: Tensor = torch.linalg.solve(kept.T @ kept + penalty, kept.T)
    return operator


def independence_p_value(read: Tensor, bits: Tensor) -> float:
    """Return the p-value of Pearson's chi-square test, with Yates' correction, that bits are independent.

    Args:
        read: bits that were read, bool, shape ``(n,)``.
        bits: the owner's, likewise.

    Returns:
        The p-value; NaN where one of the two is constant, as there is no test then.
    """
    n = len(bits)
    a, b, c, d = (int((one & other).sum()) for one in (read, ~read) for other in (bits, ~bits))
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if not margins:
        return math.nan
    statistic = n * max(0.0, abs(a * d - b * c) - n / 2) ** 2 / margins
    return math.erfc(math.sqrt(statistic / 2))


def _log_odds(logits: Tensor, label: int) -> Tensor:
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    return logits[:, label] - others.logsumexp(1)
