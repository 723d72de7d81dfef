"""Any data set in the layout of torchvision's ``ImageFolder``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradsigns_lightning.core.utils.files import error_about
from gradsigns_lightning.data.decoding import image_files
from gradsigns_lightning.data.folder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FolderDataModule,
    LabelledFile,
    subfolders,
)
from gradsigns_lightning.data.sources import ImageSource


class ImageFolder(FolderDataModule):
    """Image files in ``root/train/<class>/`` and ``root/test/<class>/`` or ``root/val/<class>/``.

    Classes are the folders of ``train``, sorted by name. With both ``test`` and ``val`` the validation images
    are those of ``val``, and ``val_fraction`` has no effect. With one of them it holds the test images, and
    the validation images are split off the training images.

    Args:
        root: folder that holds ``train``.
        image_size: height and width to which every image is resized; one integer means a square.
        n_classes: the number of classes that the caller expects; ``None`` takes the number of folders.
        cache: decode all images once, in ``setup``, and keep them as uint8 in memory.
        mean: mean of every channel in raw ``[0, 1]`` units; the default is ImageNet's.
        std: standard deviation of every channel in raw ``[0, 1]`` units; the default is ImageNet's.
        **kwargs: see :class:`~gradsigns_lightning.data.ImageDataModule`.

    Raises:
        ValueError: folders are missing or empty, or an argument is out of its range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int | Sequence[int] = 64,
        n_classes: int | None = None,
        cache: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        folder = Path(root).expanduser()
        names = [path.name for path in subfolders(_existing(folder, "train"))]
        self._held_out = next((name for name in ("test", "val") if (folder / name).is_dir()), "test")
        _existing(folder, self._held_out)
        super().__init__(
            folder,
            names,
            n_classes=n_classes,
            image_size=image_size,
            cache=cache,
            mean=mean,
            std=std,
            **kwargs,
        )

    def load_images(self, train: bool) -> ImageSource:
        """Return the images below ``train``, or those below ``test`` (or ``val``, if there is no ``test``).

        Raises:
            ValueError: a class is empty, or it is not among those of ``train``.
        """
        return self._open("train" if train else self._held_out)

    def load_train_and_val(self) -> tuple[ImageSource, ImageSource]:
        """See the base class; a ``val`` folder beside ``test`` holds the validation images."""
        if self._held_out == "test" and self._folder("val").is_dir():
            return self.load_images(train=True), self._open("val")
        return super().load_train_and_val()

    def _folder(self, name: str) -> Path:
        return self.required_root() / name

    def _open(self, name: str) -> ImageSource:
        files: list[LabelledFile] = []
        for folder in subfolders(self._folder(name)):
            if folder.name not in self.classes:
                raise ValueError(
                    f"`root` has the class folder {name}/{folder.name}, but no train/{folder.name}."
                )
            found = image_files(folder, below=True)
            if not found:
                raise ValueError(f"`root` must hold images in every class folder, got none in {folder}.")
            files += [(path, self.classes.index(folder.name)) for path in found]
        return self.open_files(files)


def _existing(root: Path, name: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        raise error_about(folder)(
            f"`root` must hold train/<class>/ and test/<class>/ or val/<class>/, got root={root} without "
            f"{name}."
        )
    return folder
