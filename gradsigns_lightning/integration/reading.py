"""Reads the mark on held-out images while Lightning validates or tests."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.inputs import carrier_inputs
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.result import is_readable, signed_by
from gradsigns_lightning.core.signature import (
    LogitsFn,
    SignatureProjector,
    as_logits,
    input_gradients,
    read_z,
)
from gradsigns_lightning.core.torch_state.contexts import (
    frozen_statistics,
    gradients_enabled,
    twice_differentiable_kernels,
)
from gradsigns_lightning.core.torch_state.precision import widest_float
from gradsigns_lightning.metrics import MeanInputGradient
from gradsigns_lightning.metrics.functional import bit_error_rate, bits_of, ownership_p_value, smallest_margin

METRICS = ("ber", "log10_p_value", "p_value", "margin")  # both p-values: loggers round 1e-39 to 0
ProjectorFn = Callable[[torch.device, torch.dtype], SignatureProjector]


class HeldOutEstimator:
    """Accumulates the mean input gradient over batches and ranks, and turns it into figures.

    Args:
        key: the owner's key.
        projector: returns the key's tensors on a device.
        n_images: images of the target class that are read on each rank.
        carrier_layer: name of the submodule whose output carries the mark, or None for the input.
    """

    def __init__(
        self, key: WatermarkKey, projector: ProjectorFn, n_images: int, carrier_layer: str | None
    ) -> None:
        self.key = key
        self.n_images = n_images
        self.carrier_layer = carrier_layer
        self.margins: list[float] | None = None  # (2 b_j - 1) z_j of the last reading
        self.read_at = 0  # optimizer steps made before it
        self.lengths: Tensor | None = None  # of the weights that were read; None if not known
        self._projector = projector
        self._gradient = _CountedGradient(key.input_shape)
        self._n_read = 0

    @property
    def n_found(self) -> int:
        """Images of the last reading, on all ranks together."""
        return self._gradient.n_found

    @property
    def recognised(self) -> float:
        """Share of those images that the model recognises as the target class."""
        return self._gradient.recognised

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
        self.lengths = None

    def read(
        self, module: nn.Module, logits_fn: LogitsFn, images: Tensor, labels: Tensor, *, always: bool = False
    ) -> None:
        """Add the gradients of the target class's images of one batch.

        Args:
            module: module whose parameters are read.
            logits_fn: maps inputs to logits.
            images: inputs of the batch, shape ``(n, ...)``.
            labels: classes, shape ``(n,)``.
            always: pass an image through the network even if there is none to read, because other ranks wait
                for this one.
        """
        chosen = images[labels == self.key.target_class][: self.n_images - self._n_read]
        n_chosen = len(chosen)
        if not n_chosen:
            if not always:
                return
            chosen = images[:1]
        self._n_read += n_chosen
        with (
            gradients_enabled(),
            frozen_statistics(module),
            twice_differentiable_kernels(module, chosen.device.type),
        ):
            inputs, logits_fn = carrier_inputs(
                module, logits_fn, chosen, self.key.input_shape, self.carrier_layer
            )
            outputs: list[Tensor] = []
            gradients = input_gradients(_noted(logits_fn, outputs), inputs, self.key.target_class)
            directions = self._projector(gradients.device, gradients.dtype).directions(gradients[:n_chosen])
        n_recognised = (outputs[0][:n_chosen].argmax(1) == self.key.target_class).sum()
        self._gradient.update(directions.view(-1, *self.key.input_shape), n_recognised)

    def finish(self, *, step: int) -> dict[str, Tensor] | None:
        """Return the figures over all ranks after ``step`` optimizer steps.

        None if the gradient is all zero or non-finite.
        """
        # Ranks share the gradient, not their bits: the signature is a property of the mean over all images.
        self.margins, self.read_at = None, step
        gradient = self._gradient.compute()
        z = read_z(self.key, gradient)
        if not bool(is_readable(z)):
            return None
        signature, bits = self.key.signature, bits_of(z)
        self.margins = signed_by(z, signature).tolist()
        figures = {
            "ber": bit_error_rate(bits, signature),
            "log10_p_value": ownership_p_value(bits, signature, log10=True),
            "p_value": ownership_p_value(bits, signature),
            "margin": smallest_margin(z, signature),
        }
        return {
            name: figure.to(gradient.device, widest_float(gradient.device))
            for name, figure in figures.items()
        }

    def missing(self) -> dict[str, Tensor]:
        """Return the figures of a reading that found nothing: all NaN."""
        return {name: torch.tensor(math.nan, device=self._gradient.total.device) for name in METRICS}


def _noted(logits_fn: LogitsFn, outputs: list[Tensor]) -> LogitsFn:
    def call(inputs: Tensor) -> Tensor:
        outputs.append(as_logits(logits_fn(inputs)))
        return outputs[-1]

    return call


class _CountedGradient(MeanInputGradient):
    n_found = 0  # images of all ranks in the last mean
    recognised = math.nan  # share of them that were recognised as the target class

    n_recognised: Tensor

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__(input_shape)
        self.add_state("n_recognised", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, gradients: Tensor, n_recognised: Tensor | int = 0) -> None:
        super().update(gradients)
        self.n_recognised += n_recognised

    def compute(self) -> Tensor:
        self.n_found = int(self.n_images)  # summed over the ranks only here
        self.recognised = int(self.n_recognised) / self.n_found if self.n_found else math.nan
        return super().compute()
