"""The base class of data modules whose images are files in folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gradsigns_lightning.core.utils.checks import check_instance, check_int
from gradsigns_lightning.data.base import ImageDataModule
from gradsigns_lightning.data.decoding import check_inside
from gradsigns_lightning.data.sources import FileImages, ImageSource

LabelledFile = tuple[Path, int]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FolderDataModule(ImageDataModule):
    """Data module whose RGB images are files; subclasses implement ``load_images`` by :meth:`open_files`.

    Args:
        root: folder of the data set.
        classes: the class names, in the order of their labels.
        n_classes: the number of classes that the caller expects; ``None`` takes the number of ``classes``.
        image_size: height and width to which every image is resized; one integer means a square.
        cache: decode every image once, in ``setup``, and keep all as uint8 in memory, instead of decoding on
            the fly.
        **kwargs: see :class:`~gradsigns_lightning.data.ImageDataModule`.

    Attributes:
        classes: as given.

    Raises:
        ImportError: Pillow is not installed; raised when the first image is decoded.
        ValueError: ``n_classes`` is not the number of classes found, or another argument is out of its range.
    """

    def __init__(
        self,
        root: Path,
        classes: Sequence[str],
        *,
        n_classes: int | None,
        image_size: int | Sequence[int],
        cache: bool,
        **kwargs: Any,
    ) -> None:
        if n_classes is not None and n_classes != len(classes):
            raise ValueError(
                f"`n_classes` must be {len(classes)}, the number of classes found in {root}, got "
                f"{n_classes!r}."
            )
        self.image_size = _image_size(image_size)
        super().__init__(input_shape=(3, *self.image_size), n_classes=len(classes), root=root, **kwargs)
        check_instance("cache", cache, bool)
        self.classes = tuple(classes)
        self.cache = cache

    def open_files(self, files: Sequence[LabelledFile]) -> ImageSource:
        """Return the images of ``files``, decoded now if ``cache`` is set.

        Args:
            files: pairs of a path and a class index.

        Raises:
            ValueError: a file is a link to one outside of ``root``.
        """
        check_inside(self.required_root(), [path for path, _ in files], argument="root")
        labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        source = FileImages([path for path, _ in files], labels, size=self.image_size)
        return source.cached() if self.cache else source


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in ``folder``, sorted by name; hidden ones are left out."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    sizes = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sizes) != 2:
        raise ValueError(f"`image_size` must be an integer or (height, width), got {sizes}.")
    height, width = (check_int("image_size", size, minimum=1) for size in sizes)
    return height, width
