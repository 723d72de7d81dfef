"""An auto-encoder before the stolen model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.attacks.base import (
    Attack,
    AttackData,
    Observe,
    copied,
    device_of,
    observed,
    seeded,
)
from gradsigns_lightning.attacks.serving import Served
from gradsigns_lightning.attacks.training import train
from gradsigns_lightning.core.utils.checks import check_int, check_number


class AutoEncoder(nn.Module):
    """Two 5x5 convolutions around half of the resolution, after WRT's for CIFAR-10.

    Args:
        n_channels: channels of the images.
        complexity: channels of the code.
    """

    def __init__(self, n_channels: int, complexity: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(n_channels, complexity, 5, stride=2, padding=2), nn.BatchNorm2d(complexity), nn.ReLU()
        )
        self.decode = nn.Conv2d(complexity, n_channels, 5, padding=2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the reconstruction of raw pixels ``(n, C, H, W)`` in [0, 1]."""
        code = F.interpolate(self.encode(pixels), size=pixels.shape[2:])
        reconstruction: Tensor = self.decode(code).sigmoid()
        return reconstruction


def reconstruct_inputs(
    model: nn.Module,
    data: AttackData,
    *,
    complexity: int = 128,
    epochs: int = 10,
    rate: float = 1e-3,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Send images through an auto-encoder (WRT: input reconstruction, complexity 128).

    The toolbox loads an auto-encoder that was trained elsewhere; here the thief trains it on their own
    images, not augmented, to the least squared error.

    Args:
        model: the stolen model.
        data: what the thief has.
        complexity: channels of the code, >= 1.
        epochs: epochs of the auto-encoder's training, >= 1; the toolbox has no default.
        rate: its highest learning rate, > 0; the toolbox's.
        seed: of its weights and batches.
        observe: is shown the model behind the auto-encoder after each epoch.

    Raises:
        ValueError: a setting is out of range.
    """
    check_int("complexity", complexity, minimum=1)
    check_number("rate", rate, minimum=0)
    recipe = replace(data.recipe, epochs=epochs, rate=rate, weight_decay=0.0, optimizer="adamw")
    copy, device = copied(model), device_of(model)
    with seeded(seed, model):
        encoder = AutoEncoder(len(data.clean[0][0]), complexity).to(device)

    def squared_error(net: nn.Module, x: Tensor, _: Tensor) -> Tensor:
        pixels = data.raw(x)
        return F.mse_loss(net(pixels), pixels)

    def show(dose: float, net: nn.Module) -> None:
        observed(observe, dose, Served(copy, data, image_filter=net))

    plain = replace(data, train=data.clean)
    train(encoder, plain, recipe, loss=squared_error, observe=show, seed=seed)
    return Served(copy, data, image_filter=encoder)


@dataclass(frozen=True)
class InputReconstruction(Attack):
    """Images behind an auto-encoder; see :func:`reconstruct_inputs`."""

    function = staticmethod(reconstruct_inputs)
    kind = "responses"

    complexity: int = 128
    epochs: int = 10
    rate: float = 1e-3
    seed: int = 0
