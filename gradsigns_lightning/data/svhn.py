"""Street View House Numbers from the official MATLAB files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradsigns_lightning.core.utils.files import error_about
from gradsigns_lightning.core.utils.optional import require
from gradsigns_lightning.data.base import ImageDataModule
from gradsigns_lightning.data.matlab import read_arrays
from gradsigns_lightning.data.sources import TensorImages

_LARGEST = 2**28  # bytes, packed or unpacked; the largest official file unpacks to 225 million


class SVHN(ImageDataModule):
    """SVHN (Netzer et al., 2011): 73,257 training, 26,032 test images, 10 classes, ``(3, 32, 32)``.

    These are the cropped digits. The files label the digit 0 as 10; here its label is 0.

    Args:
        root: folder that holds ``train_32x32.mat`` and ``test_32x32.mat``; with ``download`` they are put
            there.
        download: let torchvision download and verify the files if they do not exist.
        mean: mean of every channel in raw ``[0, 1]`` units.
        std: standard deviation of every channel in raw ``[0, 1]`` units.
        **kwargs: see :class:`~gradsigns_lightning.data.ImageDataModule`.

    Raises:
        ValueError: an argument is out of its range; later, in ``setup``: the files do not exist.
    """

    def __init__(
        self,
        root: str | Path | None,
        *,
        download: bool = False,
        mean: Sequence[float] = (0.4377, 0.4438, 0.4728),
        std: Sequence[float] = (0.1980, 0.2010, 0.1970),
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape=(3, 32, 32), n_classes=10, mean=mean, std=std, root=root, **kwargs)
        self.download = download

    def prepare_data(self) -> None:
        """Download the files if ``download`` is set and they do not exist.

        Raises:
            ImportError: torchvision, which downloads, is not installed.
        """
        for train in (True, False):
            if self.download and not self._path(train).is_file():
                datasets = require("torchvision.datasets", extra="vision")
                datasets.SVHN(str(self.root), split="train" if train else "test", download=True)

    def load_images(self, train: bool) -> TensorImages:
        """Read the training or the test file.

        Raises:
            ValueError: the file does not exist or is malformed.
        """
        path = self._path(train)
        if not path.is_file():
            raise error_about(path)(
                f"`root` must hold {path.name}, got root={self.root}. Set `download=True` to get it."
            )
        return _read_mat(path)

    def origin(self, train: bool) -> str:
        """Return the file; see the base class."""
        return str(self._path(train).resolve())

    def _path(self, train: bool) -> Path:
        return self.required_root() / ("train_32x32.mat" if train else "test_32x32.mat")


def _read_mat(path: Path) -> TensorImages:
    try:
        arrays = read_arrays(path, ("X", "y"), max_bytes=_LARGEST)
        if (
            len(arrays) < 2
            or arrays["X"].shape[:3] != (32, 32, 3)
            or arrays["X"].shape[3:] != (arrays["y"].size,)
        ):
            raise ValueError("it must hold X of shape (32, 32, 3, n) and y of n labels")
        if arrays["X"].dtype != np.uint8 or not np.isin(arrays["y"], range(11)).all():
            raise ValueError("X must be of bytes, and y of whole numbers from 0 to 10")
    except (OSError, ValueError) as error:
        raise ValueError(f"`root` must hold MATLAB files of SVHN, got {path}: {str(error)[:200]}.") from error
    images = torch.from_numpy(arrays["X"]).permute(3, 2, 0, 1).contiguous()
    return TensorImages(images, torch.from_numpy(arrays["y"].astype(np.int64)).flatten() % 10)
