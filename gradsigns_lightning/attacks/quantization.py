"""Quantization attacks: weights are rounded to few levels."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied, observed
from gradsigns_lightning.attacks.recovery import recover, weights_of
from gradsigns_lightning.core.utils.checks import check_choice, check_int
from gradsigns_lightning.core.utils.optional import require

SCALES, ACTIVATIONS, MOST_BITS = ("tensor", "channel"), ("float", "int8"), 8


def quantize(
    model: nn.Module,
    data: AttackData,
    *,
    bits: int = 5,
    scale: str = "tensor",
    epochs: int = 1,
    rate_factor: float = 1.0,
    labels: str = "predicted",
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Round the weights to evenly spaced levels between the smallest and the largest, then fine-tune.

    That is the Watermark-Robustness-Toolbox's quantization (Lukas et al., IEEE S&P 2022), whose fine-tuned
    weights are off the levels again; without epochs they stay on them. It rounds biases and normalizations
    as well, which stay here, as in networks that are deployed.

    Args:
        model: the stolen model.
        data: what the thief has.
        bits: the levels are ``2 ** bits``, 2 to 8 bits.
        scale: ``"tensor"`` spaces the levels by all weights of a layer, ``"channel"`` by those of an output.
        epochs: epochs of fine-tuning at each number of bits, >= 0.
        rate_factor: its learning rate, in units of the one of a training from scratch, >= 0.
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says.
        seed: of the batches.
        observe: is shown the model at 8 bits, 7, ... and ``bits``; the dose is 9 less the bits.

    Returns:
        The quantized copy.

    Raises:
        ValueError: a setting is out of range, or the model has no weights.
    """
    check_int("bits", bits, minimum=2, maximum=MOST_BITS)
    check_choice("scale", scale, SCALES)
    for n_bits in [bits] if observe is None else range(MOST_BITS, bits - 1, -1):
        attacked = copied(model)
        with torch.no_grad():
            for module, name in weights_of(attacked):
                weight = getattr(module, name)
                weight.copy_(_rounded(weight, n_bits, scale))
        recover(attacked, model, data, epochs=epochs, rate_factor=rate_factor, labels=labels, seed=seed)
        observed(observe, MOST_BITS + 1 - n_bits, attacked)
    return attacked


@dataclass(frozen=True)
class Quantization(Attack):
    """Uniform quantization of weights; see :func:`quantize`."""

    function = staticmethod(quantize)

    bits: int = 5
    scale: str = "tensor"
    epochs: int = 1
    rate_factor: float = 1.0
    labels: str = "predicted"
    seed: int = 0


def quantize_int8(
    model: nn.Module,
    data: AttackData,
    *,
    activations: str = "int8",
    observe: Observe | None = None,
) -> nn.Module:
    """Convert linear layers to int8 by torchao, as for deployment, and round the kernels of convolutions.

    torchao has int8 kernels for linear layers only: per output for weights, per row for activations. The
    kernels of convolutions are rounded to 8 bits per output channel, and are computed in floats. Rounded
    activations have no gradient; who differentiates the copy gets the one of the layer with rounded weights.

    Args:
        model: the stolen model.
        data: what the thief has, of which nothing is used.
        activations: ``"int8"``, or ``"float"`` to quantize weights alone.
        observe: is shown the quantized model at dose 1.

    Returns:
        The quantized copy, which cannot be trained.

    Raises:
        ValueError: a setting is out of range, or the model has no weights.
        ImportError: torchao is not installed.
    """
    check_choice("activations", activations, ACTIVATIONS)
    library = require("torchao.quantization", extra="attacks")
    attacked = copied(model)
    # Attention reads the weights of its own kind of linear layer, for which torchao has nothing.
    linear = [(path, layer) for path, layer in attacked.named_modules() if type(layer) is nn.Linear]
    with torch.no_grad():
        for module, name in weights_of(attacked):
            if type(module) is not nn.Linear:
                weight = getattr(module, name)
                weight.copy_(_rounded(weight, MOST_BITS, "channel"))
    for path, layer in linear:
        integer = nn.Sequential(copy.deepcopy(layer))
        library.quantize_(nn.Sequential(layer), library.Int8WeightOnlyConfig(set_inductor_config=False))
        if activations == "int8":
            library.quantize_(
                integer, library.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
            )
            attacked.set_submodule(path, IntegerLinear(integer[0], layer))
    observed(observe, 1, attacked)
    return attacked.eval()


@dataclass(frozen=True)
class Int8(Attack):
    """Conversion to int8; see :func:`quantize_int8`."""

    function = staticmethod(quantize_int8)

    activations: str = "int8"


class IntegerLinear(nn.Module):
    """A linear layer on integers, with the input gradient of one on floats.

    Args:
        integer: computes the outputs.
        differentiable: has the gradient.
    """

    def __init__(self, integer: nn.Module, differentiable: nn.Module) -> None:
        super().__init__()
        self.integer, self.differentiable = integer, differentiable

    @property
    def weight(self) -> Tensor:
        """The rounded weights, for those who look at them before they call the layer, as transformers do."""
        return self.differentiable.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias, likewise."""
        return self.differentiable.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of ``integer``."""
        with torch.no_grad():
            outputs = self.integer(x)
        if not torch.is_grad_enabled():
            return outputs  # type: ignore[no-any-return]
        smooth = self.differentiable(x)
        return outputs + (smooth - smooth.detach())  # type: ignore[no-any-return]


def _rounded(weight: Tensor, bits: int, scale: str) -> Tensor:
    """Return the nearest of ``2 ** bits`` levels for each weight."""
    rows = weight.reshape(1, -1) if scale == "tensor" else weight.flatten(1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    width = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(weight.dtype).tiny)
    levels: Tensor = low + ((rows - low) / width).round() * width
    return levels.reshape(weight.shape)
