"""Fine-pruning: features that the thief's images do not use are taken away."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied, last_layer, predictions
from gradsigns_lightning.attacks.recovery import recover
from gradsigns_lightning.core.utils.checks import check_number


def fine_prune(
    model: nn.Module,
    data: AttackData,
    *,
    share: float = 0.96,
    epochs: int = 10,
    rate_factor: float = 1.0,
    labels: str = "predicted",
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Silence the features with the smallest mean activation, then fine-tune (Liu et al., RAID 2018).

    The features are what enters the last layer: the channels of the last stage, after activation and pooling,
    so that every network with a linear head has them. They are silenced by zeros in that layer's weights,
    which stay zero. The Watermark-Robustness-Toolbox masks single units of that stage, pixel by pixel.

    Args:
        model: the stolen model.
        data: what the thief has.
        share: share of the features that are silenced, in [0, 0.99].
        epochs: epochs of fine-tuning, >= 0.
        rate_factor: its learning rate, in units of the one of a training from scratch, >= 0.
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says, as in that toolbox.
        seed: of the batches.
        observe: is shown the pruned model at dose 0, and the model after each epoch.

    Returns:
        The attacked copy.

    Raises:
        ValueError: a setting is out of range, or the model has no linear layer.
    """
    check_number("share", share, minimum=0, maximum=0.99)
    attacked = copied(model)
    activations = _mean_activations(attacked, data)
    weight = last_layer(attacked).weight
    silenced = activations.argsort()[: int(share * len(activations))].to(weight.device)

    @torch.no_grad()
    def silence(_: int = 0) -> None:
        weight[:, silenced] = 0

    silence()
    return recover(
        attacked,
        model,
        data,
        epochs=epochs,
        rate_factor=rate_factor,
        labels=labels,
        seed=seed,
        after_step=silence,
        observe=observe,
    )


@dataclass(frozen=True)
class FinePruning(Attack):
    """Fine-pruning; see :func:`fine_prune`."""

    function = staticmethod(fine_prune)

    share: float = 0.96
    epochs: int = 10
    rate_factor: float = 1.0
    labels: str = "predicted"
    seed: int = 0


def _mean_activations(model: nn.Module, data: AttackData) -> Tensor:
    """Return the mean absolute value ``(n_features,)`` of each feature that enters the last layer."""
    sums: list[Tensor] = []

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums.append(inputs[0].abs().flatten(0, -2).sum(0, dtype=torch.float64).cpu())

    handle = last_layer(model).register_forward_pre_hook(add)
    try:
        predictions(model, data)
    finally:
        handle.remove()
    return torch.stack(sums).sum(0)
