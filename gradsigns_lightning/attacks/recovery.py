"""What attacks on the weights have in common: which weights, and the training that mends the damage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from gradsigns_lightning.attacks.base import AttackData, Observe, observed, predictions
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.core.utils.checks import check_choice, check_int, check_number
from gradsigns_lightning.data.sources import Batch

LABELS = ("true", "predicted")


def recover(
    attacked: nn.Module,
    stolen: nn.Module,
    data: AttackData,
    *,
    epochs: int,
    rate_factor: float,
    labels: str,
    seed: int,
    after_step: Callable[[int], None] | None = None,
    observe: Observe | None = None,
) -> nn.Module:
    """Fine-tune a damaged copy in place, by the recipe, and return it in evaluation mode.

    Args:
        attacked: the damaged copy.
        stolen: the stolen model, which gives the ``"predicted"`` labels.
        data: what the thief has.
        epochs: epochs, >= 0; 0 leaves the copy as it is.
        rate_factor: learning rate, in units of the one of a training from scratch, >= 0.
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says.
        seed: of the batches.
        after_step: see :func:`~gradsigns_lightning.attacks.training.train`.
        observe: is shown the damaged copy at dose 0, and the copy after each epoch.
    """
    check_int("epochs", epochs, minimum=0)
    check_number("rate_factor", rate_factor, minimum=0)
    check_choice("labels", labels, LABELS)
    observed(observe, 0, attacked)
    if epochs == 0:
        return attacked.eval()
    taught = data.relabelled(predictions(stolen, data).argmax(1)) if labels == "predicted" else data
    recipe = replace(data.recipe, epochs=epochs, rate=data.recipe.rate * rate_factor)
    return train(attacked, taught, recipe, after_step=after_step, observe=observe, seed=seed)


def weights_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return all weight matrices and kernels: modules, and the names that the parameters have in them.

    Biases and the scales of normalizations are left out, as those who prune or quantize a network do.

    Raises:
        ValueError: there are none.
    """
    found = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith("weight") and parameter.ndim >= 2
    ]
    if not found:
        raise ValueError("`model` must have layers with weights; found none.")
    return found


def up_to(last: float, step: float) -> list[float]:
    """Return the doses ``step``, ``2 * step``, ... below ``last``, and ``last``."""
    n = int(last / step - 1e-9)
    return [round(step * (i + 1), 10) for i in range(n)] + [last]


class Few(Dataset[Batch]):
    """Some of the images.

    Args:
        images: all of them.
        chosen: positions of those that remain.
    """

    def __init__(self, images: Dataset[Batch], chosen: Tensor) -> None:
        self._images, self._chosen = images, chosen.tolist()

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, item: int) -> Batch:
        return self._images[self._chosen[item]]

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch of these images."""
        stored = [self._chosen[item] for item in items]
        if hasattr(self._images, "__getitems__"):
            batch: Batch = self._images.__getitems__(stored)
        else:
            batch = default_collate([self._images[item] for item in stored])
        return batch


def few(data: AttackData, n_images: int, *, seed: int) -> AttackData:
    """Return a random choice of the thief's images; all of them where there are no more than ``n_images``."""
    check_int("n_images", n_images, minimum=1)
    chosen = torch.randperm(data.n_images, generator=torch.Generator().manual_seed(seed))[:n_images]
    return replace(data, train=Few(data.train, chosen), clean=Few(data.clean, chosen))


def accuracy(model: nn.Module, data: AttackData) -> float:
    """Return the share of the thief's images, not augmented, that a model gets right."""
    labels = torch.cat([y for _, y in data.in_order()])
    return (predictions(model, data).argmax(1) == labels).float().mean().item()
