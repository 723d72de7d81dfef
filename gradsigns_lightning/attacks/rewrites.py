"""Rewrites of the channels that leave the network's function as it is: other weights, the same logits.

They erase most marks that are read from weights or activations. A mark in the function's input gradient must
not notice any of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied, observed
from gradsigns_lightning.attacks.channels import (
    NORMS,
    ChannelGroup,
    channel_groups,
    check_preserved,
    is_depthwise,
    per_channel,
    put,
)
from gradsigns_lightning.core.utils.checks import check_choice, check_number

VARIANTS = ("clique", "split")


def permute_neurons(
    model: nn.Module, data: AttackData, *, seed: int = 0, observe: Observe | None = None
) -> nn.Module:
    """Reorder the hidden channels of all layers at random (Lukas et al., IEEE S&P 2022: feature shuffling).

    Channels that residual connections tie are reordered together. The invariant neuron transforms of Yan et
    al. (arXiv 2205.00199, 2022) begin with it. The Watermark-Robustness-Toolbox reorders activations as they
    are read instead of weights, which is the same to a reader.

    Args:
        model: the stolen model, which torch.fx must be able to trace.
        data: what the thief has.
        seed: of the permutations.
        observe: is shown the model, at dose 1.

    Raises:
        ValueError: the model cannot be traced, or none of its channels can be reordered.
    """
    attacked, random = copied(model), torch.Generator().manual_seed(seed)
    for group in _groups(attacked):
        order = torch.randperm(group.n_channels, generator=random)
        for module in (*group.makers, *group.norms):
            for name, value in per_channel(module).items():
                put(module, name, value.detach()[order.to(value.device)])
        for module in group.readers:
            columns = _columns(module, group.n_channels)
            _put_columns(module, columns[:, order.to(columns.device)])
    return _done(model, attacked, data, observe, 1)


@dataclass(frozen=True)
class NeuronPermutation(Attack):
    """Reordered channels; see :func:`permute_neurons`."""

    function = staticmethod(permute_neurons)

    seed: int = 0


def rescale_neurons(
    model: nn.Module,
    data: AttackData,
    *,
    spread: float = 10.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Multiply channels by factors that the next layer takes back (Yan et al., arXiv 2205.00199, 2022).

    ReLU keeps positive factors; batch normalization absorbs any of its inputs' in its statistics and weights,
    so these change their sign at random as well: the paper's scaling and sign flipping.

    Args:
        model: the stolen model, which torch.fx must be able to trace.
        data: what the thief has.
        spread: the factors' logarithms are uniform between those of ``1 / spread`` and ``spread``, >= 1; the
            default is this project's.
        seed: of the factors.
        observe: is shown the model; the dose is ``spread``.

    Raises:
        ValueError: ``spread`` is below 1, the model cannot be traced, or has no layers joined by ReLU.
    """
    check_number("spread", spread, minimum=1)
    attacked, random = copied(model), torch.Generator().manual_seed(seed)
    for group in _groups(attacked, homogeneous=True):
        exponents = 2 * torch.rand(group.n_channels, generator=random, dtype=torch.float64) - 1
        factors = (exponents * math.log(spread)).exp()
        if group.is_linear:
            factors *= 2 * torch.randint(2, (group.n_channels,), generator=random) - 1
        for module in group.makers:
            for name in per_channel(module).keys() & {"weight", "bias"}:
                _scale(module, name, factors)
        for module in group.readers:
            _divide_inputs(module, factors)
    return _done(model, attacked, data, observe, spread)


@dataclass(frozen=True)
class NeuronRescaling(Attack):
    """Rescaled channels; see :func:`rescale_neurons`."""

    function = staticmethod(rescale_neurons)

    spread: float = 10.0
    seed: int = 0


def add_dummy_neurons(
    model: nn.Module,
    data: AttackData,
    *,
    variant: str = "clique",
    share: float = 0.25,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Add hidden channels that change nothing: structural obfuscation (Yan et al., USENIX Security 2023).

    The layers have other shapes than the owner's afterwards: every group of channels grows by ``share``.

    Args:
        model: the stolen model, which torch.fx must be able to trace.
        data: what the thief has.
        variant: ``"clique"`` adds pairs of equal random channels whose outgoing weights cancel; ``"split"``
            adds copies of channels, and divides the original's outgoing weights between both at random.
            Random weights are drawn from those that are there, so that they do not stand out.
        share: channels that are added, as a share of those that are there, above 0 and at most 1.
        seed: of the new weights.
        observe: is shown the model; the dose is ``share``.

    Raises:
        ValueError: a setting is out of range, the model cannot be traced, or has no channels to add to.
    """
    check_choice("variant", variant, VARIANTS)
    if not check_number("share", share, minimum=0, maximum=1):
        raise ValueError("`share` must be > 0, got 0.")
    attacked, random = copied(model), torch.Generator().manual_seed(seed)
    for group in _groups(attacked):
        if any(isinstance(module, nn.LayerNorm) for module in group.norms):
            continue  # its mean would follow the new channels
        if variant == "clique":
            _add_cliques(group, max(1, round(share * group.n_channels / 2)), random)
        else:
            _split(group, max(1, round(share * group.n_channels)), random)
    return _done(model, attacked, data, observe, share)


@dataclass(frozen=True)
class DummyNeurons(Attack):
    """Channels without effect; see :func:`add_dummy_neurons`."""

    function = staticmethod(add_dummy_neurons)

    variant: str = "clique"
    share: float = 0.25
    seed: int = 0


def _groups(model: nn.Module, *, homogeneous: bool = False) -> list[ChannelGroup]:
    if groups := channel_groups(model, homogeneous=homogeneous):
        return groups
    joined = "ReLU" if homogeneous else "operations on each channel by itself"
    raise ValueError(
        f"`model` must have convolutions or linear layers joined by {joined}, got {type(model).__name__}."
    )


def _done(
    model: nn.Module, attacked: nn.Module, data: AttackData, observe: Observe | None, dose: float
) -> nn.Module:
    check_preserved(model, attacked, data)
    observed(observe, dose, attacked)
    return attacked


def _columns(module: nn.Module, n_channels: int) -> Tensor:
    """Return a layer's weight with its input channels on axis 1, whatever each has of it on axis 2."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.reshape(len(weight), n_channels, -1)


def _put_columns(module: nn.Module, columns: Tensor) -> None:
    """Set a layer's weight from its input channels' columns, of which there may be more than before."""
    kernel: tuple[int, ...] = module.weight.shape[2:]  # type: ignore[assignment,index]
    put(module, "weight", columns.reshape(len(columns), -1, *kernel))


def _scale(module: nn.Module, name: str, factors: Tensor) -> None:
    value = per_channel(module)[name].detach()
    shape = (-1, *[1] * (value.ndim - 1))
    put(module, name, value.double() * factors.to(value.device).view(shape))


def _divide_inputs(module: nn.Module, factors: Tensor) -> None:
    if isinstance(module, NORMS):
        _scale(module, "running_mean", factors)
    if isinstance(module, NORMS) or is_depthwise(module):
        _scale(module, "weight", 1 / factors)
    else:
        columns = _columns(module, len(factors))
        _put_columns(module, columns.double() / factors.to(columns.device)[:, None])


def _add_cliques(group: ChannelGroup, n_pairs: int, random: torch.Generator) -> None:
    for module in (*group.makers, *group.norms):
        for name, value in per_channel(module).items():
            rows = _drawn(value, (n_pairs, *value.shape[1:]), random)
            put(module, name, torch.cat([value.detach(), rows, rows]))
    for module in group.readers:
        columns = _columns(module, group.n_channels)
        new = _drawn(columns, (len(columns), n_pairs, columns.shape[2]), random)
        _put_columns(module, torch.cat([columns, new, -new], 1))
    _resize(group, group.n_channels + 2 * n_pairs)


def _split(group: ChannelGroup, n_new: int, random: torch.Generator) -> None:
    chosen = torch.randperm(group.n_channels, generator=random)[:n_new]
    for module in (*group.makers, *group.norms):
        for name, value in per_channel(module).items():
            put(module, name, torch.cat([value.detach(), value.detach()[chosen.to(value.device)]]))
    for module in group.readers:
        columns = _columns(module, group.n_channels).clone()
        source = columns[:, chosen].clone()
        part = torch.rand(source.shape, generator=random).to(source) * source
        columns[:, chosen] = source - part
        _put_columns(module, torch.cat([columns, part], 1))
    _resize(group, group.n_channels + n_new)


def _drawn(values: Tensor, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    chosen = torch.randint(values.numel(), shape, generator=random)
    return values.detach().flatten()[chosen.to(values.device)]


def _resize(group: ChannelGroup, n_channels: int) -> None:
    """Let the layers' attributes say how many channels there are."""
    for module in (*group.makers, *group.norms):
        for name in ("out_channels", "out_features", "num_features"):
            if hasattr(module, name):
                setattr(module, name, n_channels)
        if module in group.norms and isinstance(module, nn.Conv2d):
            module.in_channels = module.groups = n_channels
    for module in group.readers:
        if isinstance(module, nn.Conv2d):
            module.in_channels = n_channels
        else:
            module.in_features = module.weight.shape[1]  # type: ignore[assignment,index]
