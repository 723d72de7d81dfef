"""Classifiers that take images and return logits."""

from __future__ import annotations

from gradsigns_lightning.models.classifier import Classifier
from gradsigns_lightning.models.from_torchvision import torchvision_model
from gradsigns_lightning.models.mlp import MLP
from gradsigns_lightning.models.resnet20 import ResNet20
from gradsigns_lightning.models.small_resnet import SmallResNet
from gradsigns_lightning.models.vit import ViT

__all__ = ["MLP", "Classifier", "ResNet20", "SmallResNet", "ViT", "torchvision_model"]
