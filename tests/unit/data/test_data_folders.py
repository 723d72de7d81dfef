"""YouTube Faces and image folders on tiny files in the official layouts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from gradsigns_lightning.data import ImageFolder, TensorImages, YouTubeFaces


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_person(root: Path, person: str, videos: dict[str, int], green: int) -> None:
    for video, frames in videos.items():
        for frame in range(1, frames + 1):
            path = root / "aligned_images_DB" / person / video / f"{video}.{frame}.jpg"
            write_image(path, (10 * frame, green, 20 * int(video)))


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    write_person(tmp_path, "Cy", {"0": 3, "2": 12, "10": 4}, 200)
    write_person(tmp_path, "Ann", {"1": 5, "3": 2}, 100)
    write_person(tmp_path, "Bob", {"5": 6}, 50)
    return tmp_path


def colours(images: torch.Tensor) -> list[list[int]]:
    """Round to tens, because JPEG changes colours a little."""
    return (images.mean(dim=(2, 3)) * 25.5).round().int().mul(10).tolist()


def test_persons_with_two_videos_are_the_classes_and_the_last_video_is_test(faces):
    module = YouTubeFaces(faces, image_size=8, val_fraction=0.0)
    assert module.classes == ("Ann", "Cy")
    assert module.n_classes == 2
    assert module.input_shape == (3, 8, 8)
    # Video 10 comes after video 2.
    assert colours(module.raw_images("test", class_index=1)) == [[10 * f, 200, 200] for f in (1, 2, 3, 4)]
    assert colours(module.raw_images("test", class_index=0)) == [[10 * f, 100, 60] for f in (1, 2)]
    assert len(module.raw_images("train", class_index=0)) == 5
    assert len(module.raw_images("train", class_index=1)) == 15
    x, y = next(iter(module.test_dataloader()))
    assert x.shape == (6, 3, 8, 8)
    assert y.tolist() == [0, 0, 1, 1, 1, 1]


def test_digits_that_are_no_decimals_are_letters_of_a_name(faces):
    write_image(faces / "aligned_images_DB" / "Cy" / "1\u00b2" / "\u00b2.jpg", (10, 200, 20))
    write_image(faces / "aligned_images_DB" / "Cy" / "11" / "11.\u0661.jpg", (30, 200, 20))  # an Arabic one
    assert colours(YouTubeFaces(faces, image_size=8).raw_images("test", class_index=1)) == [[30, 200, 20]]


def test_frames_are_in_order_of_their_number_and_evenly_thinned(faces):
    module = YouTubeFaces(faces, image_size=8, val_fraction=0.0, max_frames_per_video=4)
    frames = [colour[0] for colour in colours(module.raw_images("train", class_index=1))]
    assert frames == [10, 20, 30, 10, 40, 70, 100]


def test_the_number_of_persons_is_checked(faces):
    assert YouTubeFaces(faces, n_classes=2).n_classes == 2
    with pytest.raises(ValueError, match="`n_classes` must be 2"):
        YouTubeFaces(faces, n_classes=3)


def test_wrong_faces_arguments(faces, tmp_path):
    with pytest.raises(ValueError, match="`max_frames_per_video`"):
        YouTubeFaces(faces, max_frames_per_video=0)
    with pytest.raises(ValueError, match=r"`root`.*aligned_images_DB"):
        YouTubeFaces(tmp_path / "absent")
    write_person(tmp_path / "one", "Ann", {"1": 1, "2": 1}, 0)
    with pytest.raises(ValueError, match=r"`root`.*2 persons.*got 1"):
        YouTubeFaces(tmp_path / "one")


def write_folders(root: Path, parts: dict[str, int]) -> None:
    for number, part in enumerate(parts, start=1):
        for label, name in enumerate(("ant", "bee", "cat")):
            for i in range(parts[part]):
                write_image(root / part / name / f"{i}.png", (80 * label, 10 * i, number))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("held_out", ["test", "val"])
def test_image_folder(tmp_path, held_out, cache):
    write_folders(tmp_path, {"train": 10, held_out: 2})
    module = ImageFolder(tmp_path, image_size=(6, 9), cache=cache, batch_size=5)
    assert (module.n_classes, module.input_shape, module.classes) == (3, (3, 6, 9), ("ant", "bee", "cat"))
    assert len(module.raw_images("train")) == 27
    assert len(module.raw_images("val")) == 3
    raw = module.raw_images("test", class_index=2)
    expected = torch.tensor([[160, 0, 2], [160, 10, 2]]) / 255.0
    assert torch.equal(raw, expected[:, :, None, None].expand(2, 3, 6, 9))
    x, y = next(iter(module.test_dataloader()))
    assert y.tolist() == [0, 0, 1, 1, 2, 2]
    back = x * torch.tensor(module.std).view(1, 3, 1, 1) + torch.tensor(module.mean).view(1, 3, 1, 1)
    assert torch.allclose(back[4:], raw, atol=1e-6)
    assert next(iter(module.train_dataloader()))[0].shape == (5, 3, 6, 9)
    assert isinstance(module._source("test"), TensorImages) == cache


def test_a_val_folder_beside_test_holds_the_validation_images(tmp_path):
    write_folders(tmp_path, {"train": 4, "test": 2, "val": 3})
    module = ImageFolder(tmp_path, image_size=4)
    assert [len(module.raw_images(split)) for split in ("train", "val", "test")] == [12, 9, 6]
    assert (module.raw_images("val")[:, 2] * 255).round().unique().item() == 3
    assert (module.raw_images("test")[:, 2] * 255).round().unique().item() == 2


def test_the_resize_keeps_the_picture(tmp_path):
    write_folders(tmp_path, {"train": 1, "test": 1})
    picture = Image.new("RGB", (40, 20))
    picture.paste((255, 0, 0), (0, 0, 20, 20))
    picture.paste((0, 255, 0), (20, 10, 40, 20))
    picture.save(tmp_path / "test" / "ant" / "0.png")
    image = ImageFolder(tmp_path, image_size=(10, 20)).raw_images("test", class_index=0)[0]
    assert image[0, :, :8].min() == 1.0
    assert image[0, :, 12:].max() == 0.0
    assert image[1, 7:, 12:].min() == 1.0
    assert image[1, :3].max() == 0.0


def test_grey_files_become_three_equal_channels(tmp_path):
    write_folders(tmp_path, {"train": 1, "test": 1})
    Image.new("L", (5, 5), 51).save(tmp_path / "test" / "ant" / "0.png")
    image = ImageFolder(tmp_path, image_size=5).raw_images("test", class_index=0)
    assert torch.equal(image, torch.full((1, 3, 5, 5), 51 / 255.0))


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`root`.*train/<class>/"):
        ImageFolder(tmp_path)
    write_folders(tmp_path, {"train": 1})
    with pytest.raises(ValueError, match=r"`root`.*test/<class>/ or val/<class>/"):
        ImageFolder(tmp_path)
    write_folders(tmp_path, {"test": 1})
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"`root`.*test/dog"):
        ImageFolder(tmp_path).setup("test")
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match="got none in"):
        ImageFolder(tmp_path).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"image_size": 0}, ValueError),
        ({"image_size": (1, 2, 3)}, ValueError),
        ({"image_size": (4.5, 2)}, TypeError),
        ({"n_classes": 4}, ValueError),
        ({"cache": "yes"}, TypeError),
    ],
)
def test_wrong_folder_arguments_are_named(tmp_path, arguments, error):
    write_folders(tmp_path, {"train": 1, "test": 1})
    with pytest.raises(error, match=f"`{next(iter(arguments))}`"):
        ImageFolder(tmp_path, **arguments)


def test_without_pillow_the_message_says_what_to_install(tmp_path, monkeypatch):
    write_folders(tmp_path, {"train": 1, "test": 1})
    module = ImageFolder(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install 'gradsigns-lightning\[vision\]'"):
        module.raw_images("test")


@pytest.mark.parametrize("linked", ["file", "class", "split"])
def test_links_out_of_the_folder_are_refused(tmp_path, linked):
    """The folder may have been received, and its images may be sent to a server and put into a bundle."""
    root, private = tmp_path / "received", tmp_path / "private" / "b"
    write_image(private / "photo.png", (1, 2, 3))
    for name in "ab":
        write_image(root / "train" / name / "1.png", (10, 20, 30))
    (root / "test").mkdir()
    if linked == "file":
        (root / "test" / "b").mkdir()
        (root / "test" / "b" / "1.png").symlink_to(private / "photo.png")
    elif linked == "class":
        (root / "test" / "b").symlink_to(private)
    else:
        (root / "test").rmdir()
        (root / "test").symlink_to(private.parent)
    with pytest.raises(ValueError, match=r"`root`: .* is a link to a file outside the folder"):
        ImageFolder(root, image_size=8).raw_images("test")


def test_links_in_and_to_the_folder_are_followed(tmp_path):
    root = tmp_path / "data"
    for split in ("train", "test"):
        for name in "ab":
            write_image(root / split / name / "1.png", (10, 20, 30))
    (root / "test" / "b" / "2.png").symlink_to(root / "train" / "b" / "1.png")
    (tmp_path / "link").symlink_to(root)
    assert len(ImageFolder(tmp_path / "link", image_size=8).raw_images("test")) == 3
