"""The base class of the image data modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from gradsigns_lightning.core.utils.checks import check_choice, check_int, check_number, check_shape
from gradsigns_lightning.data.sources import Augment, Batch, ImageSource, keep_batch
from gradsigns_lightning.data.splits import random_split

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_SPLITS_OF_STAGE: dict[str | None, tuple[Split, ...]] = {
    None: SPLITS,
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}


class ImageDataModule(LightningDataModule, ABC):
    """Base class of data modules: batches of labelled images, and raw images to read a signature with.

    The loaders yield ``(x, y)``: ``x`` float32 of shape ``(n, C, H, W)``, normalized by ``mean`` and ``std``,
    ``y`` int64 of shape ``(n,)``. Subclasses implement :meth:`load_images` and may implement
    ``prepare_data``.

    Args:
        input_shape: ``(C, H, W)`` of one image.
        n_classes: number of classes, >= 2.
        mean: per-channel mean in raw ``[0, 1]`` units, ``C`` numbers.
        std: per-channel standard deviation in raw ``[0, 1]`` units, ``C`` positive numbers.
        batch_size: size of a training batch; the last, smaller batch is kept.
        eval_batch_size: size of a validation or test batch.
        val_fraction: share of the training images used for validation, in ``[0, 1)``.
        split_seed: seed of the permutation that picks them; torch's global generator is not used.
        num_workers: worker processes of every loader.
        augment: applied to training batches of pixels only, for example
            :class:`~gradsigns_lightning.data.ShiftFlip`.
        root: folder of the data set, where one is needed.

    Attributes:
        input_shape: as given.
        n_classes: as given.
        mean: as given.
        std: as given.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        n_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 128,
        eval_batch_size: int = 512,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        num_workers: int = 0,
        augment: Augment | None = None,
        root: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.input_shape = check_shape(input_shape)
        self.n_classes = check_int("n_classes", n_classes, minimum=2)
        self.mean = _per_channel("mean", mean, self.input_shape[0])
        self.std = _per_channel("std", std, self.input_shape[0], minimum=1e-12)
        self.batch_size = check_int("batch_size", batch_size, minimum=1)
        self.eval_batch_size = check_int("eval_batch_size", eval_batch_size, minimum=1)
        self.val_fraction = check_number("val_fraction", val_fraction, minimum=0.0, maximum=1.0)
        if self.val_fraction == 1.0:
            raise ValueError("`val_fraction` must be below 1, or nothing is left to train on, got 1.0.")
        self.split_seed = check_int("split_seed", split_seed, minimum=0)
        self.num_workers = check_int("num_workers", num_workers, minimum=0)
        self.augment = check_augment(augment)
        self.root = None if root is None else Path(root).expanduser()
        self._sources: dict[Split, ImageSource] = {}

    @abstractmethod
    def load_images(self, train: bool) -> ImageSource:
        """Return all official training images, or all official test images.

        Args:
            train: which of the two.

        Raises:
            ValueError: the files do not exist; the message names `root`.
        """

    def origin(self, train: bool) -> str:
        """Return where the images come from, for reports: a file, a folder or a package.

        Args:
            train: as for :meth:`load_images`.
        """
        return type(self).__name__ if self.root is None else str(self.root.resolve())

    def split_train(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions of training and validation images among the official training images.

        Args:
            labels: int64 labels of the official training images, shape ``(n,)``.
        """
        return random_split(len(labels), self.val_fraction, self.split_seed)

    def load_train_and_val(self) -> tuple[ImageSource, ImageSource]:
        """Return the training and the validation images, neither normalized nor augmented."""
        images = self.load_images(train=True)
        train, val = self.split_train(images.labels)
        return images.view(train), images.view(val)

    def required_root(self) -> Path:
        """Return ``root``.

        Raises:
            ValueError: it is ``None``.
        """
        if self.root is None:
            raise ValueError("`root` must name the folder of the data set, got None.")
        return self.root

    def setup(self, stage: str | None = None) -> None:
        """Load the images that ``stage`` needs, unless they are loaded already.

        Args:
            stage: Lightning's ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``; ``None`` loads every
                split.

        Raises:
            ValueError: the stage is unknown, or files are missing or malformed.
        """
        if stage not in _SPLITS_OF_STAGE:
            raise ValueError(f"`stage` must be fit, validate, test, predict or None, got {stage!r}.")
        for split in _SPLITS_OF_STAGE[stage]:
            if split not in self._sources:
                self._load(split)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled, augmented and normalized training batches; every image occurs once per epoch."""
        return self._loader("train", self.augment)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return normalized validation batches in a fixed order; there are none if ``val_fraction`` is 0."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return normalized test batches in a fixed order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the same batches as :meth:`test_dataloader`."""
        return self._loader("test")

    def raw_images(self, split: Split, class_index: int | None = None, limit: int | None = None) -> Tensor:
        """Return raw images, neither augmented nor normalized, in the order in which they are stored.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            class_index: keep only this class; ``None`` keeps all.
            limit: return at most this many images; ``None`` returns all.

        Returns:
            A float32 tensor of shape ``(n, C, H, W)`` in ``[0, 1]``.

        Raises:
            ValueError: an argument is out of its range.
        """
        source = self._source(split)
        index = torch.arange(len(source))
        if class_index is not None:
            check_int("class_index", class_index, minimum=0, maximum=self.n_classes - 1)
            index = (source.labels == class_index).nonzero().flatten()
        if limit is not None:
            index = index[: check_int("limit", limit, minimum=1)]
        return source.raw(index)

    def _source(self, split: Split) -> ImageSource:
        check_choice("split", split, SPLITS)
        if split not in self._sources:
            # Outside a Trainer nobody has called this hook; it does nothing if the files exist.
            self.prepare_data()
            self._load(split)
        return self._sources[split]

    def _load(self, split: Split) -> None:
        if split == "test":
            self._keep("test", self.load_images(train=False))
        else:
            train, val = self.load_train_and_val()
            self._keep("train", train)
            self._keep("val", val)

    def _keep(self, split: Split, source: ImageSource) -> None:
        labels = source.labels
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.n_classes:
            raise ValueError(
                f"`n_classes` is {self.n_classes}, so labels must be in [0, {self.n_classes - 1}], but the "
                f"{split} images have labels {int(labels.min())} ... {int(labels.max())}."
            )
        self._sources[split] = source

    def _loader(self, split: Split, augment: Augment | None = None) -> DataLoader[Batch]:
        source = self._source(split)
        training = split == "train"
        return DataLoader(
            source.view(torch.arange(len(source)), mean=self.mean, std=self.std, augment=augment),
            batch_size=self.batch_size if training else self.eval_batch_size,
            shuffle=training,
            num_workers=self.num_workers,
            collate_fn=keep_batch,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def check_augment(augment: Augment | None) -> Augment | None:
    """Return ``augment`` if it is callable or ``None``.

    Raises:
        TypeError: it is neither.
    """
    if augment is not None and not callable(augment):
        raise TypeError(f"`augment` must be a callable on pixel batches or None, got {augment!r}.")
    return augment


def _per_channel(
    name: str, values: Sequence[float], channels: int, minimum: float = -1e12
) -> tuple[float, ...]:
    numbers = tuple(check_number(name, value, minimum=minimum) for value in values)
    if len(numbers) != channels:
        raise ValueError(f"`{name}` must hold one number for each of the {channels} channels, got {numbers}.")
    return numbers
