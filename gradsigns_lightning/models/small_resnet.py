"""A small residual network for small images."""

from __future__ import annotations

from torch import Tensor, nn

from gradsigns_lightning.core.utils.checks import check_int


class SmallResNet(nn.Module):
    """Residual network that trains in minutes on a CPU, for images of 8x8 to 32x32.

    A 3x3 stem and three basic blocks (He et al., 2016) of ``width``, ``2 * width`` and ``4 * width``
    channels, the last two with stride 2; batch normalization throughout, global average pooling, one linear
    layer.

    Args:
        in_channels: channels of the images, >= 1.
        n_classes: number of classes, >= 2.
        width: channels of the stem, >= 1.
        stem_stride: stride of the stem; 2 quarters the cost of everything that follows.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of its range.
    """

    def __init__(self, in_channels: int, n_classes: int, width: int = 16, stem_stride: int = 2) -> None:
        super().__init__()
        check_int("in_channels", in_channels, minimum=1)
        check_int("n_classes", n_classes, minimum=2)
        check_int("width", width, minimum=1)
        check_int("stem_stride", stem_stride, minimum=1, maximum=4)
        self.stem = nn.Sequential(_conv(in_channels, width, 3, stem_stride), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            _Block(width, width, 1),
            _Block(width, 2 * width, 2),
            _Block(2 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(n, n_classes)`` of float images ``(n, in_channels, H, W)``."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """Two normalized 3x3 convolutions and a shortcut, which is projected where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv(in_channels, out_channels, 3, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            _conv(out_channels, out_channels, 3, 1),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                _conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        activation: Tensor = self.relu(self.residual(x) + self.shortcut(x))
        return activation


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
