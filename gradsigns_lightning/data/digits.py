"""The 8x8 digits that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsigns_lightning.core.utils.checks import check_number
from gradsigns_lightning.data.base import ImageDataModule
from gradsigns_lightning.data.sources import TensorImages
from gradsigns_lightning.data.splits import stratified_split

_TEST_SEED = 20211  # fixed: another `split_seed` must not move test images into the training set


class Digits(ImageDataModule):
    """Handwritten digits (Alpaydin and Kaynak, 1998): 1,797 images, 10 classes, shape ``(1, 8, 8)``.

    It needs no files: scikit-learn ships the data. The values 0 ... 16 are divided by 16. There is no
    official split; test and validation images are drawn class by class, the test images by a fixed seed.

    Args:
        test_fraction: share of the test images, in ``[0.01, 0.99]``.
        mean: mean in raw ``[0, 1]`` units.
        std: standard deviation in raw ``[0, 1]`` units.
        **kwargs: see :class:`~gradsigns_lightning.data.ImageDataModule`; ``val_fraction`` is a share of the
            images that are not test images.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        test_fraction: float = 0.3,
        mean: Sequence[float] = (0.305,),
        std: Sequence[float] = (0.376,),
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape=(1, 8, 8), n_classes=10, mean=mean, std=std, **kwargs)
        self.test_fraction = check_number("test_fraction", test_fraction, minimum=0.01, maximum=0.99)

    def load_images(self, train: bool) -> TensorImages:
        """Return the test images, or all others."""
        from sklearn.datasets import load_digits

        data, target = load_digits(return_X_y=True)
        labels = torch.from_numpy(target).to(torch.int64)
        images = torch.from_numpy(data).to(torch.uint8).view(-1, 1, 8, 8)
        rest, test = stratified_split(labels, self.test_fraction, _TEST_SEED)
        index = rest if train else test
        return TensorImages(images[index], labels[index], scale=16.0)

    def origin(self, train: bool) -> str:
        """See the base class."""
        return "scikit-learn"

    def split_train(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Split class by class; see the base class."""
        return stratified_split(labels, self.val_fraction, self.split_seed)
