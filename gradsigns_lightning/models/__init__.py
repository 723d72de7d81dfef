"""Classifiers that take images and return logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.models.classifier import Classifier
    from gradsigns_lightning.models.from_torchvision import torchvision_model
    from gradsigns_lightning.models.mlp import MLP
    from gradsigns_lightning.models.resnet20 import ResNet20
    from gradsigns_lightning.models.small_resnet import SmallResNet
    from gradsigns_lightning.models.vit import ViT

__all__ = ["MLP", "Classifier", "ResNet20", "SmallResNet", "ViT", "torchvision_model"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "classifier": "Classifier",
        "from_torchvision": "torchvision_model",
        "mlp": "MLP",
        "resnet20": "ResNet20",
        "small_resnet": "SmallResNet",
        "vit": "ViT",
    },
)
