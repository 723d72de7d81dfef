"""Street View House Numbers from the official MATLAB files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gradsigns_lightning.core.utils.optional import require
from gradsigns_lightning.data.base import ImageDataModule
from gradsigns_lightning.data.sources import TensorImages

_LARGEST = 2**28  # bytes, packed or unpacked; the largest official file unpacks to 225 million
_HEADER, _COMPRESSED, _PIECE = 128, 15, 2**20


class SVHN(ImageDataModule):
    """SVHN, cropped digits (Netzer et al., 2011): 73,257 training and 26,032 test images, shape ``(3, 32, 32)``.

    The files name the digit 0 by the label 10; here its label is 0.

    Args:
        root: folder that holds ``train_32x32.mat`` and ``test_32x32.mat``; with ``download`` they are put there.
        download: let torchvision download and verify the files if they are not there.
        mean: mean of every channel in raw ``[0, 1]`` units.
        std: standard deviation of every channel in raw ``[0, 1]`` units.
        **kwargs: see :class:`~gradsigns_lightning.data.ImageDataModule`.

    Raises:
        ValueError: an argument is out of its range; later, in ``setup``: the files are not there.
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
        """Download the files if ``download`` is set and they are not there.

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
            ValueError: the file is not there or malformed.
        """
        path = self._path(train)
        if not path.is_file():
            raise ValueError(f"`root` must hold {path.name}, got root={self.root}. Set `download=True` to get it.")
        return _read_mat(path)

    def origin(self, train: bool) -> str:
        """Return the file; see the base class."""
        return str(self._path(train).resolve())

    def _path(self, train: bool) -> Path:
        return self.required_root() / ("train_32x32.mat" if train else "test_32x32.mat")


def _check_size(path: Path) -> None:
    """Refuse a MATLAB file (version 5) that is or unpacks to more than any official one, before it is read."""
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} bytes")
    with path.open("rb") as file:
        header = file.read(_HEADER)
        order = {b"IM": "<", b"MI": ">"}.get(header[-2:], "") if len(header) == _HEADER else ""
        if not order:
            raise ValueError("it is no MATLAB file of version 5")
        total = 0
        while tag := file.read(8):
            kind, n_bytes = struct.unpack(f"{order}II", tag)
            content = file.read(n_bytes)
            total += _unpacked(content, _LARGEST - total) if kind == _COMPRESSED else len(content)
            if total > _LARGEST:
                raise ValueError(f"it unpacks to more than {_LARGEST} bytes")


def _unpacked(content: bytes, most: int) -> int:
    """Return how many bytes ``content`` unpacks to; more than ``most`` may be any such number."""
    stream, total = zlib.decompressobj(), 0
    while content and not stream.eof and total <= most:
        total += len(stream.decompress(content, _PIECE))
        content = stream.unconsumed_tail
    return total


def _read_mat(path: Path) -> TensorImages:
    from scipy.io import loadmat, whosmat

    try:
        _check_size(path)
        arrays = {name: kind for name, _, kind in whosmat(str(path)) if name in ("X", "y")}
        if not set(arrays.values()) <= {"uint8", "double"}:
            raise ValueError("an array is none of numbers")
        content = loadmat(str(path), variable_names=list(arrays))
    except Exception as error:  # what damage makes scipy raise has no base class in common
        raise ValueError(f"`root` must hold MATLAB files of SVHN, got {path}: {str(error)[:200]}") from error
    shape: tuple[int, ...] = content["X"].shape if "X" in content and "y" in content else ()
    # Labels take 16 times their place in the file when they are converted, so they are counted first.
    if len(shape) != 4 or shape[:3] != (32, 32, 3) or content["y"].size != shape[3]:
        raise ValueError(f"`root` must hold MATLAB files with X of shape (32, 32, 3, n) and y of n labels, got {path}.")
    images = torch.from_numpy(content["X"]).permute(3, 2, 0, 1).contiguous()
    return TensorImages(images, torch.from_numpy(content["y"].astype("int64")).flatten() % 10)
