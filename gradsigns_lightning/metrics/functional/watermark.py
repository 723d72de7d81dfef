"""Pure functions of signature bits and projections."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_hamming_distance

from gradsigns_lightning.core.result import BitCounts, is_readable, readable, signed_by

ERASED = -1  # among bits: one that could not be decided


def bits_of(projections: Tensor) -> Tensor:
    """Bits that projections tell, as readers decide them.

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


def bit_error_rate(bits: Tensor, signature: Tensor) -> Tensor:
    r"""Share of decided bits that differ.

    .. math:: \text{BER} = \frac{1}{N} \sum_{j=1}^{N} [\hat b_j \neq b_j]

    Args:
        bits: bits read, ``(..., N)``, integer 0 or 1, or -1 for an erasure (:func:`bits_of`), which does not count; or scores in
            [0, 1] that are thresholded at 0.5.
        signature: true bits, same shape, integer 0 or 1.

    Returns:
        Scalar float in [0, 1]; NaN when no bit was decided.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> bit_error_rate(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0]))
        tensor(0.2500)
    """
    bits, signature = decided(bits, signature)
    return binary_hamming_distance(bits, signature) if bits.numel() else torch.tensor(torch.nan, device=bits.device)


def ownership_p_value(bits: Tensor, signature: Tensor) -> Tensor:
    r"""Exact probability that an unmarked model matches at least as many bits.

    .. math:: p = P[\text{Bin}(N, 1/2) \geq \text{matches}]

    Args:
        bits: bits read, ``(..., N)``, integer 0 or 1, or -1 for an erasure (:func:`bits_of`), which does not count.
        signature: true bits, same shape, integer 0 or 1.

    Returns:
        Scalar float64; float32 would underflow from 150 bits on. NaN when all bits are erasures.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> ownership_p_value(torch.ones(32, dtype=torch.int), torch.ones(32, dtype=torch.int))
        tensor(2.3283e-10, dtype=torch.float64)
    """
    return p_value_of_counts(*count_matches(bits, signature), torch.tensor(bits.numel()))


def smallest_margin(projections: Tensor, signature: Tensor) -> Tensor:
    r"""Distance of the worst bit from the wrong side; negative if a bit is wrong.

    .. math:: \min_j (2 b_j - 1) z_j

    Args:
        projections: z, ``(..., N)``, floating point, of a unit-length gradient.
        signature: true bits, same shape, integer 0 or 1.

    Returns:
        Scalar, dtype of ``projections``; NaN when no bit is decided.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> smallest_margin(torch.tensor([-0.5, 1.5]), torch.tensor([0, 1]))
        tensor(0.5000)
    """
    _check_same_shape("projections", projections, signature)
    return torch.where(is_readable(projections), signed_by(projections, signature).min(), torch.nan)


def decided(bits: Tensor, signature: Tensor) -> tuple[Tensor, Tensor]:
    """Return bits and true bits without the erasures, flat if there are any."""
    _check_same_shape("bits", bits, signature)
    known = bits != ERASED
    return (bits, signature) if bool(known.all()) else (bits[known], signature[known])


def count_matches(bits: Tensor, signature: Tensor) -> tuple[Tensor, Tensor]:
    """Return matching bits and decided bits as int64 scalars."""
    _check_same_shape("bits", bits, signature)
    return (bits == signature).sum(), (bits != ERASED).sum()


def p_value_of_counts(n_matches: Tensor, n_decided: Tensor, n_bits: Tensor) -> Tensor:
    """Return the p-value of integer scalars as a float64 scalar on their device; 1 where no bit was even given."""
    counts = BitCounts(int(n_bits), int(n_matches), int(n_bits) - int(n_decided))
    return torch.tensor(counts.p_value if counts.n_bits else 1.0, dtype=torch.float64, device=n_matches.device)


def _check_same_shape(name: str, value: Tensor, signature: Tensor) -> None:
    if value.shape != signature.shape:
        raise ValueError(f"`{name}` must have the signature's shape {tuple(signature.shape)}, got {tuple(value.shape)}.")
