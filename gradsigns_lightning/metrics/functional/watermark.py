"""Pure functions of signature bits and projections."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_hamming_distance

from gradsigns_lightning.core import statistics


def bit_error_rate(bits: Tensor, signature: Tensor) -> Tensor:
    r"""Share of bits that differ.

    .. math:: \text{BER} = \frac{1}{N} \sum_{j=1}^{N} [\hat b_j \neq b_j]

    Args:
        bits: bits read, ``(..., N)``, integer 0 or 1, or scores in [0, 1] that are thresholded at 0.5.
        signature: true bits, same shape, integer 0 or 1.

    Returns:
        Scalar float in [0, 1].

    Example:
        >>> bit_error_rate(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0]))
        tensor(0.2500)
    """
    return binary_hamming_distance(bits, signature)


def ownership_p_value(bits: Tensor, signature: Tensor) -> Tensor:
    r"""Exact probability that an unmarked model matches at least as many bits.

    .. math:: p = P[\text{Bin}(N, 1/2) \geq \text{matches}]

    Args:
        bits: bits read, ``(..., N)``, integer 0 or 1.
        signature: true bits, same shape, integer 0 or 1.

    Returns:
        Scalar float64; float32 would underflow from 150 bits on.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> ownership_p_value(torch.ones(32, dtype=torch.int), torch.ones(32, dtype=torch.int))
        tensor(2.3283e-10, dtype=torch.float64)
    """
    n_matches, n_bits = count_matches(bits, signature)
    return p_value_of_counts(n_matches, n_bits)


def smallest_margin(projections: Tensor, signature: Tensor) -> Tensor:
    r"""Distance of the worst bit from the wrong side; negative if a bit is wrong.

    .. math:: \min_j (2 b_j - 1) z_j

    Args:
        projections: z, ``(..., N)``, floating point, of a unit-length gradient.
        signature: true bits, same shape, integer 0 or 1.

    Returns:
        Scalar, dtype of ``projections``.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> smallest_margin(torch.tensor([-0.5, 1.5]), torch.tensor([0, 1]))
        tensor(0.5000)
    """
    _check_same_shape("projections", projections, signature)
    return ((2 * signature.to(projections.dtype) - 1) * projections).min()


def count_matches(bits: Tensor, signature: Tensor) -> tuple[Tensor, Tensor]:
    """Return matching bits and all bits as int64 scalars."""
    _check_same_shape("bits", bits, signature)
    return (bits == signature).sum(), torch.tensor(signature.numel(), device=signature.device)


def p_value_of_counts(n_matches: Tensor, n_bits: Tensor) -> Tensor:
    """Return the p-value of two integer scalars as a float64 scalar on their device."""
    value = statistics.ownership_p_value(int(n_matches), int(n_bits))
    return torch.tensor(value, dtype=torch.float64, device=n_matches.device)


def _check_same_shape(name: str, value: Tensor, signature: Tensor) -> None:
    if value.shape != signature.shape:
        raise ValueError(f"`{name}` must have the signature's shape {tuple(signature.shape)}, got {tuple(value.shape)}.")
