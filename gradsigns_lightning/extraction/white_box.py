"""Reading the signature from the weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradsigns_lightning.core.checks import check_instance, check_int
from gradsigns_lightning.core.frozen import frozen_statistics, gradients_enabled, twice_differentiable_kernels
from gradsigns_lightning.core.inputs import carrier_inputs
from gradsigns_lightning.core.key import WatermarkKey, key_of
from gradsigns_lightning.core.memory import saved_bytes
from gradsigns_lightning.core.signature import LogitsFn, as_logits, channel_values, input_gradients, pixel_scale, project, unit
from gradsigns_lightning.core.signature_key import KeyAsRead, SignatureKey, check_carriers
from gradsigns_lightning.extraction.foreign_modules import any_batch_size, refuse_int8, without_inference_tensors
from gradsigns_lightning.extraction.result import DEFAULT_ALPHA, VerificationResult, decide, free_bits

if TYPE_CHECKING:
    from gradsigns_lightning.extraction.tracing import TraceResult

_BATCH_SIZE = 128  # at most, where nothing is said
_MOST_BYTES = 4 << 30  # of activations, likewise
_PEAK = 3  # times what is kept, at most: 2.8 were measured of attention, whose backward pass copies what it kept
_COPIES = 3  # of an image and its gradient in float64
Name = TypeVar("Name")
_LOAD_FIRST = "Load it first, as by Net.load_from_checkpoint(path), and give the module."
MIN_IMAGES = 50  # below, the sampling noise of the mean gradient costs bits


class FewImagesWarning(UserWarning):
    """There are fewer than :data:`MIN_IMAGES` images, and more might change the verdict."""


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

    Works for any module that returns logits, on any device, in training or evaluation mode and inside ``no_grad`` and
    ``inference_mode``, also frozen TorchScript, programs exported for batches of one size, and weights made under
    ``inference_mode``; training flags, gradients, buffers, other attributes and random states are as before afterwards.

    Args:
        model: the suspect; moved nowhere.
        key: the owner's key, or its file.
        images: raw natural images of the target class in [0, 1], floating point, shape ``(n, C, H, W)``; 50 or more. With
            ``carrier_layer`` the network's inputs as they are, for example token ids ``(n, length)``.
        alpha: significance level of the verdict.
        batch_size: images per pass; by default as many, up to 128, as take 4 GiB for activations (one image is passed first to
            tell).
        logits: maps normalised inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``; by default ``model`` itself.
        carrier_layer: name of the submodule whose output carries the mark instead of the input, as in the callback.
        input_mean: mean of the model's own input normalisation, one value or one per channel; by default the key's. Who checks
            somebody else's claim states what the model's documentation says.
        input_std: standard deviation of that normalisation; by default the key's.

    Returns:
        The result. Its verdict takes the key's payload for fixed before the model was there; see ``free_bits`` where that is not
        known, as of somebody else's key. ``inconclusive`` if the gradient is all zero or not finite, or if the model takes less
        than half of the images for the target class.

    Raises:
        ValueError: images of the wrong shape or range, a model that returns no logits, or an int8 model, which
            :func:`verify_api` reads.
        TypeError: an argument of the wrong type.
    """
    key = readable_key(key)
    n_free = free_bits(key)
    if input_mean is not None or input_std is not None:
        mean, std = key.input_mean if input_mean is None else input_mean, key.input_std if input_std is None else input_std
        key = KeyAsRead.of(key, input_mean=mean, input_std=std)
    result = replace(_read(model, [key], images, alpha, batch_size, logits, carrier_layer)[0], free_bits=n_free)
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
    """Read many keys of one class, input shape and normalisation for the price of one gradient; see :func:`verify`.

    The p-values are those of single claims: who tries n keys multiplies them by n.

    Args:
        model: the suspect.
        keys: keys or key files; a mapping gives each a name.
        images: as for :func:`verify`, like what follows.
        alpha: significance level of the verdicts.
        batch_size: images per pass.
        logits: maps normalised inputs to logits.
        carrier_layer: name of the submodule whose output carries the mark.

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
    check_instance("model", model, nn.Module, hint=_LOAD_FIRST if isinstance(model, (str, PathLike, Mapping)) else "")
    if batch_size is not None:
        check_int("batch_size", batch_size, minimum=1)
    if carrier_layer is None:
        check_images(images, keys[0])
    logits_fn = model if logits is None else logits
    gradient, recognised = _mean_gradient(model, logits_fn, images, keys[0], batch_size, carrier_layer)
    n_queries = images.shape[0]
    return [
        decide(project(key, unit(gradient[key.carriers])), key, n_queries=n_queries, alpha=alpha, recognised=recognised)
        for key in keys
    ]


def read_projections(model: nn.Module, key: SignatureKey, images: Tensor) -> tuple[npt.NDArray[np.float64], float]:
    """Return z of one key, shape ``(N,)``, not compared with its signature, and the share of images that were recognised.

    Arguments and errors as for :func:`verify`.
    """
    check_key(key)
    check_images(images, key)
    gradient, recognised = _mean_gradient(model, model, images, key, None)
    projections: npt.NDArray[np.float64] = project(key, unit(gradient[key.carriers])).numpy()
    return projections, recognised


def _mean_gradient(
    model: nn.Module,
    logits_fn: LogitsFn,
    images: Tensor,
    key: SignatureKey,
    batch_size: int | None,
    carrier_layer: str | None = None,
) -> tuple[Tensor, float]:
    """Return the mean direction of the images' raw-pixel gradients, flat, and the share taken for the target class."""
    refuse_int8(model)
    logits_fn = any_batch_size(model, logits_fn) if logits_fn is model else logits_fn
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inverse_std = channel_values(key.input_std, key, device="cpu", dtype=torch.float64).reciprocal()
    total = torch.zeros_like(inverse_std)
    n_target = 0

    def counted(logits_of: LogitsFn, inputs: Tensor) -> Tensor:
        nonlocal n_target
        with shapes_named(key, model) if carrier_layer is None else nullcontext():
            answer = as_logits(logits_of(inputs))
        if isinstance(answer, Tensor) and answer.ndim == 2:
            n_target += int((answer.detach().argmax(1) == key.target_class).sum())
        return answer  # type: ignore[no-any-return]

    def gradients_of(batch: Tensor, watch: Callable[[LogitsFn, Tensor], Tensor]) -> Tensor:
        inputs = (batch if carrier_layer else normalise(batch, key)).to(device)
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
            batch_size = _pass_size(model, lambda: gradients_of(images[:1], lambda logits_of, inputs: logits_of(inputs)), n_bytes)
        for batch in torch.split(images, batch_size):
            gradient = gradients_of(batch, counted)
            # Not in place: `total` may be an inference tensor.
            total = total + unit(gradient.double().cpu().flatten(1) * inverse_std).sum(0)
    return total / images.shape[0], n_target / images.shape[0]


def _pass_size(model: nn.Module, pass_one_image: Callable[[], Tensor], n_bytes: int) -> int:
    """Return how many images to pass at once; each takes ``n_bytes`` itself, and the network may be large, or a stranger's."""
    try:
        n_bytes += _PEAK * saved_bytes(model, pass_one_image)
    except Exception:  # what does not take one image alone may take a batch; if not, that pass gives the error
        return _BATCH_SIZE
    return min(_BATCH_SIZE, max(1, _MOST_BYTES // max(1, n_bytes)))


class RawInputs(nn.Module):
    """A classifier of raw images, made of one whose inputs are normalised.

    Args:
        model: takes normalised images ``(n, C, H, W)`` and returns logits.
        input_mean: mean of its normalisation, one value or one per channel.
        input_std: standard deviation, positive, one value or one per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, *, input_mean: Sequence[float], input_std: Sequence[float]) -> None:
        super().__init__()
        check_instance("model", model, nn.Module)
        self.model = model
        self.register_buffer("mean", torch.tensor(input_mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(input_std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of raw images ``(n, C, H, W)`` in [0, 1]."""
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits


def normalise(images: Tensor, key: SignatureKey) -> Tensor:
    """Make the model's inputs from raw images as the key's ``input_mean`` and ``input_std`` say."""
    mean, std = pixel_scale(key, device=images.device, dtype=images.dtype)
    return (images - mean) / std


def _check_keys(keys: Sequence[SignatureKey]) -> None:
    for key in keys:
        check_key(key)
    for name in ("target_class", "input_shape", "input_mean", "input_std"):
        values = {getattr(key, name) for key in keys}
        if len(values) > 1:
            raise ValueError(f"`keys` must agree in `{name}`, got {len(values)} different values.")


def readable_key(key: SignatureKey | str | PathLike[str], *, argument: str = "key") -> SignatureKey:
    """Return a key as readers take it: anybody's :class:`SignatureKey`, a :class:`WatermarkKey`, or the latter's file.

    Raises:
        ValueError: the file is missing, damaged or no key file.
        TypeError: it is no key and no path.
    """
    is_others = not isinstance(key, (WatermarkKey, str, PathLike)) and isinstance(key, SignatureKey)
    return key if is_others else key_of(key, argument=argument)  # type: ignore[return-value, arg-type]


def check_key(key: SignatureKey) -> None:
    """Refuse a key whose arrays do not fit together; those of :class:`WatermarkKey` do."""
    if not isinstance(key, WatermarkKey):
        check_carriers(key)


@contextmanager
def shapes_named(key: SignatureKey, model: nn.Module) -> Iterator[None]:
    """Let the error of a network that does not take the images say which shape they have, and whose it is.

    Raises:
        ValueError: the network raised an error of its own.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"`model` ({type(model).__name__}) must take images of the key's `input_shape` {tuple(key.input_shape)}, which the "
            f"images have; it raised: {str(error).strip().rstrip('.')[:500]}. Is this the model that the key was made for?"
        ) from error


def check_images(images: Tensor, key: SignatureKey) -> None:
    """Refuse images that are not raw, of the key's shape and at least one."""
    check_instance("images", images, Tensor, hint="Of an array torch.from_numpy makes one, of a list of images torch.stack.")
    hint = " Divide bytes by 255." if images.dtype == torch.uint8 else ""
    if images.ndim == 4 and (images.shape[3], *images.shape[1:3]) == key.input_shape != tuple(images.shape[1:]):
        hint += " Channels come first: images.permute(0, 3, 1, 2)."
    if not images.is_floating_point() or images.ndim != 4 or tuple(images.shape[1:]) != key.input_shape or len(images) == 0:
        raise ValueError(
            f"`images` must be floating point of shape (n, {', '.join(map(str, key.input_shape))}) with n >= 1 as the key's "
            f"`input_shape` says, got {images.dtype} of shape {tuple(images.shape)}.{hint}"
        )
    low, high = (float(v) for v in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"`images` must be raw pixels in [0, 1] (before any normalisation), got values from {low:g} to {high:g}."
        )


def warn_if_unlike(
    results: Sequence[VerificationResult | TraceResult],
    n_images: int,
    target_class: int,
    *,
    n_asked: int | None = None,
    stacklevel: int,
) -> None:
    """Warn of too few images where more might have changed a verdict, and of images that the model does not take for the class.

    Args:
        results: what was found by one reading.
        n_images: images at hand.
        target_class: class T.
        n_asked: of how many images the share that was recognised is; by default of all.
        stacklevel: of the caller whom the warning is for, seen from this function's caller, who is 1.
    """
    n_asked = n_images if n_asked is None else n_asked
    recognised = results[0].recognised
    if any(result.verdict != "owned" and result.n_matches < result.n_bits for result in results):
        warn_if_few(n_images, stacklevel=stacklevel + 1)
    if recognised < 0.5:
        warnings.warn(
            f"The model takes only {round(recognised * n_asked)} of {n_asked} images for class {target_class}: nothing is "
            "concluded. Are they of the target class, raw in [0, 1], and do `input_mean` and `input_std` fit the model?",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def warn_if_few(n_images: int, *, stacklevel: int) -> None:
    """Warn of too few images; ``stacklevel`` as for :func:`warn_if_unlike`."""
    if n_images < MIN_IMAGES:
        plural = "s" if n_images > 1 else ""
        warnings.warn(
            f"Only {n_images} image{plural}: below {MIN_IMAGES} the mean gradient is noisy and bits can get lost.",
            FewImagesWarning,
            stacklevel=stacklevel + 1,
        )
