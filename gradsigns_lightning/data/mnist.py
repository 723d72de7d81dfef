"""MNIST and Fashion-MNIST from their IDX files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from gradsigns_lightning.core.utils.files import MissingFileError
from gradsigns_lightning.core.utils.optional import require
from gradsigns_lightning.data.base import ImageDataModule
from gradsigns_lightning.data.idx import find_idx, read_idx
from gradsigns_lightning.data.sources import TensorImages

_LARGEST = 2**26  # bytes of a file, unpacked; the largest official one has 47 million
_STEMS = {
    True: ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    False: ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class MNIST(ImageDataModule):
    """MNIST (LeCun et al., 1998): 60,000 training and 10,000 test images, 10 classes, ``(1, 28, 28)``.

    The IDX files, plain or ``.gz``, are looked for in ``root`` and in torchvision's layout
    ``root/MNIST/raw``.

    Args:
        root: folder of the files; with ``download`` they are put there.
        download: let torchvision download the files if they do not exist.
        mean: mean in raw ``[0, 1]`` units.
        std: standard deviation in raw ``[0, 1]`` units.
        **kwargs: see :class:`~gradsigns_lightning.data.ImageDataModule`.

    Raises:
        ValueError: an argument is out of its range; later, in ``setup``: the files do not exist.
    """

    _name: ClassVar[str] = "MNIST"
    _system_folders: ClassVar[tuple[Path, ...]] = ()
    _hint: ClassVar[str] = ""

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        download: bool = False,
        mean: Sequence[float] = (0.1307,),
        std: Sequence[float] = (0.3081,),
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape=(1, 28, 28), n_classes=10, mean=mean, std=std, root=root, **kwargs)
        if download and root is None:
            raise ValueError("`root` must name the folder to download to, got None with download=True.")
        self.download = download

    def prepare_data(self) -> None:
        """Download the files if ``download`` is set and they do not exist.

        Raises:
            ImportError: torchvision, which downloads, is not installed.
        """
        if self.download and None in (self._find(True) + self._find(False)):
            getattr(require("torchvision.datasets", extra="vision"), self._name)(
                str(self.root), download=True
            )

    def load_images(self, train: bool) -> TensorImages:
        """Read the training or the test images.

        Raises:
            ValueError: the files do not exist or are malformed.
        """
        images, labels = self._find(train)
        if images is None or labels is None:
            raise MissingFileError(self._missing(train))
        pixels = read_idx(images, sides=self.input_shape[1:], max_bytes=_LARGEST)
        return TensorImages(pixels.unsqueeze(1), read_idx(labels, sides=(), max_bytes=_LARGEST))

    def origin(self, train: bool) -> str:
        """Return the file of the images; see the base class."""
        images, _ = self._find(train)
        return super().origin(train) if images is None else str(images.resolve())

    def _find(self, train: bool) -> tuple[Path | None, Path | None]:
        images, labels = _STEMS[train]
        return find_idx(self._folders(), images), find_idx(self._folders(), labels)

    def _folders(self) -> list[Path]:
        own = [] if self.root is None else [self.root, self.root / self._name / "raw"]
        return [*own, *self._system_folders]

    def _missing(self, train: bool) -> str:
        return (
            f"`root` must hold the {self._name} files {_STEMS[train][0]} and {_STEMS[train][1]} (plain or "
            f".gz), itself or in {self._name}/raw; got root={self.root}, where they are not. Set "
            f"`download=True` to get them{self._hint}."
        )


class FashionMNIST(MNIST):
    """Fashion-MNIST (Xiao et al., 2017): 60,000 training, 10,000 test images, 10 classes, ``(1, 28, 28)``.

    The IDX files, plain or ``.gz``, are looked for in ``root``, in torchvision's layout
    ``root/FashionMNIST/raw``, and where Debian's package ``dataset-fashion-mnist`` puts them. The arguments
    are those of :class:`MNIST`.
    """

    _name = "FashionMNIST"
    _system_folders = (Path("/usr/share/datasets/fashion-mnist"),)
    _hint = ", or install Debian's package dataset-fashion-mnist"

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        download: bool = False,
        mean: Sequence[float] = (0.2860,),
        std: Sequence[float] = (0.3530,),
        **kwargs: Any,
    ) -> None:
        super().__init__(root, download=download, mean=mean, std=std, **kwargs)
