"""The data sets that a checkpoint may name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gradsigns_lightning.data.base import ImageDataModule
from gradsigns_lightning.data.cifar10 import CIFAR10
from gradsigns_lightning.data.digits import Digits
from gradsigns_lightning.data.mnist import MNIST, FashionMNIST
from gradsigns_lightning.data.svhn import SVHN

_LONGEST = 80
_DATA_SETS: dict[str, Callable[[str | Path | None], ImageDataModule]] = {
    "digits": lambda root: Digits(),
    "fashion_mnist": FashionMNIST,
    "mnist": MNIST,
    "cifar10": CIFAR10,
    "svhn": SVHN,
}


def shipped_data(name: str, root: str | Path | None) -> ImageDataModule:
    """Return a data set that this package reads; nothing is downloaded.

    Args:
        name: name of the data set, from a file that may come from anyone; it selects an entry of a table and
            is not looked up elsewhere.
        root: folder of data sets; with ``None`` only data sets can be read that need none, or that the system
            provides.

    Raises:
        ValueError: the table has no data set of that name.
    """
    if name not in _DATA_SETS:
        raise ValueError(
            f"`checkpoint` names the data {name[:_LONGEST]!r}; test images are found for "
            f"{', '.join(_DATA_SETS)} alone. Give `images=FOLDER` with images of the key's target class, or "
            "`data=...`."
        )
    return _DATA_SETS[name](root)
