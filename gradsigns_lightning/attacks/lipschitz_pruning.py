"""Pruning of the channels that can change most, without data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied, observed
from gradsigns_lightning.core.utils.checks import check_number

GENTLEST = 5.0  # standard deviations at which the curve begins
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@torch.no_grad()
def prune_lipschitz(
    model: nn.Module,
    data: AttackData,
    *,
    deviations: float = 3.0,
    observe: Observe | None = None,
) -> nn.Module:
    """Prune the channels with an outlying Lipschitz bound (CLP, Zheng et al., ECCV 2022), without any image.

    A channel's bound is the largest singular value of its kernel, as a matrix of input channels, times the
    scale of the batch normalization that follows. In each layer, channels above the mean by ``deviations``
    standard deviations are silenced.

    Args:
        model: the stolen model, with batch normalizations after its convolutions.
        data: what the thief has, of which nothing is used.
        deviations: standard deviations above the mean; the authors' ``u``, 3 for CIFAR-10.
        observe: is shown the model at 5 deviations, 4.5, ... and ``deviations``, each time that more channels
            are pruned; the dose is the share of them.

    Returns:
        The pruned copy.

    Raises:
        ValueError: a setting is out of range, or the model has no convolution before a batch normalization.
    """
    check_number("deviations", deviations)
    attacked, last = copied(model), -1.0
    pairs = _normalized_convolutions(attacked)
    bounds = [_bounds(convolution, norm) for convolution, norm in pairs]
    n_channels = sum(len(bound) for bound in bounds)
    steps = [] if observe is None else [GENTLEST - 0.5 * i for i in range(int(2 * (GENTLEST - deviations)))]
    for limit in [*steps, deviations]:
        outlying = [bound > bound.mean() + limit * bound.std() for bound in bounds]
        for (_, norm), out in zip(pairs, outlying, strict=True):
            norm.weight[out], norm.bias[out] = 0, 0
        dose = sum(int(out.sum()) for out in outlying) / n_channels
        if dose > last:
            with torch.enable_grad():
                observed(observe, dose, attacked)
            last = dose
    return attacked


@dataclass(frozen=True)
class LipschitzPruning(Attack):
    """Channel Lipschitz pruning; see :func:`prune_lipschitz`."""

    function = staticmethod(prune_lipschitz)

    deviations: float = 3.0


def _normalized_convolutions(model: nn.Module) -> list[tuple[Convolution, BatchNorm]]:
    """Return each convolution with the batch normalization that is registered after it."""
    layers = [m for m in model.modules() if isinstance(m, Convolution | BatchNorm)]
    pairs: list[tuple[Convolution, BatchNorm]] = [
        (first, second)
        for first, second in pairwise(layers)
        if isinstance(first, Convolution)
        and isinstance(second, BatchNorm)
        and second.affine
        and second.num_features == first.out_channels
    ]
    if not pairs:
        raise ValueError(
            "`model` must have a batch normalization with scales after a convolution; found none in "
            f"{type(model).__name__}."
        )
    return pairs


def _bounds(convolution: Convolution, norm: BatchNorm) -> Tensor:
    """Return a bound for each channel, shape ``(n_channels,)``."""
    variance = torch.ones_like(norm.weight) if norm.running_var is None else norm.running_var
    norms: Tensor = torch.linalg.matrix_norm(convolution.weight.flatten(2), ord=2)
    return norms * (norm.weight / (variance + norm.eps).sqrt()).abs()
