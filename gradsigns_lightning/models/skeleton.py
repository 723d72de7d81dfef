"""Networks without values: names and shapes of the weights, before any memory is allocated for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)
_ALLOCATORS = (torch.empty, torch.zeros, torch.ones)


def skeleton(make: Callable[[], Module]) -> Module:
    """Return the module that ``make`` makes, with weights on the meta device: shapes without values.

    Args:
        make: makes a module from torch's layers, which allocate their weights empty, as zeros or as ones.
    """
    with _WeightsOnMeta():
        return make()


class _WeightsOnMeta(TorchFunctionMode):
    """Like ``with torch.device("meta")``, but sequences keep their values.

    torchvision's RegNet computes its widths with ``arange``.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ALLOCATORS and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*args, **kwargs)
