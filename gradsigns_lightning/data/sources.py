"""Labelled images that a ``DataLoader`` fetches a whole batch at a time."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Self

from gradsigns_lightning.core.utils.checks import check_instance, check_number
from gradsigns_lightning.data.decoding import decode

Augment = Callable[[Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


class ImageSource(Dataset[Batch], ABC):
    """Labelled images, read by index and normalized one batch at a time.

    ``__getitems__`` returns a finished batch, so a ``DataLoader`` needs the identity as its ``collate_fn``
    (:func:`keep_batch`). Subclasses implement :meth:`pixels`.

    Args:
        labels: int64 class indices, shape ``(n,)``.
        mean: per-channel mean in raw ``[0, 1]`` units; ``None`` means no centring.
        std: per-channel standard deviation in raw ``[0, 1]`` units; ``None`` means no scaling.
        augment: maps a pixel batch ``(n, C, H, W)`` to one of the same shape and dtype; runs before the
            normalization.
        scale: the pixel value that stands for raw ``1.0``.
    """

    def __init__(
        self,
        labels: Tensor,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Augment | None = None,
        scale: float = 255.0,
    ) -> None:
        _check_labels(labels)
        self._all_labels = labels.to(torch.int64)
        self._index = torch.arange(len(labels))
        self._scale = check_number("scale", scale, minimum=1e-12)
        self._set_transform(mean, std, augment)

    @abstractmethod
    def pixels(self, stored: Tensor) -> Tensor:
        """Return the pixel values, before ``scale``, of the images at ``stored``: shape ``(n, C, H, W)``."""

    @property
    def labels(self) -> Tensor:
        """The int64 class index of every image of this view, shape ``(n,)``."""
        return self._all_labels[self._index]

    def view(
        self,
        index: Tensor,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Augment | None = None,
    ) -> Self:
        """Return a view of the images at ``index``, with its own transform and without copying pixels.

        Args:
            index: int64 positions in this view, shape ``(m,)``.
            mean: see the class.
            std: see the class.
            augment: see the class.
        """
        other = copy.copy(self)
        other._index = self._index[index]
        other._set_transform(mean, std, augment)
        return other

    def raw(self, index: Tensor) -> Tensor:
        """Return the images at ``index`` as float32 in ``[0, 1]``, neither augmented nor normalized."""
        return self.pixels(self._index[index]).to(torch.float32, copy=True).div_(self._scale)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, item: int) -> Batch:
        images, labels = self.__getitems__([item])
        return images[0], labels[0]

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch ``(images, labels)``: float32 ``(n, C, H, W)``, normalized, and int64 ``(n,)``."""
        stored = self._index[torch.as_tensor(items, dtype=torch.int64)]
        pixels = self.pixels(stored)
        if self._augment is not None:
            pixels = self._augment(pixels)
        return self._normalize(pixels.to(torch.float32, copy=True)), self._all_labels[stored]

    def _normalize(self, pixels: Tensor) -> Tensor:
        images = pixels.div_(self._scale)
        if self._mean is not None:
            images.sub_(self._mean)
        return images if self._std is None else images.div_(self._std)

    def _set_transform(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, augment: Augment | None
    ) -> None:
        self._mean = None if mean is None else torch.tensor([float(v) for v in mean]).view(1, -1, 1, 1)
        self._std = None if std is None else torch.tensor([float(v) for v in std]).view(1, -1, 1, 1)
        self._augment = augment


class TensorImages(ImageSource):
    """Images kept in memory as one uint8 tensor.

    Args:
        images: uint8 tensor of shape ``(n, C, H, W)``.
        labels: int64 class indices, shape ``(n,)``.
        mean: see :class:`ImageSource`.
        std: see :class:`ImageSource`.
        augment: see :class:`ImageSource`.
        scale: see :class:`ImageSource`.

    Raises:
        TypeError: ``images`` is not a uint8 tensor.
        ValueError: the shapes do not fit each other.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Augment | None = None,
        scale: float = 255.0,
    ) -> None:
        _check_labels(labels)
        check_instance("images", images, Tensor)
        if images.dtype != torch.uint8:
            raise TypeError(f"`images` must be a uint8 tensor, got dtype {images.dtype}.")
        if images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                f"`images` must have shape (n, C, H, W) with n = {len(labels)}, one image per label, got "
                f"{tuple(images.shape)}."
            )
        # Last: as int64, labels without images would take eight times the memory of the file.
        super().__init__(labels, mean=mean, std=std, augment=augment, scale=scale)
        self._images = images

    def pixels(self, stored: Tensor) -> Tensor:
        """Return the uint8 images stored at ``stored``, shape ``(n, C, H, W)``."""
        return self._images[stored]


class FileImages(ImageSource):
    """RGB image files that are decoded and resized on the fly.

    Args:
        paths: one file per image.
        labels: int64 class indices, shape ``(n,)``.
        size: ``(height, width)`` to which every image is resized.
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor, *, size: tuple[int, int]) -> None:
        super().__init__(labels)
        if len(paths) != len(labels):
            raise ValueError(
                f"`paths` must have one file for each of the {len(labels)} labels, got {len(paths)}."
            )
        self._paths = list(paths)
        self._size = size

    def pixels(self, stored: Tensor) -> Tensor:
        """Return the decoded uint8 images of the files at ``stored``, shape ``(n, 3, H, W)``."""
        if len(stored) == 0:
            return torch.empty(0, 3, *self._size, dtype=torch.uint8)
        return torch.stack([decode(self._paths[i], "RGB", self._size) for i in stored.tolist()])

    def cached(self) -> TensorImages:
        """Return the same images, all decoded now and kept in memory."""
        return TensorImages(self.pixels(self._index), self.labels)


def _check_labels(labels: Tensor) -> None:
    check_instance("labels", labels, Tensor)
    if labels.ndim != 1:
        raise ValueError(f"`labels` must have shape (n,), got {tuple(labels.shape)}.")


def keep_batch(batch: Any) -> Any:
    """Return ``batch``: the ``collate_fn`` for sources whose ``__getitems__`` returns finished batches."""
    return batch
