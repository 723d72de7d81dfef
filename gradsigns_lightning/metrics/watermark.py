"""Watermark metrics as torchmetrics classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryHammingDistance

from gradsigns_lightning.metrics.functional.watermark import (
    count_matches,
    decided,
    p_value_of_counts,
    smallest_margin,
)


class BitErrorRate(BinaryHammingDistance):
    """Share of decided bits that differ; see :func:`~gradsigns_lightning.metrics.functional.bit_error_rate`.

    ``update(preds, target)`` takes ``(..., N)`` bits (-1 for an erasure) and the signature's.

    Args:
        kwargs: arguments of :class:`torchmetrics.classification.BinaryHammingDistance`.

    Example:
        >>> metric = BitErrorRate()
        >>> metric(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0]))
        tensor(0.2500)
    """

    n_decided: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("n_decided", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count the differences in one reading."""
        preds, target = decided(preds, target)
        self.n_decided += preds.numel()
        if preds.numel():
            super().update(preds, target)

    def compute(self) -> Tensor:
        """Return the share over all bits seen; NaN if none was decided."""
        rate: Tensor = super().compute()
        return torch.where(self.n_decided > 0, rate, torch.nan)


class OwnershipPValue(Metric):
    """Exact p-value of an ownership claim.

    See :func:`~gradsigns_lightning.metrics.functional.ownership_p_value`.

    Bits of all updates and ranks are pooled: give every independent bit once. ``update(preds, target)`` takes
    ``(..., N)`` bits (-1 for an erasure) and the signature's; ``compute()`` returns a float64 scalar, float32
    on a device without float64.

    Args:
        log10: return the p-value's base-10 logarithm, which does not underflow.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = OwnershipPValue()
        >>> metric(torch.ones(32, dtype=torch.int), torch.ones(32, dtype=torch.int))
        tensor(2.3283e-10, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_upper_bound = 1.0

    n_matches: Tensor
    n_decided: Tensor
    n_bits: Tensor

    def __init__(self, *, log10: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.log10 = log10
        self.add_state("n_matches", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("n_decided", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("n_bits", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count the matches of one reading."""
        n_matches, n_decided = count_matches(preds, target)
        self.n_matches += n_matches
        self.n_decided += n_decided
        self.n_bits += preds.numel()

    def compute(self) -> Tensor:
        """Return the p-value of all bits seen."""
        return p_value_of_counts(self.n_matches, self.n_decided, self.n_bits, log10=self.log10)


class SmallestMargin(Metric):
    """Distance of the worst bit from the wrong side.

    See :func:`~gradsigns_lightning.metrics.functional.smallest_margin`.

    ``update(preds, target)`` takes ``(..., N)`` projections of a unit-length gradient, not bits, and the
    signature's bits; ``compute()`` is the smallest over all updates and ranks, infinite before the first.

    Example:
        >>> metric = SmallestMargin()
        >>> metric(torch.tensor([-0.5, 1.5]), torch.tensor([0, 1]))
        tensor(0.5000)
    """

    is_differentiable = True
    higher_is_better = True
    full_state_update = False

    smallest: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("smallest", torch.tensor(torch.inf), dist_reduce_fx="min")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Include the margins of one reading."""
        self.smallest = torch.minimum(self.smallest, smallest_margin(preds, target))

    def compute(self) -> Tensor:
        """Return the smallest margin seen."""
        return self.smallest


class MeanInputGradient(Metric):
    """Mean of dJ/dx over the images of all updates and ranks, from which the bits are read.

    A signature is a property of the mean over all images, so ranks must share the gradient's sum, not their
    bits. ``update(gradients)`` takes ``(n, C, H, W)``, n may be 0; ``compute()`` returns ``(C, H, W)``, all
    zero before the first image.

    Args:
        input_shape: shape ``(C, H, W)`` of one input.
        kwargs: arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    n_images: Tensor

    def __init__(self, input_shape: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(input_shape, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("n_images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, gradients: Tensor) -> None:
        """Add the gradients of some images.

        Raises:
            ValueError: the gradients do not have the input's shape.
        """
        if gradients.shape[1:] != self.total.shape or gradients.ndim != self.total.ndim + 1:
            raise ValueError(
                f"`gradients` must have shape (n, {', '.join(map(str, self.total.shape))}), got "
                f"{tuple(gradients.shape)}."
            )
        self.total += gradients.detach().float().sum(0)
        self.n_images += gradients.shape[0]

    def compute(self) -> Tensor:
        """Return the mean gradient."""
        return self.total / self.n_images.clamp_min(1)
