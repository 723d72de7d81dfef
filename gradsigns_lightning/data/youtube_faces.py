"""YouTube Faces from the official aligned frames."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradsigns_lightning.core.utils.checks import check_int
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

_FOLDER = "aligned_images_DB"


class YouTubeFaces(FolderDataModule):
    """YouTube Faces (Wolf et al., 2011) for identification, from the aligned frames.

    The frames are ``aligned_images_DB/<person>/<video>/<video>.<frame>.jpg``. The classes are the persons
    with at least two videos, sorted by name. A person's last video holds test images, the other videos
    training and validation images. Validation frames come from the same videos as training frames, so the
    validation accuracy is higher than the test accuracy.

    Args:
        root: folder that holds ``aligned_images_DB``.
        image_size: height and width to which every frame is resized; one integer means a square.
        max_frames_per_video: use at most this many frames, evenly spaced over the video; ``None`` uses all.
        n_classes: the number of classes that the caller expects; ``None`` takes the number found.
        cache: decode all frames once, in ``setup``, and keep them as uint8 in memory.
        mean: mean of every channel in raw ``[0, 1]`` units; the default is ImageNet's.
        std: standard deviation of every channel in raw ``[0, 1]`` units; the default is ImageNet's.
        **kwargs: see :class:`~gradsigns_lightning.data.ImageDataModule`.

    Raises:
        ValueError: the folder is missing or has no person with two videos, or an argument is out of its
            range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int | Sequence[int] = 64,
        max_frames_per_video: int | None = None,
        n_classes: int | None = None,
        cache: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        folder = Path(root).expanduser()
        self._videos = _videos_by_person(folder)
        if max_frames_per_video is not None:
            check_int("max_frames_per_video", max_frames_per_video, minimum=1)
        self.max_frames_per_video = max_frames_per_video
        super().__init__(
            folder,
            list(self._videos),
            n_classes=n_classes,
            image_size=image_size,
            cache=cache,
            mean=mean,
            std=std,
            **kwargs,
        )

    def load_images(self, train: bool) -> ImageSource:
        """Return the frames of every person's last video, or those of all the others."""
        files: list[LabelledFile] = []
        for label, videos in enumerate(self._videos.values()):
            for video in videos[:-1] if train else videos[-1:]:
                files += [(frame, label) for frame in self._frames(video)]
        return self.open_files(files)

    def _frames(self, video: Path) -> list[Path]:
        frames = sorted(image_files(video, below=True), key=_natural)
        if self.max_frames_per_video is None or len(frames) <= self.max_frames_per_video:
            return frames
        return [
            frames[i * len(frames) // self.max_frames_per_video] for i in range(self.max_frames_per_video)
        ]


def _videos_by_person(root: Path) -> dict[str, list[Path]]:
    folder = root / _FOLDER
    if not folder.is_dir():
        raise error_about(folder)(
            f"`root` must hold {_FOLDER}/<person>/<video>/<video>.<frame>.jpg, got root={root}. Ask the "
            "authors of the data set for the aligned frames and unpack them there."
        )
    videos = {person.name: sorted(subfolders(person), key=_natural) for person in subfolders(folder)}
    several = {name: found for name, found in videos.items() if len(found) >= 2}
    if len(several) < 2:
        raise ValueError(
            f"`root` must hold at least 2 persons with 2 videos each, got {len(several)} in {folder}."
        )
    return several


def _natural(path: Path) -> list[tuple[int, str]]:
    """Order names by the numbers in them, so that frame 10 follows frame 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]
