"""The mean input gradient of a suspect, in passes that fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradsigns_lightning.core.inputs import carrier_inputs
from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.core.signature import LogitsFn, as_logits, directions, input_gradients, inverse_std
from gradsigns_lightning.core.torch_state.contexts import (
    frozen_statistics,
    gradients_enabled,
    twice_differentiable_kernels,
)
from gradsigns_lightning.core.torch_state.memory import saved_bytes
from gradsigns_lightning.verification.foreign_modules import (
    any_batch_size,
    refuse_int8,
    shapes_named,
    without_inference_tensors,
)
from gradsigns_lightning.verification.images import normalize

_BATCH_SIZE = 128  # at most, where the caller gives none
_MOST_BYTES = 4 << 30  # of activations, where the caller gives no batch size
# peak memory, in multiples of the saved tensors: 2.8 was measured for attention, whose backward copies them
_PEAK = 3
_COPIES = 3  # of an image and its gradient in float64


def mean_gradient(
    model: nn.Module,
    logits_fn: LogitsFn,
    images: Tensor,
    key: SignatureKey,
    batch_size: int | None,
    carrier_layer: str | None = None,
) -> tuple[Tensor, float]:
    """Return the mean direction of the raw-pixel gradients, flat, and the share of images recognised.

    Arguments and errors are those of :func:`verify`.
    """
    refuse_int8(model)
    logits_fn = any_batch_size(model, logits_fn) if logits_fn is model else logits_fn
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    scale = inverse_std(key, device="cpu", dtype=torch.float64)
    total = torch.zeros_like(scale)
    counted = _Counted(model, key, is_layer=carrier_layer is not None)

    def gradients_of(batch: Tensor, watch: Callable[[LogitsFn, Tensor], Tensor]) -> Tensor:
        batch = batch.detach()  # a graph of the caller's must not grow here
        inputs = (batch if carrier_layer else normalize(batch, key)).to(device)
        carriers, logits_of = carrier_inputs(model, logits_fn, inputs, key.input_shape, carrier_layer)
        return input_gradients(partial(watch, logits_of), carriers, key.target_class)

    with (
        gradients_enabled(),
        without_inference_tensors(model),
        frozen_statistics(model),
        twice_differentiable_kernels(model, device.type),
    ):
        if batch_size is None:
            n_bytes = _COPIES * 8 * images[0].numel()
            batch_size = _pass_size(
                model, lambda: gradients_of(images[:1], lambda logits_of, inputs: logits_of(inputs)), n_bytes
            )
        for batch in torch.split(images, batch_size):
            gradient = gradients_of(batch, counted)
            # Not in place: `total` may be an inference tensor.
            total = total + directions(gradient.double().cpu(), scale).sum(0)
    return total / images.shape[0], counted.n_recognised / images.shape[0]


class _Counted:
    """Passes on a network's logits, and counts the images that it classifies as the target class."""

    def __init__(self, model: nn.Module, key: SignatureKey, *, is_layer: bool) -> None:
        self.n_recognised = 0
        self._model, self._key, self._is_layer = model, key, is_layer

    def __call__(self, logits_of: LogitsFn, inputs: Tensor) -> Any:
        with nullcontext() if self._is_layer else shapes_named(self._key, self._model):
            logits = as_logits(logits_of(inputs))
        if isinstance(logits, Tensor) and logits.ndim == 2:
            self.n_recognised += int((logits.detach().argmax(1) == self._key.target_class).sum())
        return logits


def _pass_size(model: nn.Module, pass_one_image: Callable[[], Tensor], n_bytes: int) -> int:
    """Return how many images to pass at once, given the bytes that each takes besides its activations."""
    try:
        n_bytes += _PEAK * saved_bytes(model, pass_one_image)
    # a network that does not take one image alone may take a batch; if not, that pass raises the error
    except Exception:
        return _BATCH_SIZE
    return min(_BATCH_SIZE, max(1, _MOST_BYTES // max(1, n_bytes)))
