"""The engine seam: how the embedding objective's gradient reaches the parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from gradsigns_lightning.core.signature import LogitsFn

ObjectiveFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EmbeddingLoss:
    """What an engine returns.

    Attributes:
        value: the objective's value, detached scalar.
        surrogate: scalar whose ``backward()`` gives the parameters the objective's gradient; add it to the task's loss.
    """

    value: Tensor
    surrogate: Tensor


class Engine(Protocol):
    """Differentiates an objective of the input gradient with respect to the parameters.

    Attributes:
        needs_double_backward: every operation of the model must be differentiable twice in reverse mode.
        needs_smooth_activations: wrong on kinked activations such as ReLU.
        compile_safe: right through ``torch.compile``.
        sharding_safe: right when parameters are sharded (FSDP).
    """

    name: str
    needs_double_backward: bool
    needs_smooth_activations: bool
    compile_safe: bool
    sharding_safe: bool

    def embed(
        self, module: nn.Module, logits_fn: LogitsFn, images: Tensor, target_class: int, objective: ObjectiveFn
    ) -> EmbeddingLoss:
        """Return the embedding loss.

        Args:
            module: module that owns the parameters, for the choice of kernels; training flags are the caller's business.
            logits_fn: maps inputs ``(n, C, H, W)`` to logits ``(n, n_classes)``.
            images: inputs as the network takes them, shape ``(n, C, H, W)``.
            target_class: class T.
            objective: maps the gradients of all images, shape ``(n, C, H, W)``, to a scalar.
        """
        ...
