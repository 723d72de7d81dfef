"""Transfer to another task and back, in the hope that the mark gets lost on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.base import (
    Attack,
    AttackData,
    Observe,
    copied,
    device_of,
    fetch,
    last_layer,
    seeded,
)
from gradsigns_lightning.attacks.fine_tuning import with_labels
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.core.utils.checks import check_int


def transfer_to_rotations(
    model: nn.Module,
    data: AttackData,
    *,
    rotation_epochs: int = 6,
    epochs: int = 5,
    labels: str = "predicted",
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Transfer to the prediction of rotations (Gidaris et al., ICLR 2018), and back with a new head.

    The stolen features first learn to tell by how many quarter turns an image is rotated, then the thief's
    classes again. It stands in for the transfer learning of the Watermark-Robustness-Toolbox (Lukas et al.,
    IEEE S&P 2022), which goes by way of 5000 classes of Open Images, in as many epochs, and starts from a
    network of others: this thief has no other images than ``data``'s, which need no labels to be turned.

    Args:
        model: the stolen model.
        data: what the thief has.
        rotation_epochs: epochs of the other task, >= 1.
        epochs: epochs of the way back, >= 1.
        labels: of the way back: ``"true"``, or ``"predicted"`` for what the stolen model says.
        rate_factor: learning rate of both, in units of the one of a training from scratch, >= 0.
        seed: of the new heads and the batches.
        observe: is shown the model after each epoch; until the last of the other task with the stolen head.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range, the images are not square, or the model has no linear layer.
    """
    check_int("rotation_epochs", rotation_epochs, minimum=1)
    there, back = (data.recipe.scaled(n, rate_factor) for n in (rotation_epochs, epochs))
    taught, attacked = with_labels(model, data, labels), copied(model)
    size = tuple(fetch(data.clean, [0])[0].shape[2:])
    if size[0] != size[1]:
        raise ValueError(f"`data` must have square images, or none could be turned; got {size}.")
    head = last_layer(attacked)
    with seeded(seed, attacked):
        turns = nn.Linear(head.in_features, 4).to(device_of(attacked))
    others = set(head.parameters())
    features = [p for p in attacked.parameters() if p not in others]

    def loss(trained: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        turned, n_turns = rotated(x)
        scores = turns(into(head, trained, turned))
        return F.cross_entropy(scores.reshape(len(turned), -1, 4).mean(1), n_turns)

    learnt = [*features, *turns.parameters()]
    train(attacked, data, there, loss=loss, parameters=learnt, observe=observe, seed=seed)
    with seeded(seed, attacked):
        head.reset_parameters()
    shown = None if observe is None else lambda dose, seen: observe(rotation_epochs + dose, seen)
    return train(attacked, taught, back, observe=shown, seed=seed + 1)


def rotated(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return square images in all four rotations, ``(4 n, C, H, H)``, and their quarter turns ``(4 n,)``."""
    turned = torch.cat([x.rot90(turns, (2, 3)) for turns in range(4)])
    return turned, torch.arange(4, device=x.device).repeat_interleave(len(x))


def into(layer: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer of a model is given when the model is given inputs."""
    given: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        model(x)
    finally:
        handle.remove()
    return given[-1]


@dataclass(frozen=True)
class RotationTransfer(Attack):
    """Transfer to rotations and back; see :func:`transfer_to_rotations`."""

    function = staticmethod(transfer_to_rotations)

    rotation_epochs: int = 6
    epochs: int = 5
    labels: str = "predicted"
    rate_factor: float = 1.0
    seed: int = 0
