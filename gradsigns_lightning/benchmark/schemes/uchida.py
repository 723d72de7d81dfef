"""Bits in the weights of one layer (Uchida et al., ICMR 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.training import cross_entropy, train
from gradsigns_lightning.benchmark.measuring import Reader, weighted_agreement
from gradsigns_lightning.benchmark.records import Reading, bits_reading
from gradsigns_lightning.benchmark.schemes.base import Owner, fresh_network
from gradsigns_lightning.core.result import verdict_of
from gradsigns_lightning.core.utils.checks import check_int, check_number


@dataclass(frozen=True)
class Uchida:
    """Trains with a binary cross-entropy on projections of a layer's mean filter (sections 3.2 and 3.3).

    The paper has no decision rule; here the p-value of the matching bits, which are uniform and fixed
    beforehand, is held against alpha.

    Attributes:
        n_bits: bits, at most the fan-in of the layer that carries them; the paper's 256.
        strength: weight of the embedding loss, the paper's 0.01.

    Raises:
        ValueError: a setting is out of range, or no layer is large enough.
    """

    n_bits: int = 256
    strength: float = 0.01

    def __post_init__(self) -> None:
        check_int("n_bits", self.n_bits, minimum=1)
        check_number("strength", self.strength, minimum=0)

    def train(self, owner: Owner) -> nn.Module:
        """Return a network whose weights carry the bits."""
        network = fresh_network(owner)
        secret = _Secret(self.n_bits, owner.seed, network)
        task = cross_entropy(owner.recipe.label_smoothing)

        def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            projections = secret.project(dict(model.named_parameters())[secret.layer])
            return task(model, x, y) + self.strength * F.binary_cross_entropy_with_logits(
                projections, secret.bits.to(projections)
            )

        return train(network, owner.images, owner.recipe, loss=loss, seed=owner.seed)

    def reader(self, owner: Owner) -> Reader:
        """Return what reads the bits; no API shows them."""
        return _Reader(_Secret(self.n_bits, owner.seed, fresh_network(owner)), owner.alpha)


class _Secret:
    """Bits and projection; they follow from the seed and the layer's size."""

    def __init__(self, n_bits: int, seed: int, model: nn.Module) -> None:
        self.layer = carrier_layer(model)
        fan_in = dict(model.named_parameters())[self.layer][0].numel()
        if fan_in < n_bits:
            raise ValueError(
                f"`n_bits` must be at most {fan_in}, the largest fan-in of a layer, got {n_bits}."
            )
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(n_bits, fan_in, generator=generator)
        self.bits = torch.randint(0, 2, (n_bits,), generator=generator)

    def fits(self, weight: Tensor) -> bool:
        """Tell whether a weight has the layer's fan-in."""
        return weight.ndim > 1 and weight.numel() == len(weight) * self.matrix.shape[1] > 0

    def project(self, weight: Tensor) -> Tensor:
        """Return the projections of a weight's mean filter over its outputs, shape ``(n_bits,)``."""
        mean = weight.flatten(1).mean(0)
        return self.matrix.to(mean) @ mean


@dataclass(frozen=True)
class _Reader:
    secret: _Secret
    alpha: float

    @torch.no_grad()
    def read_weights(self, model: nn.Module) -> Reading:
        """Read the bits from the layer of that name, else from the weight of its fan-in that shows most.

        Another file format may have changed the names; the choice among several is paid for in the p-value.
        """
        weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        fitting = {name: value for name, value in weights.items() if self.secret.fits(value)}
        if self.secret.layer in fitting:
            fitting = {self.secret.layer: fitting[self.secret.layer]}
        if not fitting:
            return self.read_responses(model)
        readings = [self._read(value) for value in fitting.values()]
        best = min(readings, key=lambda reading: (math.isnan(reading.log10_p_value), reading.log10_p_value))
        if math.isnan(best.log10_p_value):
            return best
        log10_p = min(0.0, best.log10_p_value + math.log10(len(readings)))
        return replace(best, log10_p_value=log10_p, verdict=verdict_of(10**log10_p, self.alpha))

    def _read(self, weight: Tensor) -> Reading:
        signed = (2 * self.secret.bits - 1) * self.secret.project(weight).double().cpu()
        return bits_reading(signed, n_queries=0, alpha=self.alpha, w=weighted_agreement(signed))

    def read_responses(self, model: nn.Module) -> Reading:
        """Return that nothing can be read, as the scheme needs the weights."""
        nothing = torch.zeros(len(self.secret.bits))
        return bits_reading(nothing, n_queries=0, alpha=self.alpha, w=math.nan)


def carrier_layer(model: nn.Module) -> str:
    """Return the name of the weight with the largest fan-in but for the head's, the earliest of equals."""
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ][:-1]
    if not layers:
        raise ValueError("`model` must have a convolution or a linear layer before its head, got none.")
    name, _ = max(layers, key=lambda named: named[1].weight[0].numel())
    return f"{name}.weight"
