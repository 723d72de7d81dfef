"""Images of which a part is covered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied
from gradsigns_lightning.attacks.serving import check_positive, drawn, served
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.core.utils.checks import check_number


def occlude_inputs(
    model: nn.Module,
    data: AttackData,
    *,
    share: float = 0.25,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Cover a random rectangle of each image with noise.

    The covers are those on which WRT's random occlusion trains (:func:`train_on_occlusions`), put before the
    model instead. They are a function of the image, so asking again does not average them out.

    Args:
        model: the stolen model.
        data: what the thief has.
        share: largest part of an image that is covered, in (0, 1]: both sides of the rectangle are uniform up
            to twice this share of the image's, and end with it; WRT's 0.25.
        seed: of the rectangles and the noise.
        observe: is shown the model at a quarter, half and the whole of ``share``, the dose.

    Raises:
        ValueError: ``share`` is out of range.
    """
    check_positive("share", share, maximum=1)
    filters = {part * share: partial(_covered, share=part * share, seed=seed) for part in (0.25, 0.5, 1)}
    return served(model, data, observe=observe, filters=filters)


@dataclass(frozen=True)
class InputOcclusion(Attack):
    """Images with a rectangle covered; see :func:`occlude_inputs`."""

    function = staticmethod(occlude_inputs)
    kind = "responses"

    share: float = 0.25
    seed: int = 0


def train_on_occlusions(
    model: nn.Module,
    data: AttackData,
    *,
    share: float = 0.25,
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Go on with the training, on images with a rectangle covered as well (WRT: random occlusion).

    As many covered images as others. The toolbox trains with true or predicted labels, by its configuration;
    these are true ones. It makes new covers for each of 5 rounds of one epoch; here they are new in each
    batch.

    Args:
        model: the stolen model.
        data: what the thief has.
        share: as in :func:`occlude_inputs`.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch, > 0.
        seed: of batches and covers.
        observe: is shown the model after each epoch.

    Raises:
        ValueError: a setting is out of range.
    """
    check_positive("share", share, maximum=1)
    rate = data.recipe.rate * check_number("rate_factor", rate_factor, minimum=0)

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hidden = data.normalized(_covered(data.raw(x), share=share, seed=int(torch.randint(2**31, ()))))
        logits = net(torch.cat([x, hidden]))
        return F.cross_entropy(logits, torch.cat([y, y]), label_smoothing=data.recipe.label_smoothing)

    recipe = replace(data.recipe, epochs=epochs, rate=rate)
    return train(copied(model), data, recipe, loss=loss, observe=observe, seed=seed)


@dataclass(frozen=True)
class OcclusionTraining(Attack):
    """Training on covered images; see :func:`train_on_occlusions`."""

    function = staticmethod(train_on_occlusions)

    share: float = 0.25
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0


def _covered(pixels: Tensor, *, share: float, seed: int) -> Tensor:
    noise = drawn(pixels, seed, lambda random: _cover(pixels.shape[1:], share, random)).to(pixels)
    return torch.where(noise < 0, pixels, noise)


def _cover(shape: torch.Size, share: float, random: torch.Generator) -> Tensor:
    """Return noise in [0, 1] inside a random rectangle, -1 elsewhere."""
    _, height, width = shape
    at, size = torch.rand(2, generator=random), torch.rand(2, generator=random)
    top, left = int(at[0] * height), int(at[1] * width)
    rows, columns = (
        1 + int(part * (2 * share * side - 1)) for part, side in zip(size, (height, width), strict=True)
    )
    cover = torch.full(shape, -1.0)
    cover[:, top : top + rows, left : left + columns] = 1.0
    return torch.where(cover > 0, torch.rand(shape, generator=random), cover)
