"""Reads the mark on held-out images while Lightning validates or tests."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.frozen import frozen_statistics, gradients_enabled, twice_differentiable_kernels
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.signature import LogitsFn, SignatureProjector, input_gradients
from gradsigns_lightning.core.statistics import log10_ownership_p_value
from gradsigns_lightning.metrics import MeanInputGradient
from gradsigns_lightning.metrics.functional import bit_error_rate, ownership_p_value, smallest_margin

METRICS = ("ber", "p_value", "log10_p_value", "margin")
ProjectorFn = Callable[[torch.device, torch.dtype], SignatureProjector]


class HeldOutReader:
    """Accumulates the mean input gradient over batches and ranks, and turns it into figures.

    Args:
        key: the owner's key.
        projector: gives the key's tensors on a device.
        n_images: images of the target class that are read on each rank.
    """

    def __init__(self, key: WatermarkKey, projector: ProjectorFn, n_images: int) -> None:
        self.key = key
        self.n_images = n_images
        self.margins: list[float] | None = None  # (2 b_j - 1) z_j of the last reading
        self._projector = projector
        self._gradient = MeanInputGradient(key.input_shape)
        self._n_read = 0

    @property
    def wants_more(self) -> bool:
        """Whether images are still missing."""
        return self._n_read < self.n_images

    def start(self, device: torch.device) -> None:
        """Forget the images read so far."""
        self._gradient.to(device).reset()
        # A rank may see no image of the class; torchmetrics warns of a metric that was never updated.
        self._gradient.update(torch.zeros(0, *self.key.input_shape, device=device))
        self._n_read = 0

    def read(self, module: nn.Module, logits_fn: LogitsFn, images: Tensor, labels: Tensor) -> None:
        """Add the gradients of the target class's images of one batch."""
        chosen = images[labels == self.key.target_class][: self.n_images - self._n_read]
        if not len(chosen):
            return
        self._n_read += len(chosen)
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        with gradients_enabled(), frozen_statistics(module), twice_differentiable_kernels(module, chosen.device.type):
            gradients = input_gradients(logits_fn, chosen.to(dtype), self.key.target_class)
        self._gradient.update(gradients)

    def finish(self) -> dict[str, Tensor] | None:
        """Return the figures over all ranks, or None if the gradient is all zero or not finite."""
        # Ranks share the gradient, not their bits: the signature is a property of the mean over all images.
        gradient = self._gradient.compute()
        projector = self._projector(gradient.device, gradient.dtype)
        z = projector.project(projector.carrier_gradient(gradient))
        if not (bool(z.isfinite().all()) and bool(z.any())):
            return None
        signature = self.key.signature.to(gradient.device)
        bits = (z > 0).to(signature.dtype)
        self.margins = (projector.signs * z).tolist()
        n_matches = int((bits == signature).sum())
        return {
            "ber": bit_error_rate(bits, signature),
            "p_value": ownership_p_value(bits, signature).to(_widest(gradient.device)),
            "log10_p_value": torch.tensor(log10_ownership_p_value(n_matches, self.key.n_bits), device=gradient.device),
            "margin": smallest_margin(z, signature),
        }

    def missing(self) -> dict[str, Tensor]:
        """Return the figures of a reading that found nothing: all NaN."""
        return {name: torch.tensor(math.nan, device=self._gradient.total.device) for name in METRICS}


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
