"""Fine-tuning attacks: the thief goes on with the training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from gradsigns_lightning.attacks.base import (
    Attack,
    AttackData,
    Observe,
    copied,
    last_layer,
    predictions,
    seeded,
)
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.core.utils.checks import check_choice, check_number

LAYERS, HEADS, LABELS = ("all", "last"), ("kept", "new"), ("true", "predicted")


def fine_tune(
    model: nn.Module,
    data: AttackData,
    *,
    layers: str = "all",
    head: str = "kept",
    labels: str = "true",
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Go on with the training: FTAL, FTLL, RTAL and RTLL (Adi et al., USENIX Security 2018).

    Args:
        model: the stolen model.
        data: what the thief has.
        layers: ``"all"``, or ``"last"`` for the head alone, while the rest stays in evaluation mode.
        head: ``"kept"``, or ``"new"`` for one with random weights.
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says.
        epochs: epochs, >= 1; the Watermark-Robustness-Toolbox takes 5, and 10 for RTLL.
        rate_factor: learning rate, in units of the one of a training from scratch, > 0.
        seed: of batches and of a new head.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_choice("layers", layers, LAYERS)
    check_choice("head", head, HEADS)
    check_choice("labels", labels, LABELS)
    recipe = replace(
        data.recipe,
        epochs=epochs,
        rate=data.recipe.rate * check_number("rate_factor", rate_factor, minimum=0),
    )
    attacked = copied(model)
    taught = data.relabelled(predictions(model, data).argmax(1)) if labels == "predicted" else data
    if head == "new":
        with seeded(seed, attacked):
            last_layer(attacked).reset_parameters()
    only_head = layers == "last"
    return train(
        attacked,
        taught,
        recipe,
        parameters=last_layer(attacked).parameters() if only_head else None,
        frozen=[attacked] if only_head else (),
        observe=observe,
        seed=seed,
    )


@dataclass(frozen=True)
class FineTuning(Attack):
    """Fine-tuning; see :func:`fine_tune`."""

    function = staticmethod(fine_tune)

    layers: str = "all"
    head: str = "kept"
    labels: str = "true"
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0
