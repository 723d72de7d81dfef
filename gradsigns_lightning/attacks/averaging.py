"""Averages of weights: over a fine-tuning, and along a curve between two networks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, update_bn

from gradsigns_lightning.attacks.base import (
    Attack,
    AttackData,
    Observe,
    copied,
    device_of,
    observed,
    seeded,
)
from gradsigns_lightning.attacks.fine_tuning import fine_tune
from gradsigns_lightning.attacks.recovery import few, recover, up_to
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.core.utils.checks import check_int, check_number


def average_checkpoints(
    model: nn.Module,
    data: AttackData,
    *,
    epochs: int = 5,
    rate_factor: float = 1.0,
    labels: str = "true",
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Fine-tune at a constant rate and average the weights after each epoch (SWA, Izmailov et al., UAI 2018).

    The stolen weights themselves are left out of the average. The statistics of batch normalizations are
    taken anew for it.

    Args:
        model: the stolen model.
        data: what the thief has.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch, >= 0.
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says.
        seed: of the batches.
        observe: is shown the average after each epoch.

    Returns:
        The averaged copy.

    Raises:
        ValueError: a setting is out of range.
    """
    check_int("epochs", epochs, minimum=1)
    constant = replace(data, recipe=replace(data.recipe, schedule="constant"))
    averaged = AveragedModel(copied(model))

    def take_in(dose: float, current: nn.Module) -> None:
        if dose > 0:
            averaged.update_parameters(current)
            if observe is not None:
                observed(observe, dose, _with_statistics(averaged.module, data, seed))

    recover(
        copied(model),
        model,
        constant,
        epochs=epochs,
        rate_factor=rate_factor,
        labels=labels,
        seed=seed,
        observe=take_in,
    )
    return _with_statistics(averaged.module, data, seed)


@dataclass(frozen=True)
class CheckpointAveraging(Attack):
    """Averaging of checkpoints; see :func:`average_checkpoints`."""

    function = staticmethod(average_checkpoints)

    epochs: int = 5
    rate_factor: float = 1.0
    labels: str = "true"
    seed: int = 0


def connect_modes(
    model: nn.Module,
    data: AttackData,
    *,
    position: float = 0.1,
    n_images: int = 2500,
    end_epochs: int = 5,
    curve_epochs: int = 100,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Take a point on a curve from the stolen model to a fine-tuned copy (MCR, Zhao et al., ICLR 2020).

    The curve is the quadratic Bezier curve (Garipov et al., NeurIPS 2018) whose bend is trained at random
    positions; statistics of batch normalizations are taken anew at the point. The paper trains by SGD at a
    rate of 0.01 for 100 epochs on 2,500 images; here the recipe says how.

    Args:
        model: the stolen model.
        data: what the thief has.
        position: the point, in [0, 1]; 0 is the stolen model, 1 the fine-tuned copy.
        n_images: images on which the curve is trained, >= 1; all where the thief has fewer.
        end_epochs: epochs of the copy's fine-tuning, on all images, >= 1.
        curve_epochs: epochs of the curve's training, >= 1.
        rate_factor: learning rate of both, in units of the one of a training from scratch, >= 0.
        seed: of the choice of images, the positions and the batches.
        observe: is shown the points at 0.1, 0.2, ... and ``position``.

    Returns:
        The model at that point.

    Raises:
        ValueError: a setting is out of range.
    """
    check_number("position", position, minimum=0, maximum=1)
    check_int("curve_epochs", curve_epochs, minimum=1)
    end = fine_tune(model, data, epochs=end_epochs, rate_factor=rate_factor, seed=seed)
    recipe = replace(data.recipe, epochs=curve_epochs, rate=data.recipe.rate * rate_factor)
    curve = BezierCurve(copied(model), end)
    train(curve, few(data, n_images, seed=seed), recipe, parameters=curve.bend.parameters(), seed=seed)
    for dose in [position] if observe is None else up_to(position, 0.1):
        attacked = _with_statistics(curve.at(dose), data, seed)
        observed(observe, dose, attacked)
    return attacked


@dataclass(frozen=True)
class ModeConnectivity(Attack):
    """A point between the stolen model and a fine-tuned copy; see :func:`connect_modes`."""

    function = staticmethod(connect_modes)

    position: float = 0.1
    n_images: int = 2500
    end_epochs: int = 5
    curve_epochs: int = 100
    rate_factor: float = 1.0
    seed: int = 0


class BezierCurve(nn.Module):
    """Networks on a quadratic curve between two; a call is answered by one at a random position.

    Args:
        start: network at position 0, which is taken over.
        end: network at position 1, of the same kind.
    """

    def __init__(self, start: nn.Module, end: nn.Module) -> None:
        super().__init__()
        self._start = start
        self._ends = [(p.detach(), q.detach()) for p, q in _parameter_pairs(start, end)]
        self.bend = nn.ParameterList((p + q) / 2 for p, q in self._ends)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the network at a position drawn from [0, 1]."""
        logits: Tensor = functional_call(self._start, self._weights(torch.rand(()).item()), (x,))
        return logits

    def at(self, position: float) -> nn.Module:
        """Return the network at a position in [0, 1]."""
        network = copied(self._start)
        weights = self._weights(position)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(weights[name])
        return network

    def _weights(self, t: float) -> dict[str, Tensor]:
        names = (name for name, _ in self._start.named_parameters())
        return {
            name: (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
            for name, (start, end), bend in zip(names, self._ends, self.bend, strict=True)
        }


def _parameter_pairs(one: nn.Module, other: nn.Module) -> zip[tuple[nn.Parameter, nn.Parameter]]:
    return zip(one.parameters(), other.parameters(), strict=True)


def _with_statistics(model: nn.Module, data: AttackData, seed: int) -> nn.Module:
    """Return a copy whose batch normalizations have the statistics of the thief's images."""
    twin = copied(model)
    with seeded(seed, twin):
        update_bn(data.batches(seed=seed), twin, device_of(twin))
    return twin.eval()
