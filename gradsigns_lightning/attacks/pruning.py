"""Pruning attacks: weights, channels or features are taken away, and what remains is trained on."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import L1Unstructured, global_unstructured

from gradsigns_lightning.attacks.base import (
    Attack,
    AttackData,
    Observe,
    copied,
    device_of,
    last_layer,
    observed,
)
from gradsigns_lightning.attacks.recovery import recover, up_to, weights_of
from gradsigns_lightning.core.utils.checks import check_choice, check_number
from gradsigns_lightning.core.utils.optional import require

SCOPES = ("global", "layer")


def prune(
    model: nn.Module,
    data: AttackData,
    *,
    share: float = 0.5,
    scope: str = "layer",
    step: float = 0.1,
    epochs: int = 0,
    rate_factor: float = 1.0,
    labels: str = "true",
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Set the smallest weights to zero, then fine-tune the rest (Han et al., NIPS 2015).

    The Watermark-Robustness-Toolbox prunes half of each layer and does not fine-tune; it prunes biases as
    well, which stay here. The authors of GradSigns prune 0 to 90 % of all weights in steps of 10 %, each from
    the stolen model, and then train up to 10 epochs, fewer if the loss no longer falls; here it is a fixed
    number. Weights that are zero stay zero.

    Args:
        model: the stolen model.
        data: what the thief has.
        share: share of the weights that become zero, in [0, 1].
        scope: ``"global"`` compares the weights of all layers, ``"layer"`` prunes the same share of each.
        step: distance of the shares at which ``observe`` is shown a model, in [0.01, 1].
        epochs: epochs of fine-tuning at each share, >= 0.
        rate_factor: its learning rate, in units of the one of a training from scratch, >= 0.
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says.
        seed: of the batches.
        observe: is shown the model at each share.

    Returns:
        The pruned copy.

    Raises:
        ValueError: a setting is out of range, or the model has no weights.
    """
    share = check_number("share", share, minimum=0, maximum=1)
    check_choice("scope", scope, SCOPES)
    check_number("step", step, minimum=0.01, maximum=1)
    for dose in [share] if observe is None else up_to(share, step):
        attacked = copied(model)
        masks = _masks_of_largest(attacked, dose, scope)
        _apply(masks)
        recover(
            attacked,
            model,
            data,
            epochs=epochs,
            rate_factor=rate_factor,
            labels=labels,
            seed=seed,
            after_step=lambda _, masks=masks: _apply(masks),  # type: ignore[misc]
        )
        observed(observe, dose, attacked)
    return attacked


@dataclass(frozen=True)
class Pruning(Attack):
    """Magnitude pruning; see :func:`prune`."""

    function = staticmethod(prune)

    share: float = 0.5
    scope: str = "layer"
    step: float = 0.1
    epochs: int = 0
    rate_factor: float = 1.0
    labels: str = "true"
    seed: int = 0


def prune_channels(
    model: nn.Module,
    data: AttackData,
    *,
    share: float = 0.5,
    step: float = 0.5,
    epochs: int = 10,
    rate_factor: float = 1.0,
    labels: str = "true",
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Remove the smallest channels of each layer, with all that depends on them (Fang et al., CVPR 2023).

    The library torch-pruning finds which channels go together across shortcuts and normalizations, and takes
    away those whose weights have the smallest norm. The copy has narrower layers than the stolen model.

    Args:
        model: the stolen model; attention blocks that divide by a fixed number of heads are refused.
        data: what the thief has.
        share: share of the channels of each layer that go, in [0, 0.99]; the outputs stay.
        step: distance of the shares at which ``observe`` is shown a model, in [0.01, 1].
        epochs: epochs of fine-tuning at each share, >= 0.
        rate_factor: its learning rate, in units of the one of a training from scratch, >= 0.
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says.
        seed: of the batches.
        observe: is shown the model at each share.

    Returns:
        The pruned copy.

    Raises:
        ValueError: a setting is out of range, or the model's channels cannot be removed.
        ImportError: torch-pruning is not installed.
    """
    share = check_number("share", share, minimum=0, maximum=0.99)
    check_number("step", step, minimum=0.01, maximum=1)
    image = data.clean[0][0][None].to(device_of(model))
    for dose in [share] if observe is None else up_to(share, step):
        attacked = copied(model)
        _remove_channels(attacked, image, dose)
        recover(attacked, model, data, epochs=epochs, rate_factor=rate_factor, labels=labels, seed=seed)
        observed(observe, dose, attacked)
    return attacked


@dataclass(frozen=True)
class ChannelPruning(Attack):
    """Structured pruning of channels; see :func:`prune_channels`."""

    function = staticmethod(prune_channels)

    share: float = 0.5
    step: float = 0.5
    epochs: int = 10
    rate_factor: float = 1.0
    labels: str = "true"
    seed: int = 0


def _masks_of_largest(model: nn.Module, share: float, scope: str) -> list[tuple[Tensor, Tensor]]:
    """Return each weight with the mask, 0 or 1, of those that remain when the smallest go."""
    # On a copy: the library hangs hooks on layers, and attention reads its weights without a call of them.
    twin = weights_of(copy.deepcopy(model))
    for compared in [twin] if scope == "global" else [[weight] for weight in twin]:
        global_unstructured(compared, L1Unstructured, amount=share)
    return [
        (getattr(module, name), getattr(pruned, f"{name}_mask"))
        for (module, name), (pruned, _) in zip(weights_of(model), twin, strict=True)
    ]


@torch.no_grad()
def _apply(masks: list[tuple[Tensor, Tensor]]) -> None:
    for weight, mask in masks:
        weight.mul_(mask)


def _remove_channels(model: nn.Module, image: Tensor, share: float) -> None:
    """Remove this share of the channels of each layer but the last."""
    library = require("torch_pruning", extra="attacks")
    try:
        library.pruner.MagnitudePruner(
            model,
            image,
            importance=library.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            ignored_layers=[last_layer(model)],
        ).step()
        with torch.no_grad():
            model(image)
    except RuntimeError as error:
        raise ValueError(
            f"`model` must be a network whose channels torch-pruning can remove, got {type(model).__name__}: "
            f"{error}"
        ) from error
