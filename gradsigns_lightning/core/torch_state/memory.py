"""The memory that a pass through a network keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that autograd saves during ``run``, without the model's parameters and buffers.

    The number is the same on the meta device, where nothing is computed and no memory is allocated.
    """
    own = {_place(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(n_bytes for place, n_bytes in kept.items() if place not in own)


def _place(tensor: Tensor) -> int:
    """Return what identifies a tensor's storage, even on the meta device, where it has no address."""
    return int(tensor.untyped_storage()._cdata)
