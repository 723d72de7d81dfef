"""CIFAR-10 from its official binary or Python batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsigns_lightning.core.utils.files import MissingFileError
from gradsigns_lightning.core.utils.optional import require
from gradsigns_lightning.core.utils.pickles import Outline, PickleWalk
from gradsigns_lightning.data.base import ImageDataModule
from gradsigns_lightning.data.sources import TensorImages

_SHAPE = (3, 32, 32)
_LARGEST_BATCH = 2**26  # bytes; twice what an official batch has
_PIXELS = 3 * 32 * 32
_CLASSES = 10
_BATCHES = {True: [f"data_batch_{i}" for i in range(1, 6)], False: ["test_batch"]}
# (folder, end of the file names); the binary version comes first because it needs no pickle.
_LAYOUTS = (("cifar-10-batches-bin", ".bin"), ("cifar-10-batches-py", ""))


class CIFAR10(ImageDataModule):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images, 10 classes, ``(3, 32, 32)``.

    The official batches are looked for in ``root/cifar-10-batches-bin`` and then in
    ``root/cifar-10-batches-py``. The pickled Python batches are not unpickled: their pixels and labels are
    extracted from the file.

    Args:
        root: folder that holds one of these folders; with ``download`` the Python batches are put there.
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
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape=_SHAPE, n_classes=10, mean=mean, std=std, root=root, **kwargs)
        self.download = download

    def prepare_data(self) -> None:
        """Download the files if ``download`` is set and they do not exist.

        Raises:
            ImportError: torchvision, which downloads, is not installed.
        """
        if self.download and (self._find(True) is None or self._find(False) is None):
            require("torchvision.datasets", extra="vision").CIFAR10(str(self.root), download=True)

    def load_images(self, train: bool) -> TensorImages:
        """Read the training or the test batches.

        Raises:
            ValueError: the files do not exist or are malformed.
        """
        paths = self._find(train)
        if paths is None:
            names = ", ".join(_BATCHES[train])
            raise MissingFileError(
                f"`root` must hold cifar-10-batches-bin (with {names}, each ending in .bin) or "
                f"cifar-10-batches-py (with {names}), got root={self.root}. Set `download=True` to get the "
                "latter."
            )
        batches = [read_binary(path) if path.suffix == ".bin" else read_pickled(path) for path in paths]
        return TensorImages(
            torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
        )

    def origin(self, train: bool) -> str:
        """Return the folder of the batches; see the base class."""
        paths = self._find(train)
        return super().origin(train) if paths is None else str(paths[0].resolve().parent)

    def _find(self, train: bool) -> list[Path] | None:
        for folder, end in _LAYOUTS:
            paths = [self.required_root() / folder / f"{name}{end}" for name in _BATCHES[train]]
            if all(path.is_file() for path in paths):
                return paths
        return None


def read_binary(path: Path) -> tuple[Tensor, Tensor]:
    """Read one batch of the binary version: records of one label byte and 3,072 pixel bytes.

    Args:
        path: the ``.bin`` file.

    Returns:
        uint8 images ``(n, 3, 32, 32)`` and int64 labels ``(n,)``.

    Raises:
        ValueError: the file is not a whole number of records, or is too large.
    """
    if path.stat().st_size > _LARGEST_BATCH:
        raise ValueError(
            f"`path` must have at most {_LARGEST_BATCH} bytes, got {path.stat().st_size}: {path}."
        )
    data = bytearray(path.read_bytes())
    if len(data) == 0 or len(data) % (_PIXELS + 1):
        raise ValueError(f"`path` must hold records of {_PIXELS + 1} bytes, got {len(data)} bytes: {path}.")
    records = torch.frombuffer(data, dtype=torch.uint8).view(-1, _PIXELS + 1)
    return records[:, 1:].reshape(-1, *_SHAPE), records[:, 0].to(torch.int64)


def read_pickled(path: Path) -> tuple[Tensor, Tensor]:
    """Read one pickled batch without running what a manipulated pickle might name.

    Args:
        path: a file of ``cifar-10-batches-py``.

    Returns:
        uint8 images ``(n, 3, 32, 32)`` and int64 labels ``(n,)``.

    Raises:
        ValueError: the file is not such a batch, or it names something other than an array.
    """
    try:
        if path.stat().st_size > _LARGEST_BATCH:
            raise ValueError(f"it has more than {_LARGEST_BATCH} bytes")
        batch = _BatchWalk(path.read_bytes()).outline()
        parts = batch.content if batch.kind == "dict" else {}
        pixels, labels = _pixels(parts.get(b"data")), _labels(parts.get(b"labels"))
        if len(pixels) != len(labels) * _PIXELS:
            raise ValueError(
                f"it has {len(labels)} labels and {len(pixels)} bytes of images, of {_PIXELS} each"
            )
    except ValueError as error:
        raise ValueError(
            f"`path` must be a pickled CIFAR-10 batch, got {path}: {str(error)[:200]}"
        ) from error
    return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *_SHAPE), torch.tensor(
        labels, dtype=torch.int64
    )


def _pixels(data: Outline | None) -> bytearray:
    if data is None or data.kind != "array" or not data.content:
        raise ValueError("its `data` are not an array of bytes, image by image")
    return bytearray(data.content)


def _labels(labels: Outline | None) -> list[int]:
    if labels is None or labels.kind != "list" or any(label.kind != "int" for label in labels.content):
        raise ValueError("its `labels` are not a list of integers")
    values = [label.content for label in labels.content]
    if any(not 0 <= value < _CLASSES for value in values):
        raise ValueError(f"its `labels` are not all in [0, {_CLASSES - 1}]")
    return values


class _BatchWalk(PickleWalk):
    """Allows only what rebuilds a NumPy array of bytes, the one value in a batch that is not plain."""

    def name(self, name: str) -> Outline:
        # NumPy 2 moved the module; the official files name the old one.
        module, _, function = name.partition(" ")
        rebuild = (module, function) in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        )
        if not rebuild and name not in ("numpy ndarray", "numpy dtype"):
            raise ValueError(f"it names {name[:80]!r}, which no CIFAR-10 batch does")
        return Outline("name", function)

    def call(self, function: Outline, arguments: Sequence[Outline]) -> Outline:
        first = arguments[0].content if arguments else None
        if function.kind == "name" and function.content == "_reconstruct" and first == "ndarray":
            return Outline("array")
        if function.kind == "name" and function.content == "dtype" and first in ("u1", b"u1"):
            return Outline("dtype")
        raise ValueError("its `data` are not an array of bytes")

    def build(self, value: Outline, state: Outline) -> None:
        if value.kind == "dtype":
            return  # the byte order, which single bytes do not have
        parts = state.content if value.kind == "array" and state.kind == "tuple" else []
        if [part.kind for part in parts] not in [
            ["int", "tuple", "dtype", kind, "bytes"] for kind in ("bool", "int")
        ]:
            raise ValueError("its `data` are not an array of bytes")
        _, shape, _, by_column, data = (part.content for part in parts)
        sides = [side.content for side in shape]
        if by_column or sides != [len(data) // _PIXELS, _PIXELS] or len(data) % _PIXELS:
            raise ValueError(f"its `data` have another shape than (n, {_PIXELS})")
        value.content = data
