"""ResNet-20 as Keras builds it."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.core.utils.checks import check_int, check_number

# A normal distribution cut at two standard deviations has this standard deviation; Keras' he_normal divides
# by it.
_TRUNCATED_STD = 0.87962566103423978


class ResNet20(nn.Module):
    """The CIFAR network of the GradSigns paper (Aramoon et al., MLSys 2021): Keras' "ResNet-20 v1".

    It is the 20-layer CIFAR network of He et al. (2016) with the details of the Keras example: every
    convolution has a bias; the shortcuts of the second and third stack are 1x1 convolutions of stride 2
    without normalization; "same" padding is TensorFlow's; batch normalization has epsilon 1e-3 and by default
    PyTorch's momentum; weights are he_normal. With 3 channels and 10 classes it has 273,066 trainable
    parameters and 1,376 running statistics.

    Args:
        in_channels: channels of the images, >= 1.
        n_classes: number of classes, >= 2.
        bn_momentum: share of a batch in batch normalization's running statistics, above 0, at most 1. Keras'
            0.99 is 0.01 here; such statistics follow the weights a hundred steps late, and the mark is
            embedded in the network that they describe.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of its range.
    """

    def __init__(self, in_channels: int = 3, n_classes: int = 10, *, bn_momentum: float = 0.1) -> None:
        super().__init__()
        check_int("in_channels", in_channels, minimum=1)
        check_int("n_classes", n_classes, minimum=2)
        if check_number("bn_momentum", bn_momentum, minimum=0, maximum=1) == 0:
            raise ValueError("`bn_momentum` must be > 0, got 0.")
        self.stem = nn.Sequential(SameConv2d(in_channels, 16, 3), _norm(16), nn.ReLU())
        self.blocks = nn.Sequential(
            *(_Block(16, 16, 1) for _ in range(3)),
            *(_Block(32 if i else 16, 32, 1 if i else 2) for i in range(3)),
            *(_Block(64 if i else 32, 64, 1 if i else 2) for i in range(3)),
        )
        self.head = nn.Linear(64, n_classes)
        self.apply(_he_normal)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(n, n_classes)`` of float images ``(n, in_channels, H, W)``."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
        return logits


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, and a bias.

    The output has ``ceil(size / stride)`` rows and columns. Where the padding is odd, the right and the
    bottom get the larger half: a 3x3 convolution of stride 2 pads an even size on the right and at the bottom
    only.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: height and width of the kernel.
        stride: stride in both directions.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution, shape ``(n, out_channels, ceil(H / stride), ceil(W / stride))``."""
        top, bottom = _same_padding(input.shape[2], self.kernel_size[0], self.stride[0])
        left, right = _same_padding(input.shape[3], self.kernel_size[1], self.stride[1])
        if (top, left) == (bottom, right):
            # Padding inside the convolution saves a copy of the input.
            return F.conv2d(input, self.weight, self.bias, self.stride, (top, left))
        return super().forward(F.pad(input, (left, right, top, bottom)))


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a bare 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            SameConv2d(in_channels, out_channels, 3, stride),
            _norm(out_channels),
            nn.ReLU(),
            SameConv2d(out_channels, out_channels, 3),
            _norm(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = SameConv2d(in_channels, out_channels, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        activation: Tensor = self.relu(self.residual(x) + self.shortcut(x))
        return activation


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _he_normal(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        std = math.sqrt(2.0 / module.weight[0].numel()) / _TRUNCATED_STD
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
