"""What this project's mark lives in, as a thief sees it: the mean input gradients of classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.base import AttackData, Relabelled, device_of
from gradsigns_lightning.core.torch_state.contexts import frozen_statistics, twice_differentiable_kernels
from gradsigns_lightning.core.utils.checks import check_choice, check_int

TARGETS = ("class", "classes", "pairs", "mixtures")


@dataclass(frozen=True, eq=False)
class View:
    """A mean input gradient: whose images, and of what.

    Attributes:
        images: the class whose images it is taken over.
        towards: the class b of ``-log p_b``, or a mixture of logits, weights ``(n_classes,)``.
    """

    images: int
    towards: int | Tensor


def views_of(target: str, target_class: int, n_classes: int, *, seed: int = 0) -> list[View]:
    """Return the views that a thief suspects.

    Args:
        target: ``"class"`` (one class), ``"classes"`` (each towards itself), ``"pairs"`` (each class's
            images, towards each class) or ``"mixtures"`` (each class's images, as many normal random mixtures
            of logits as there are classes).
        target_class: the class of ``"class"``.
        n_classes: number of classes.
        seed: of the mixtures.

    Raises:
        ValueError: there is no such target or class.
    """
    check_choice("target", target, TARGETS)
    check_int("target_class", target_class, minimum=0, maximum=n_classes - 1)
    if target == "class":
        return [View(target_class, target_class)]
    if target == "classes":
        return [View(a, a) for a in range(n_classes)]
    if target == "pairs":
        return [View(a, b) for a in range(n_classes) for b in range(n_classes)]
    generator = torch.Generator().manual_seed(seed)
    mixtures = torch.randn(n_classes, n_classes, n_classes, generator=generator)
    return [View(a, mixture) for a in range(n_classes) for mixture in mixtures[a]]


class ClassImages:
    """The thief's images by their class, read when they are asked for.

    Args:
        data: what the thief has.
        seed: of the choice among a class's images.
    """

    def __init__(self, data: AttackData, *, seed: int = 0) -> None:
        labels = torch.cat([y for _, y in data.in_order()])
        self.labels = labels
        self._train, self._clean = Relabelled(data.train, labels), Relabelled(data.clean, labels)
        self._generator = torch.Generator().manual_seed(seed)

    def of(self, class_index: int, n: int, *, augmented: bool = False) -> Tensor:
        """Return up to ``n`` inputs of one class, drawn without replacement.

        Raises:
            ValueError: the thief has none.
        """
        items = (self.labels == class_index).nonzero().flatten()
        if not len(items):
            raise ValueError(f"`data` must have images of class {class_index}, got none.")
        chosen = items[torch.randperm(len(items), generator=self._generator)[:n]].tolist()
        return (self._train if augmented else self._clean).__getitems__(chosen)[0]


def directions(
    model: nn.Module, inputs: Tensor, view: View, data: AttackData, *, create_graph: bool = False
) -> Tensor:
    """Return every image's raw-pixel gradient at unit length, ``(n, C*H*W)``, as this project's readers do.

    Of ``log((1 - p) / p)`` instead of ``-log p``: that has the same direction, and does not vanish where the
    network is sure.

    Args:
        model: maps normalized inputs to logits; its statistics are frozen meanwhile.
        inputs: normalized, shape ``(n, C, H, W)``.
        view: of what.
        data: what the thief has.
        create_graph: keep the graph, to differentiate by the parameters.
    """
    device = device_of(model)
    with (
        frozen_statistics(model),
        twice_differentiable_kernels(model, device.type),
        torch.enable_grad(),
    ):
        leaf = inputs.detach().to(device).requires_grad_(True)
        (gradient,) = torch.autograd.grad(
            _score(model(leaf), view.towards).sum(), leaf, create_graph=create_graph
        )
        std = torch.tensor(data.input_std, device=device).view(-1, 1, 1)
        return F.normalize((gradient / std).flatten(1), dim=1)


def mean_direction(
    model: nn.Module, images: ClassImages, view: View, data: AttackData, *, n_images: int = 1024
) -> Tensor:
    """Return the mean of :func:`directions` over the thief's images of the view's class, ``(C*H*W,)``."""
    inputs = images.of(view.images, n_images)
    sums = [directions(model, part, view, data).sum(0) for part in torch.split(inputs, 128)]
    return torch.stack(sums).sum(0) / len(inputs)


def _score(logits: Tensor, towards: int | Tensor) -> Tensor:
    if isinstance(towards, Tensor):
        return -(logits @ towards.to(logits))
    others = torch.cat([logits[:, :towards], logits[:, towards + 1 :]], dim=1)
    return others.logsumexp(1) - logits[:, towards]
