"""Checks that the weights are still those that were read: averaging may replace them as a training ends."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gradsigns_lightning.core.torch_state.precision import widest_float

_TOLERANCE = 1e-9  # relative; devices add in different orders


def lengths_of(module: nn.Module) -> Tensor:
    """Return two norms of each parameter and running statistic, on the device; they tell weights apart."""
    statistics = [
        s for m in module.modules() if isinstance(m, _NormBase) for s in (m.running_mean, m.running_var)
    ]
    tensors = [
        t.detach() for t in (*module.parameters(), *statistics) if t is not None and t.is_floating_point()
    ]
    if not tensors:
        return torch.zeros(0)
    if widest_float(tensors[0].device) != torch.float64:
        tensors = [t.cpu() for t in tensors]
    norms = [torch.linalg.vector_norm(t, order, dtype=torch.float64) for t in tensors for order in (1, 2)]
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def are_weights_of(lengths: Tensor, module: nn.Module) -> bool:
    """Return whether a module has the weights whose norms these are."""
    now = lengths_of(module).cpu()
    return now.shape == lengths.shape and torch.allclose(
        now, lengths.cpu(), rtol=_TOLERANCE, atol=0.0, equal_nan=True
    )
