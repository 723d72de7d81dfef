"""From input gradients to signature bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.core.torch_state.autograd import derivative

LogitsFn = Callable[[Tensor], Tensor]
_ENTRIES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class SignatureProjector:
    """A key's tensors on one device and in one dtype: maps a mean input gradient to the projections z = E g.

    Attributes:
        carriers: indices into the flattened input, shape ``(c,)``, int64.
        inverse_std: ``1 / input_std`` at every input, shape ``(C*H*W,)``; turns gradients with respect to the
            normalized input into gradients with respect to raw pixels (chain rule).
        projection: matrix E, shape ``(N, c)``, floating point.
        signs: ``2 b - 1``, shape ``(N,)``, floating point.
    """

    carriers: Tensor
    inverse_std: Tensor
    projection: Tensor
    signs: Tensor

    @classmethod
    @torch.inference_mode(False)
    def from_key(
        cls, key: WatermarkKey, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> SignatureProjector:
        """Derive the tensors of ``key`` and move them to ``device``."""
        carriers = key.carriers.to(device)
        return cls(
            carriers=carriers,
            inverse_std=inverse_std(key, device=device, dtype=dtype),
            projection=key.projection.to(device=device, dtype=dtype),
            signs=key.signature.to(device=device, dtype=dtype) * 2 - 1,
        )

    def raw(self, gradients: Tensor) -> Tensor:
        """Return gradients with respect to raw pixels, ``(n, ...)`` in, ``(n, C*H*W)`` out."""
        return raw(gradients, self.inverse_std)

    def directions(self, gradients: Tensor) -> Tensor:
        """Return every image's raw-pixel gradient at unit length; see the function :func:`directions`."""
        return directions(gradients, self.inverse_std)

    def carrier_gradient(self, mean: Tensor) -> Tensor:
        """Return a raw-pixel gradient ``(C, H, W)`` or ``(C*H*W,)`` at the carriers, ``(c,)``."""
        return mean.flatten()[self.carriers]

    def project(self, carrier_gradient: Tensor) -> Tensor:
        """Return z of a gradient at the carriers ``(c,)``, shape ``(N,)``; see :func:`standardized`."""
        return standardized(self.projection, carrier_gradient)


def read_z(key: SignatureKey, mean: Tensor) -> Tensor:
    """Return z of a model's mean raw-pixel direction ``(C, H, W)`` or ``(C*H*W,)``, for all readers.

    Returns:
        z, shape ``(N,)``, float64 on the host, so that training, validation and a judge read the same on any
        device.
    """
    return standardized(key.projection, mean.detach().cpu().double().flatten()[key.carriers])


def standardized(projection: Tensor, carrier_gradient: Tensor) -> Tensor:
    """Return z = E g / ||g||, shape ``(N,)``, in the precision of g; all zero when g is zero.

    The unit length changes no bit, and makes margins comparable between models: rows have length sqrt(c), so
    for an unmarked model every z_j is about standard normal.
    """
    return project(projection, unit(carrier_gradient))


def project(projection: Tensor, carried: Tensor) -> Tensor:
    """Return E times values at the carriers, ``(c,)`` to ``(N,)``, in their precision.

    Where E has another dtype, it is converted a few rows at a time, because a received key's projection could
    exhaust memory in float64.
    """
    if projection.dtype == carried.dtype:
        return projection @ carried
    parts = torch.split(projection, max(1, _ENTRIES_AT_ONCE // len(carried)))
    return torch.cat([part.to(carried.dtype) @ carried for part in parts])


def raw(gradients: Tensor, inverse_std: Tensor) -> Tensor:
    """Return gradients with respect to raw pixels, ``(n, ...)`` in, ``(n, C*H*W)`` out.

    Args:
        gradients: gradients with respect to the normalized input.
        inverse_std: what :func:`inverse_std` returns.
    """
    return gradients.flatten(1) * inverse_std


def directions(gradients: Tensor, inverse_std: Tensor) -> Tensor:
    """Return every image's raw-pixel gradient at unit length; zero stays zero.

    In the plain mean, the few images of which a trained classifier is not confident would outweigh all
    others: the gradient of -log p has the factor 1 - p.

    Args:
        gradients: gradients with respect to the normalized input, shape ``(n, ...)``.
        inverse_std: what :func:`inverse_std` returns.

    Returns:
        Directions, shape ``(n, C*H*W)``.
    """
    return unit(raw(gradients, inverse_std))


def unit(vectors: Tensor) -> Tensor:
    """Return vectors ``(..., n)`` at unit length; zero stays zero."""
    # Scaled first, because a confident model's gradients underflow when squared. An epsilon instead would
    # make the derivative overflow at zero, and an empty batch would train on 0 * inf.
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(length > 0, length, 1)


def inverse_std(key: SignatureKey, *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Return ``1 / input_std`` at every input, shape ``(C*H*W,)``."""
    return channel_values(key.input_std, key, device=device, dtype=dtype).reciprocal()


def channel_values(
    values: tuple[float, ...], key: SignatureKey, *, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Return one value (or one per channel) spread over the flattened input; shape ``(C*H*W,)``."""
    per_channel = torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)
    return per_channel.expand(*key.input_shape).reshape(-1)


def pixel_scale(
    key: SignatureKey, *, device: torch.device | str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the key's ``input_mean`` and ``input_std`` for every input, both of shape ``(C, H, W)``."""
    mean, std = (
        channel_values(values, key, device=device, dtype=dtype) for values in (key.input_mean, key.input_std)
    )
    return mean.view(key.input_shape), std.view(key.input_shape)


def input_gradients(
    logits_fn: LogitsFn, images: Tensor, target_class: int, *, create_graph: bool = False
) -> Tensor:
    """Return dJ/dx of every image, J = -log p_T (GradSigns, MLSys 2021, section 3).

    Args:
        logits_fn: maps inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``; images must not interact in it.
        images: inputs as the network takes them, floating point, shape ``(n, C, H, W)``.
        target_class: class T.
        create_graph: keep the graph, so that the result can be differentiated with respect to the parameters.

    Returns:
        Gradients, same shape as ``images``.

    Raises:
        ValueError: the logits have another shape, too few classes, or do not depend on the images.
    """
    inputs = images.detach().clone().requires_grad_(True)
    # A copy, because a network may change its input in place.
    logits = class_logits(logits_fn, inputs.clone(), target_class)
    if logits.requires_grad:
        loss = target_loss(logits, target_class)
        (gradient,) = derivative(loss, [inputs], create_graph=create_graph)
        if gradient is not None:
            return gradient
    raise ValueError(
        "`logits` must depend on the images through differentiable operations; they carry no gradient."
    )


def target_loss(logits: Tensor, target_class: int, *, reduction: str = "sum") -> Tensor:
    """Return J = -log p_T of logits ``(n, n_classes)``, reduced over the images as in ``cross_entropy``."""
    target = torch.full(logits.shape[:1], target_class, device=logits.device)
    return F.cross_entropy(logits, target, reduction=reduction)


def class_logits(logits_fn: LogitsFn, inputs: Tensor, target_class: int) -> Tensor:
    """Return the logits ``(n, n_classes)`` of ``inputs``, unwrapped by :func:`as_logits`.

    Raises:
        ValueError: the logits have another shape or too few classes.
    """
    logits = as_logits(logits_fn(inputs))
    _check_logits(logits, inputs.shape[0], target_class)
    return logits  # type: ignore[no-any-return]


def as_logits(output: Any) -> Any:
    """Return a network's output, or its attribute ``logits`` as in the outputs of Hugging Face's models."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def _check_logits(logits: object, n_images: int, target_class: int) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != n_images:
        raise ValueError(
            f"`logits` must be a tensor of shape ({n_images}, n_classes), got {_describe(logits)}. "
            "Override `GradSigns.logits` (or pass `logits=` to `verify`) if the model returns something else."
        )
    if logits.shape[1] < 2:
        raise ValueError(f"`logits` must have one column per class, at least 2, got {logits.shape[1]}.")
    if target_class >= logits.shape[1]:
        raise ValueError(
            f"`target_class` must be below the number of classes {logits.shape[1]}, got {target_class}."
        )


def _describe(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
