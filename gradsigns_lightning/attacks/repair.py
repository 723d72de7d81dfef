"""Repairs of fragile and backdoored networks, which may take a mark along."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

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
)
from gradsigns_lightning.attacks.fine_tuning import fine_tune, with_labels
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.core.utils.checks import check_int, check_number
from gradsigns_lightning.data.sources import Batch


def train_adversarially(
    model: nn.Module,
    data: AttackData,
    *,
    radii: Sequence[float] = (0.01, 0.1, 0.25),
    step: float = 0.01,
    n_steps: int = 40,
    n_images: int = 1000,
    labels: str = "predicted",
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Adversarial training (Madry et al., ICLR 2018), as the Watermark-Robustness-Toolbox does it.

    Before each epoch, projected gradient ascent on the loss makes one adversarial image of each of some
    images for each radius; they are spread over the epoch's ordinary batches.

    Args:
        model: the stolen model.
        data: what the thief has.
        radii: largest change of a pixel, in raw ``[0, 1]`` units, each >= 0.
        step: of the ascent, in the same units, >= 0.
        n_steps: of the ascent, >= 1.
        n_images: images for each radius and epoch, at most those that the thief has, >= 1.
        labels: ``"true"``, or ``"predicted"`` for what the stolen model says.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch.
        seed: of images and batches.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range.
    """
    for radius in radii:
        check_number("radii", radius, minimum=0)
    check_number("step", step, minimum=0)
    check_int("n_steps", n_steps, minimum=1)
    check_int("n_images", n_images, minimum=1)
    recipe, attacked = data.recipe.scaled(epochs, rate_factor), copied(model)
    taught = with_labels(model, data, labels)

    def make() -> Batch:
        x, y = fetch(taught.clean, torch.randperm(taught.n_images)[:n_images].tolist())
        made = [adversarial(attacked, taught, x, y, radius, step, n_steps) for radius in radii]
        return torch.cat([x[:0], *made]), torch.cat([y[:0], *(y for _ in radii)])

    batches = Enriched(taught, make, seed)
    return train(attacked, taught, recipe, batches=batches, observe=observe, seed=seed)


def adversarial(
    model: nn.Module, data: AttackData, x: Tensor, y: Tensor, radius: float, step: float, n_steps: int
) -> Tensor:
    """Return images within ``radius`` of others, in each raw pixel, at which the loss is high; on the CPU.

    The model is asked in evaluation mode.
    """
    device, was_training = device_of(model), [(m, m.training) for m in model.modules()]
    model.eval()
    made = []
    for images, labels in zip(torch.split(x, 512), torch.split(y, 512), strict=True):
        start = data.raw(images.to(device))
        pixels = start.clone()
        for _ in range(n_steps):
            pixels.requires_grad_(True)
            loss = F.cross_entropy(model(data.normalized(pixels)), labels.to(device), reduction="sum")
            (slope,) = torch.autograd.grad(loss, pixels)
            moved = (pixels + step * slope.sign()).detach()
            pixels = moved.clamp(start - radius, start + radius).clamp(0, 1)
        made.append(data.normalized(pixels).cpu())
    for module, flag in was_training:
        module.training = flag
    return torch.cat(made)


class Enriched:
    """An epoch's batches, with more images spread evenly over them.

    Args:
        data: gives the batches.
        make: gives the further images, anew before each epoch.
        seed: of the batches.
    """

    def __init__(self, data: AttackData, make: Callable[[], Batch], seed: int) -> None:
        self._batches, self._make = data.batches(seed=seed), make

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        shares = [part.tensor_split(len(self)) for part in self._make()]
        for (x, y), more, labels in zip(self._batches, *shares, strict=True):
            yield torch.cat([x, more]), torch.cat([y, labels])


def distill_attention(
    model: nn.Module,
    data: AttackData,
    *,
    betas: Sequence[float] = (500.0, 1000.0, 1000.0),
    teacher_epochs: int = 5,
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """NAD, neural attention distillation (Li et al., ICLR 2021).

    A fine-tuned copy is the teacher: the stolen model learns the labels, and where the teacher looks, which
    is the sum over channels of squared features at the end of each resolution of the network (of a vision
    transformer, its patch embedding alone). The paper takes 10 epochs for each of the two, on a twentieth of
    the training set.

    Args:
        model: the stolen model.
        data: what the thief has.
        betas: weights of the attention losses at the last resolutions of the network, each >= 0; where it has
            fewer, the last weights count.
        teacher_epochs: epochs of the teacher, >= 1.
        epochs: epochs of the student, >= 1.
        rate_factor: learning rate of both, in units of the one of a training from scratch.
        seed: of batches.
        observe: is shown the student after each epoch.

    Returns:
        The student.

    Raises:
        ValueError: a setting is out of range, or the model has no feature maps.
    """
    for beta in betas:
        check_number("betas", beta, minimum=0)
    recipe = data.recipe.scaled(epochs, rate_factor)
    student = copied(model)
    names = ends_of_resolutions(student, fetch(data.clean, [0])[0].to(device_of(student)))[-len(betas) :]
    teacher = fine_tune(model, data, epochs=teacher_epochs, rate_factor=rate_factor, seed=seed)
    weights = list(betas)[-len(names) :]

    def loss(trained: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            _, taught = attention(teacher, names, x)
        logits, learnt = attention(trained, names, x)
        total = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
        for weight, ours, theirs in zip(weights, learnt, taught, strict=True):
            total = total + weight * F.mse_loss(ours, theirs)
        return total

    return train(student, data, recipe, loss=loss, observe=observe, seed=seed)


def attention(model: nn.Module, names: Sequence[str], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the logits, and the attention maps ``(n, H * W)`` of norm 1 of the modules with these names."""
    maps: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(_keep, maps, name)))
        logits = model(x)
    return logits, [F.normalize(maps[name].square().sum(1).flatten(1), dim=1) for name in names]


@torch.no_grad()
def ends_of_resolutions(model: nn.Module, x: Tensor) -> list[str]:
    """Return the names of the modules that are the last to give feature maps of a size, largest maps first.

    Raises:
        ValueError: no module gives feature maps of more than one position.
    """
    last: dict[tuple[int, ...], str] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(_note, last, name)))
        model(x)
    if not last:
        raise ValueError("`model` must have feature maps (n, C, H, W) of more than one position; found none.")
    return [last[size] for size in sorted(last, key=lambda size: -size[0] * size[1])]


def _keep(maps: dict[str, Tensor], name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
    maps[name] = output


def _note(
    last: dict[tuple[int, ...], str], name: str, module: nn.Module, inputs: object, output: object
) -> None:
    if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
        last[tuple(output.shape[2:])] = name


@dataclass(frozen=True)
class AdversarialTraining(Attack):
    """Adversarial training; see :func:`train_adversarially`."""

    function = staticmethod(train_adversarially)

    radii: Sequence[float] = (0.01, 0.1, 0.25)
    step: float = 0.01
    n_steps: int = 40
    n_images: int = 1000
    labels: str = "predicted"
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class AttentionDistillation(Attack):
    """Neural attention distillation; see :func:`distill_attention`."""

    function = staticmethod(distill_attention)

    betas: Sequence[float] = (500.0, 1000.0, 1000.0)
    teacher_epochs: int = 5
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0
