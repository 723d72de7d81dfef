"""The parameters that the optimizers train, which may be fewer than those that require a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from gradsigns_lightning.core.dose import parameters_of


@contextmanager
def only_trained(module: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Let only those parameters of ``module`` require a gradient that one of the optimizers steps.

    The task's gradient is measured over these. If the mark's included others, part of its length would be
    lost on parameters that no optimizer updates.
    """
    stepped = {id(p) for optimizer in optimizers for p in parameters_of(optimizer)}
    required = [p for p in module.parameters() if p.requires_grad]
    others = [p for p in required if id(p) not in stepped]
    if len(others) == len(required):
        others = []  # the optimizers are not known yet, as when a Fabric loop resumes
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
