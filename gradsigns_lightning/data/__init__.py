"""Lightning data modules of labelled images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsigns_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from gradsigns_lightning.data.augment import ShiftFlip
    from gradsigns_lightning.data.base import ImageDataModule
    from gradsigns_lightning.data.cifar10 import CIFAR10
    from gradsigns_lightning.data.digits import Digits
    from gradsigns_lightning.data.folder import FolderDataModule
    from gradsigns_lightning.data.image_folder import ImageFolder
    from gradsigns_lightning.data.mnist import MNIST, FashionMNIST
    from gradsigns_lightning.data.sources import FileImages, ImageSource, TensorImages
    from gradsigns_lightning.data.svhn import SVHN
    from gradsigns_lightning.data.youtube_faces import YouTubeFaces

__all__ = [
    "CIFAR10",
    "MNIST",
    "SVHN",
    "Digits",
    "FashionMNIST",
    "FileImages",
    "FolderDataModule",
    "ImageDataModule",
    "ImageFolder",
    "ImageSource",
    "ShiftFlip",
    "TensorImages",
    "YouTubeFaces",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "augment": "ShiftFlip",
        "base": "ImageDataModule",
        "cifar10": "CIFAR10",
        "digits": "Digits",
        "folder": "FolderDataModule",
        "image_folder": "ImageFolder",
        "mnist": "MNIST FashionMNIST",
        "sources": "FileImages ImageSource TensorImages",
        "svhn": "SVHN",
        "youtube_faces": "YouTubeFaces",
    },
)
