"""Neural Cleanse and neural laundering: find a backdoor, and make the network forget it."""

from __future__ import annotations

from collections.abc import Iterator
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
    last_layer,
    observed,
    predictions,
    seeded,
)
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.core.utils.checks import check_int, check_number

# Of the toolbox: images a step, and Adam's rate and betas for mask and pattern.
BATCH_SIZE, RATE, BETAS = 64, 0.1, (0.5, 0.9)
PROBED = 512  # images whose activations are compared


@dataclass(frozen=True)
class Trigger:
    """What turns raw pixels into those of a backdoor.

    Attributes:
        mask: share of each pixel that is replaced, ``(1, H, W)``, in [0, 1].
        pattern: what replaces it, ``(C, H, W)``, in [0, 1].
        target: the class that it stands for.
    """

    mask: Tensor
    pattern: Tensor
    target: int

    def stamped(self, data: AttackData, x: Tensor) -> Tensor:
        """Return normalized images with the trigger."""
        pixels = data.raw(x)
        return data.normalized(pixels + self.mask * (self.pattern - pixels))

    @property
    def size(self) -> float:
        """Number of pixels that are replaced."""
        return float(self.mask.sum())


def unlearn_trigger(
    model: nn.Module,
    data: AttackData,
    *,
    penalty: float = 0.01,
    search_steps: int = 64,
    refine_steps: int = 192,
    share: float = 0.2,
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Neural Cleanse: find the smallest trigger, and train on images with it (Wang et al., IEEE S&P 2019).

    One trigger is sought for each class, as in the paper; the Watermark-Robustness-Toolbox takes pairs of
    classes. The one with the smallest mask is refined. A share of each batch then carries it, with the labels
    that the stolen model gives without it.

    Args:
        model: the stolen model.
        data: what the thief has.
        penalty: weight of the mask's size while a trigger is sought (lambda), >= 0.
        search_steps: steps of 64 images for each class, >= 1; the toolbox takes 4 epochs of a class.
        refine_steps: steps for the smallest one, >= 1; the toolbox takes 12 epochs.
        share: share of the images that carry the trigger in addition, in [0, 1]; the paper's is 0.2.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch.
        seed: of the search and the batches.
        observe: is shown the model after each epoch.

    Returns:
        The repaired copy.

    Raises:
        ValueError: a setting is out of range.
    """
    trigger, taught = _found(model, data, penalty, search_steps, refine_steps, seed)
    return retrained(copied(model), taught, trigger, share, epochs, rate_factor, seed, observe)


def prune_trigger(
    model: nn.Module,
    data: AttackData,
    *,
    penalty: float = 0.01,
    search_steps: int = 64,
    refine_steps: int = 192,
    ratio: float = 0.1,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Neural Cleanse: cut the features that the smallest trigger raises most (Wang et al., IEEE S&P 2019).

    The features are those that the head takes, the paper's second to last layer: the head's weights for them
    become zero. The Watermark-Robustness-Toolbox masks single units of the last convolutional group; neither
    trains afterwards.

    Args:
        model: the stolen model.
        data: what the thief has.
        penalty: weight of the mask's size while a trigger is sought (lambda), >= 0.
        search_steps: steps of 64 images for each class, >= 1; the toolbox takes 4 epochs of a class.
        refine_steps: steps for the smallest one, >= 1; the toolbox takes 12 epochs.
        ratio: share of the features that is cut, in [0, 1].
        seed: of the search.
        observe: is shown the model at 0, a half and the whole of ``ratio``.

    Returns:
        The pruned copy.

    Raises:
        ValueError: a setting is out of range, or the model has no linear layer.
    """
    check_number("ratio", ratio, minimum=0, maximum=1)
    attacked = copied(model)
    head = last_layer(attacked)
    trigger, _ = _found(model, data, penalty, search_steps, refine_steps, seed)
    x = fetch(data.clean, list(range(min(PROBED, data.n_images))))[0].to(device_of(attacked))
    clean, stamped = (_features(attacked, head, images) for images in (x, trigger.stamped(data, x)))
    order = (stamped - clean).argsort(descending=True)
    doses = sorted({round(part * ratio * len(order)) for part in (0.0, 0.5, 1.0)})
    for n in doses:
        with torch.no_grad():
            head.weight[:, order[:n]] = 0
        observed(observe, n / len(order), attacked)
    return attacked


def launder(
    model: nn.Module,
    data: AttackData,
    *,
    linear_threshold: float = 0.8,
    conv_threshold: float = 2.0,
    penalty: float = 0.01,
    search_steps: int = 240,
    refine_steps: int = 400,
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Neural laundering: reset neurons that a found trigger excites, then retrain (Aiken et al., 2020).

    The trigger is that of :func:`unlearn_trigger`. The rise of a neuron is measured in units of the standard
    deviation that it has over clean images, so that thresholds mean the same in every network; the toolbox's
    0.2 and 0.5 are in raw activations, and these keep their ratio. A reset channel has weights and bias zero.
    Every image then comes with and without the trigger, under the label that the stolen model gives without.

    Args:
        model: the stolen model.
        data: what the thief has.
        linear_threshold: rise above which a neuron of a linear layer is reset (dt), >= 0; the head's stay.
        conv_threshold: rise, at the position where it is highest, above which a channel of a convolution is
            reset (ct), >= 0.
        penalty: weight of the mask's size while a trigger is sought (lambda), >= 0.
        search_steps: steps of 64 images for each class, >= 1; the toolbox takes 15 epochs of a class.
        refine_steps: steps for the smallest one, >= 1; the toolbox takes 25 epochs.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch.
        seed: of the search and the batches.
        observe: is shown the model after each epoch.

    Returns:
        The laundered copy.

    Raises:
        ValueError: a setting is out of range, or the model has no linear layer.
    """
    thresholds = {
        nn.Linear: check_number("linear_threshold", linear_threshold, minimum=0),
        nn.Conv2d: check_number("conv_threshold", conv_threshold, minimum=0),
    }
    attacked = copied(model)
    trigger, taught = _found(model, data, penalty, search_steps, refine_steps, seed)
    x = fetch(data.clean, list(range(min(PROBED, data.n_images))))[0].to(device_of(attacked))
    with torch.no_grad():
        for layer, rise in rises(attacked, x, trigger.stamped(data, x)):
            if layer is last_layer(attacked):
                continue
            excited = rise > next(most for kind, most in thresholds.items() if isinstance(layer, kind))
            layer.weight[excited] = 0
            if layer.bias is not None:
                layer.bias[excited] = 0
    return retrained(attacked, taught, trigger, 1.0, epochs, rate_factor, seed, observe)


def retrained(
    attacked: nn.Module,
    taught: AttackData,
    trigger: Trigger,
    share: float,
    epochs: int,
    rate_factor: float,
    seed: int,
    observe: Observe | None,
) -> nn.Module:
    """Train a model on images, and again on a share of each batch with a trigger and the same labels."""
    check_number("share", share, minimum=0, maximum=1)
    recipe = taught.recipe.scaled(epochs, rate_factor)

    def loss(trained: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        n = round(share * len(x))
        both = torch.cat([x, trigger.stamped(taught, x[:n])])
        return F.cross_entropy(trained(both), torch.cat([y, y[:n]]), label_smoothing=recipe.label_smoothing)

    return train(attacked, taught, recipe, loss=loss, observe=observe, seed=seed)


def _found(
    model: nn.Module, data: AttackData, penalty: float, search_steps: int, refine_steps: int, seed: int
) -> tuple[Trigger, AttackData]:
    """Return the smallest trigger of all classes, and the images with the labels that the model gives."""
    check_number("penalty", penalty, minimum=0)
    check_int("search_steps", search_steps, minimum=1)
    check_int("refine_steps", refine_steps, minimum=1)
    judge, labels = copied(model), predictions(model, data).argmax(1)
    with seeded(seed, judge):
        seek = partial(find_trigger, judge, data, labels, penalty=penalty)
        found = [seek(target, n_steps=search_steps) for target in range(data.n_classes)]
        smallest = min(found, key=lambda trigger: trigger.size)
        return seek(smallest.target, n_steps=refine_steps), data.relabelled(labels)


def find_trigger(
    model: nn.Module, data: AttackData, labels: Tensor, target: int, *, penalty: float, n_steps: int
) -> Trigger:
    """Return the smallest mask and pattern found that turn images of other classes into a class.

    Args:
        model: in evaluation mode.
        data: the images.
        labels: their classes ``(n,)``.
        target: the class.
        penalty: weight of the mask's size.
        n_steps: steps of Adam.
    """
    device, others = device_of(model), torch.nonzero(labels != target).flatten()
    shape = data.clean[0][0].shape
    free = [torch.rand(size, device=device, requires_grad=True) for size in ((1, *shape[1:]), shape)]
    optimizer = torch.optim.Adam(free, RATE, betas=BETAS)
    for _ in range(n_steps if len(others) else 0):
        x, _ = fetch(data.clean, others[torch.randint(len(others), (BATCH_SIZE,))].tolist())
        mask, pattern = (value.sigmoid() for value in free)
        logits = model(Trigger(mask, pattern, target).stamped(data, x.to(device)))
        wanted = torch.full((len(x),), target, device=device)
        slopes = torch.autograd.grad(F.cross_entropy(logits, wanted) + penalty * mask.sum(), free)
        for value, slope in zip(free, slopes, strict=True):
            value.grad = slope
        optimizer.step()
    mask, pattern = (value.detach().sigmoid() for value in free)
    return Trigger(mask, pattern, target)


@torch.no_grad()
def _features(model: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
    """Return the mean of each feature that the head takes, ``(n_features,)``."""
    taken: list[Tensor] = []
    with head.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0])):
        model(x)
    return taken[-1].flatten(0, -2).mean(0)


def rises(model: nn.Module, clean: Tensor, stamped: Tensor) -> Iterator[tuple[nn.Conv2d | nn.Linear, Tensor]]:
    """Yield the convolutions and linear layers, and by how much a trigger raises each of their channels.

    That is the difference of the mean outputs at the position where it is largest, in units of the standard
    deviation over clean images and positions.
    """
    seen: dict[nn.Conv2d | nn.Linear, list[Tensor]] = {}

    def note(layer: nn.Conv2d | nn.Linear, inputs: object, output: Tensor) -> None:
        channels = output.flatten(2) if isinstance(layer, nn.Conv2d) else output.movedim(-1, 1)
        channels = channels.reshape(len(channels), channels.shape[1], -1)
        seen.setdefault(layer, []).extend((channels.mean(0), channels.std((0, 2))))

    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                hooks.enter_context(module.register_forward_hook(note))
        model(clean)
        model(stamped)
    for layer, (mean, deviation, raised, _) in seen.items():
        yield layer, (raised - mean).amax(1) / deviation.clamp_min(1e-12)


@dataclass(frozen=True)
class TriggerUnlearning(Attack):
    """Neural Cleanse by unlearning; see :func:`unlearn_trigger`."""

    function = staticmethod(unlearn_trigger)

    penalty: float = 0.01
    search_steps: int = 64
    refine_steps: int = 192
    share: float = 0.2
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class TriggerPruning(Attack):
    """Neural Cleanse by pruning; see :func:`prune_trigger`."""

    function = staticmethod(prune_trigger)

    penalty: float = 0.01
    search_steps: int = 64
    refine_steps: int = 192
    ratio: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Laundering(Attack):
    """Neural laundering; see :func:`launder`."""

    function = staticmethod(launder)

    linear_threshold: float = 0.8
    conv_threshold: float = 2.0
    penalty: float = 0.01
    search_steps: int = 240
    refine_steps: int = 400
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0
