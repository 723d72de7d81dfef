"""A multi-layer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from gradsigns_lightning.core.utils.checks import check_int, check_shape


class MLP(nn.Module):
    """Fully connected layers with ReLU between them.

    Args:
        input_shape: ``(C, H, W)`` of one image; the first layer has ``C * H * W`` inputs.
        n_classes: number of classes, >= 2.
        hidden: width of every hidden layer; empty makes a linear classifier.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, input_shape: Sequence[int], n_classes: int, hidden: Sequence[int] = (256, 128)
    ) -> None:
        super().__init__()
        check_int("n_classes", n_classes, minimum=2)
        widths = [
            math.prod(check_shape(input_shape)),
            *(check_int("hidden", width, minimum=1) for width in hidden),
        ]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], n_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(n, n_classes)`` of float images ``(n, C, H, W)``."""
        logits: Tensor = self.layers(x)
        return logits
