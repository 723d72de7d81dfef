"""Reproducible splits that leave torch's global random state unchanged."""

from __future__ import annotations

import torch
from torch import Tensor


def random_split(n: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split ``n`` positions by a seeded permutation.

    Args:
        n: number of images.
        fraction: share of the second part, in ``[0, 1]``; its size is rounded to the nearest integer.
        seed: seed of a generator of its own.

    Returns:
        Two sorted, disjoint int64 tensors which together hold ``0 ... n - 1``.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held_out = round(fraction * n)
    return order[held_out:].sort().values, order[:held_out].sort().values


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split every class on its own, so that both parts keep the class shares.

    Args:
        labels: int64 class indices, shape ``(n,)``.
        fraction: share of the second part of every class, in ``[0, 1]``.
        seed: seed of a generator of its own.

    Returns:
        Two sorted, disjoint int64 tensors which together hold ``0 ... n - 1``.
    """
    kept, held_out = [], []
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        # The seed differs by class: equal class sizes would otherwise be permuted alike.
        first, second = random_split(len(members), fraction, seed * 1009 + label)
        kept.append(members[first])
        held_out.append(members[second])
    return torch.cat(kept).sort().values, torch.cat(held_out).sort().values
