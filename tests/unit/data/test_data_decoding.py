"""Received image files."""

from __future__ import annotations

import shutil
import struct
import subprocess
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from gradsigns_lightning.data import FileImages, ImageFolder, decoding
from gradsigns_lightning.data.decoding import SUFFIXES, decode, read_folder

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n%%EndComments\nshowpage\n%%EOF\n"


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tiff", "gif", "webp", "jpg"])
def test_the_formats_are_read(suffix, tmp_path):
    file = tmp_path / f"image.{suffix}"
    Image.fromarray(PIXELS).save(file)
    decoded = decode(file, "RGB", (6, 5))
    assert decoded.shape == (3, 6, 5)
    if suffix in ("png", "bmp", "ppm", "tiff"):
        assert np.array_equal(decoded.permute(1, 2, 0), PIXELS)


def test_the_size_and_the_channels_are_the_callers(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", "L", (3, 9)).shape == (1, 3, 9)
    assert decode(tmp_path / "a.png", "RGBA", (6, 5)).shape == (4, 6, 5)


DAMAGED = {
    "empty": b"",
    "text": b"no image",
    "postscript": EPS,
    "cut": png(5, 6, bytes(36))[:44],
    "no data": png(5, 6),
    "bad checksum": png(5, 6, bytes(36)).replace(b"IDAT", b"IDAX"),
    "bomb": png(50_000, 50_000),
    "half a bomb": png(10_000, 10_000),
    "thin": png(32_769, 1, bytes(32_770)),
    "high": png(1, 32_769, bytes(65_538)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_image_is_named_whatever_its_suffix_says(name, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/true")  # as if Ghostscript were installed
    file = tmp_path / "image.png"
    file.write_bytes(DAMAGED[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError,
            match=r"image\.png' (cannot be read as an image|has more pixels than "
            r"Pillow's limit)",
        ):
            decode(file, "RGB", (6, 5))
        with pytest.raises(ValueError, match=r"`images`: '.*image\.png'"):
            read_folder(str(tmp_path), (3, 6, 5))
        with pytest.raises(ValueError, match=r"image\.png'"):
            FileImages([file], torch.tensor([0]), size=(6, 5)).pixels(torch.tensor([0]))


def test_the_longest_side_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png(32_768, 1, bytes(32_769)))
    assert decode(tmp_path / "a.png", "L", (2, 3)).tolist() == [[[0] * 3] * 2]


def test_an_image_that_is_large_only_while_it_is_resized_is_refused(tmp_path):
    """A high image goes through a wide and high one on its way to a wide one."""
    (tmp_path / "a.png").write_bytes(png(1, 32_768, bytes(65_536)))
    with pytest.raises(ValueError, match="before or while it is resized"):
        decode(tmp_path / "a.png", "L", (1, 32_768))


# --- folders of images


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "received"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((4, 5), 51, np.uint8)).save(folder / name)
    return folder


def test_the_images_of_a_folder_are_read(folder):
    assert torch.equal(read_folder(str(folder), (1, 4, 5)), torch.full((2, 1, 4, 5), 51.0) / 255)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    (folder / "b.png").replace(tmp_path / "private.png")
    (folder / "b.png").symlink_to("../private.png")
    with pytest.raises(ValueError, match=r"`images`: '.*b\.png' is a link to a file outside the folder"):
        read_folder(str(folder), (1, 4, 5))


def test_links_within_the_folder_and_to_it_are_followed(folder, tmp_path):
    (folder / "c.png").symlink_to("a.png")
    (tmp_path / "link").symlink_to(folder)
    assert len(read_folder(str(tmp_path / "link"), (1, 4, 5))) == 3


@pytest.mark.parametrize(
    "shape", [(1, 8192, 32768), (4, 16384, 8192), (1, 32769, 1), (1, 1, 32769), (1, 2**40, 2**40)]
)
def test_images_of_a_foreign_keys_shape_are_bounded_before_they_are_read(folder, shape, monkeypatch):
    (folder / "c.png").write_bytes(b"")
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("an image was read"))
    with pytest.raises(
        ValueError, match=r"`images`: .* 3 images of the key's `input_shape` \(" + ", ".join(map(str, shape))
    ):
        read_folder(str(folder), shape)


def test_the_same_files_are_images_wherever_a_folder_is_read(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for suffix in (*SUFFIXES, ".PNG", ".txt"):
                Image.fromarray(PIXELS).save(folder / f"image{suffix}", format="PNG")
    assert len(read_folder(str(folder), (3, 6, 5))) == len(SUFFIXES) + 1
    assert len(ImageFolder(tmp_path).load_images(train=False)) == 2 * (len(SUFFIXES) + 1)
