"""Reading the signature from the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import TypeVar, overload

from torch import Tensor, nn

from gradsigns_lightning.core.key.payload import free_bits
from gradsigns_lightning.core.key.signature_key import KeyAsRead, SignatureKey
from gradsigns_lightning.core.result import DEFAULT_ALPHA, VerificationResult, decide
from gradsigns_lightning.core.signature import LogitsFn, read_z
from gradsigns_lightning.core.utils.checks import check_instance, check_int
from gradsigns_lightning.verification.foreign_modules import load_first
from gradsigns_lightning.verification.images import check_key, check_raw_images, readable_key, warn_if_unlike
from gradsigns_lightning.verification.mean_gradient import mean_gradient

Name = TypeVar("Name")


def verify(
    model: nn.Module,
    key: SignatureKey | str | PathLike[str],
    images: Tensor,
    *,
    alpha: float = DEFAULT_ALPHA,
    batch_size: int | None = None,
    logits: LogitsFn | None = None,
    carrier_layer: str | None = None,
    input_mean: float | Sequence[float] | None = None,
    input_std: float | Sequence[float] | None = None,
) -> VerificationResult:
    """Read one key from a model's weights (GradSigns, MLSys 2021, section 3.3).

    Works for any module that returns logits, on any device, in training or evaluation mode and inside
    ``no_grad`` and ``inference_mode``, also for frozen TorchScript, programs exported for a fixed batch size,
    and weights created under ``inference_mode``. Training flags, gradients, buffers, other attributes and
    random states are restored afterwards.

    Args:
        model: the suspect; it stays on its device.
        key: the owner's key, or its file.
        images: raw natural images of the target class in [0, 1], floating point, shape ``(n, C, H, W)``; 50
            or more. With ``carrier_layer`` the network's inputs as they are, for example token ids ``(n,
            length)``.
        alpha: significance level of the verdict.
        batch_size: images per pass; by default as many, up to 128, as fit into 4 GiB of activations (one
            image is passed first to measure them).
        logits: maps normalized inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``; by default ``model``
            itself.
        carrier_layer: name of the submodule whose output carries the mark instead of the input, as in the
            callback.
        input_mean: mean of the model's own input normalization, one value or one per channel; by default the
            key's. To check somebody else's claim, use what the model's documentation states.
        input_std: standard deviation of that normalization; by default the key's.

    Returns:
        The result. Its verdict assumes that the key's payload was fixed before the model existed; see
        ``free_bits`` where that is not known, for example for somebody else's key. The verdict is
        ``inconclusive`` if the gradient is all zero or not finite, or if the model classifies less than half
        of the images as the target class.

    Raises:
        ValueError: images of the wrong shape or range, a model that returns no logits, or an int8 model,
            which :func:`verify_api` reads.
        TypeError: an argument of the wrong type.
    """
    key = readable_key(key)
    n_free = free_bits(key)
    if input_mean is not None or input_std is not None:
        mean, std = (
            key.input_mean if input_mean is None else input_mean,
            key.input_std if input_std is None else input_std,
        )
        key = KeyAsRead.of(key, input_mean=mean, input_std=std)
    result = replace(
        _read(model, [key], images, alpha, batch_size, logits, carrier_layer)[0], free_bits=n_free
    )
    warn_if_unlike([result], len(images), key.target_class, stacklevel=2)
    return result


@overload
def verify_many(
    model: nn.Module,
    keys: Mapping[Name, SignatureKey | str | PathLike[str]],
    images: Tensor,
    *,
    alpha: float = DEFAULT_ALPHA,
    batch_size: int | None = None,
    logits: LogitsFn | None = None,
    carrier_layer: str | None = None,
) -> dict[Name, VerificationResult]: ...
@overload
def verify_many(
    model: nn.Module,
    keys: Sequence[SignatureKey | str | PathLike[str]],
    images: Tensor,
    *,
    alpha: float = DEFAULT_ALPHA,
    batch_size: int | None = None,
    logits: LogitsFn | None = None,
    carrier_layer: str | None = None,
) -> list[VerificationResult]: ...
def verify_many(
    model: nn.Module,
    keys: Sequence[SignatureKey | str | PathLike[str]] | Mapping[Name, SignatureKey | str | PathLike[str]],
    images: Tensor,
    *,
    alpha: float = DEFAULT_ALPHA,
    batch_size: int | None = None,
    logits: LogitsFn | None = None,
    carrier_layer: str | None = None,
) -> list[VerificationResult] | dict[Name, VerificationResult]:
    """Read many keys for the price of one gradient; see :func:`verify`.

    The keys must agree in target class, input shape and normalization. The p-values are not corrected for
    their number: who tries n keys multiplies them by n.

    Args:
        model: the suspect.
        keys: keys or key files; a mapping gives each a name.
        images: as for :func:`verify`.
        alpha: significance level of the verdicts.
        batch_size: as for :func:`verify`.
        logits: as for :func:`verify`.
        carrier_layer: as for :func:`verify`.

    Returns:
        The results, in the order of the keys; under their names if ``keys`` is a mapping.
    """
    given = list(keys.values()) if isinstance(keys, Mapping) else keys
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)) or not given:
        raise ValueError("`keys` must be a non-empty sequence of keys or key files, or a mapping to them.")
    opened = [readable_key(key, argument="keys") for key in given]
    results = _read(model, opened, images, alpha, batch_size, logits, carrier_layer)
    warn_if_unlike(results, len(images), opened[0].target_class, stacklevel=2)
    return dict(zip(keys, results, strict=True)) if isinstance(keys, Mapping) else results


def _read(
    model: nn.Module,
    keys: Sequence[SignatureKey],
    images: Tensor,
    alpha: float,
    batch_size: int | None,
    logits: LogitsFn | None,
    carrier_layer: str | None,
) -> list[VerificationResult]:
    _check_keys(keys)
    check_instance("model", model, nn.Module, hint=load_first(model))
    if batch_size is not None:
        check_int("batch_size", batch_size, minimum=1)
    if carrier_layer is None:
        check_raw_images(images, keys[0])
    logits_fn = model if logits is None else logits
    gradient, recognised = mean_gradient(model, logits_fn, images, keys[0], batch_size, carrier_layer)
    n_queries = images.shape[0]
    return [
        decide(read_z(key, gradient), key, n_queries=n_queries, alpha=alpha, recognised=recognised)
        for key in keys
    ]


def read_projections(model: nn.Module, key: SignatureKey, images: Tensor) -> tuple[Tensor, float]:
    """Return z of one key, shape ``(N,)``, and the share of images that were recognised.

    z is not compared with the key's signature. Arguments and errors are those of :func:`verify`.
    """
    check_key(key)
    check_raw_images(images, key)
    gradient, recognised = mean_gradient(model, model, images, key, None)
    return read_z(key, gradient), recognised


def _check_keys(keys: Sequence[SignatureKey]) -> None:
    for key in keys:
        check_key(key)
    for name in ("target_class", "input_shape", "input_mean", "input_std"):
        values = {getattr(key, name) for key in keys}
        if len(values) > 1:
            raise ValueError(f"`keys` must agree in `{name}`, got {len(values)} different values.")
