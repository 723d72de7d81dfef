"""Small all-reduces over the ranks: agreement, averages, and a global mean with the right gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_ranks_agree(flag: bool, *, device: torch.device, world_size: int) -> bool:
    """Return whether ``flag`` is true on every rank.

    All ranks then decide alike, and none waits for another.
    """
    if world_size == 1:
        return flag
    agreed = torch.tensor(int(flag), device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed)


def global_mean(local_sum: Tensor, local_count: Tensor, *, world_size: int) -> Tensor:
    """Return the mean over the images of all ranks; its gradient is right after data-parallel averaging.

    Data-parallel strategies average parameter gradients over ranks, so each rank must contribute ``world_size
    * d(local_sum) / count``. The value is all-reduced without a graph, and the local sum is added with that
    weight and a value of zero, so no collective runs in the backward pass. A rank without images takes part
    with zeros.

    Args:
        local_sum: sum over this rank's images, shape ``(c,)``.
        local_count: number of this rank's images, scalar.
        world_size: number of ranks; 1 means no communication.
    """
    if world_size == 1:
        return local_sum / local_count.clamp_min(1)
    packed = torch.cat([local_sum.detach(), local_count.to(local_sum.dtype).view(1)])
    dist.all_reduce(packed)
    count = packed[-1].clamp_min(1)
    return (packed[:-1] + world_size * (local_sum - local_sum.detach())) / count


def average(tensors: list[Tensor], *, world_size: int) -> None:
    """Replace each tensor in place by its mean over all ranks, which must pass the same tensors."""
    if world_size == 1:
        return
    for dtype in {tensor.dtype for tensor in tensors}:
        alike = [tensor for tensor in tensors if tensor.dtype is dtype]
        flat = torch.cat([tensor.flatten() for tensor in alike]) / world_size
        dist.all_reduce(flat)
        for tensor, part in zip(alike, torch.split(flat, [tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))
