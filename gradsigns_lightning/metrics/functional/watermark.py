"""Pure functions of signature bits and projections."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_hamming_distance

from gradsigns_lightning.core.result import BitCounts, is_readable, readable, signed_by
from gradsigns_lightning.core.torch_state.precision import widest_float

ERASED = -1  # stands for a bit that could not be decided
_BITS = (0, 1)


def bits_of(projections: Tensor) -> Tensor:
    """Bits that projections decide, as in every reading.

    Args:
        projections: z of one model, ``(..., N)``.

    Returns:
        1 above zero, 0 below, -1 for an erasure: an exact tie, or every bit if any value is not finite; int8.

    Example:
        >>> bits_of(torch.tensor([-0.5, 1.5, 0.0]))
        tensor([ 0,  1, -1], dtype=torch.int8)
    """
    z = readable(projections)
    return torch.where(z == 0, ERASED, (z > 0).to(torch.int8))


def bit_error_rate(preds: Tensor, target: Tensor) -> Tensor:
    r"""Share of decided bits that differ.

    .. math:: \text{BER} = \frac{1}{N} \sum_{j=1}^{N} [\hat b_j \neq b_j]

    Args:
        preds: bits read, ``(..., N)``, integer 0 or 1, or -1 for an erasure (:func:`bits_of`), which does not
            count; or scores in [0, 1] that are thresholded at 0.5.
        target: the signature's bits, same shape, integer 0 or 1.

    Returns:
        Scalar float in [0, 1]; NaN when no bit was decided.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> bit_error_rate(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0]))
        tensor(0.2500)
    """
    preds, target = decided(preds, target)
    return (
        binary_hamming_distance(preds, target)
        if preds.numel()
        else torch.tensor(torch.nan, device=preds.device)
    )


def ownership_p_value(preds: Tensor, target: Tensor, *, log10: bool = False) -> Tensor:
    r"""Exact probability that an unmarked model matches at least as many bits.

    .. math:: p = P[\text{Bin}(N, 1/2) \geq \text{matches}]

    Args:
        preds: bits read, ``(..., N)``, 0 or 1, or -1 for an erasure (:func:`bits_of`), which does not count.
        target: the signature's bits, same shape, 0 or 1.
        log10: return its base-10 logarithm, which does not underflow.

    Returns:
        Scalar float64, because float32 underflows from 150 bits on; float32 on a device without float64. NaN
        when all bits are erasures.

    Raises:
        ValueError: shapes differ, or a value is not a bit.

    Example:
        >>> ownership_p_value(torch.ones(32, dtype=torch.int), torch.ones(32, dtype=torch.int))
        tensor(2.3283e-10, dtype=torch.float64)
    """
    return p_value_of_counts(*count_matches(preds, target), torch.tensor(preds.numel()), log10=log10)


def smallest_margin(preds: Tensor, target: Tensor) -> Tensor:
    r"""Distance of the worst bit from the wrong side; negative if a bit is wrong.

    .. math:: \min_j (2 b_j - 1) z_j

    Args:
        preds: projections z, not bits, ``(..., N)``, floating point, of a unit-length gradient.
        target: the signature's bits, same shape, 0 or 1.

    Returns:
        Scalar, dtype of ``preds``; NaN when no bit is decided.

    Raises:
        ValueError: shapes differ, or ``target`` holds a value that is not a bit.
        TypeError: ``preds`` is not floating point.

    Example:
        >>> smallest_margin(torch.tensor([-0.5, 1.5]), torch.tensor([0, 1]))
        tensor(0.5000)
    """
    _check_same_shape(preds, target)
    _check_among("target", target, _BITS)
    if not preds.is_floating_point():
        raise TypeError(f"`preds` must be floating-point projections z, not bits, got {preds.dtype}.")
    return torch.where(is_readable(preds), signed_by(preds, target).min(), torch.nan)


def decided(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return read and true bits without the erasures, flattened if there are any."""
    _check_same_shape(preds, target)
    known = preds != ERASED
    return (preds, target) if bool(known.all()) else (preds[known], target[known])


def count_matches(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return matching bits and decided bits as int64 scalars."""
    _check_same_shape(preds, target)
    _check_among("preds", preds, (*_BITS, ERASED))
    _check_among("target", target, _BITS)
    return (preds == target).sum(), (preds != ERASED).sum()


def p_value_of_counts(n_matches: Tensor, n_decided: Tensor, n_bits: Tensor, *, log10: bool = False) -> Tensor:
    """Return the p-value of integer scalars, or its logarithm, as a scalar on their device.

    It is 1 if there are no bits at all.
    """
    counts = BitCounts(int(n_bits), int(n_matches), int(n_bits) - int(n_decided))
    value = counts.log10_p_value if log10 else counts.p_value
    if not counts.n_bits:
        value = 0.0 if log10 else 1.0
    return torch.tensor(value, dtype=widest_float(n_matches.device), device=n_matches.device)


def _check_same_shape(preds: Tensor, target: Tensor) -> None:
    if preds.shape != target.shape:
        raise ValueError(
            f"`preds` must have the shape of `target`, {tuple(target.shape)}, got {tuple(preds.shape)}."
        )


def _check_among(name: str, value: Tensor, allowed: tuple[int, ...]) -> None:
    """Refuse signs or projections in place of bits, which would be counted without an error."""
    others = value[(value.unsqueeze(-1) != torch.tensor(allowed, device=value.device)).all(-1)]
    if others.numel():
        erasure = (
            ", or -1 for an erasure (`bits_of` returns those of projections)" if ERASED in allowed else ""
        )
        raise ValueError(f"`{name}` must hold bits, 0 or 1{erasure}, got {others[0].item():g}.")
