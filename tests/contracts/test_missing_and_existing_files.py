"""Missing files raise ``FileNotFoundError``, existing ones ``FileExistsError``; both are ``ValueError``s."""

import importlib.util
import pickle

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from gradsigns_lightning import WatermarkKey, strip, verify, verify_api
from gradsigns_lightning.core.utils.files import ExistingFileError, MissingFileError
from gradsigns_lightning.data import CIFAR10, MNIST, SVHN, ImageFolder, YouTubeFaces
from gradsigns_lightning.data.decoding import read_folder
from gradsigns_lightning.evidence import Bundle, make_statement
from gradsigns_lightning.models.release_2021 import load_2021
from gradsigns_lightning.oracles import OnnxOracle
from gradsigns_lightning.runs.build import build
from gradsigns_lightning.runs.checkpoint import read_checkpoint
from gradsigns_lightning.runs.options import load_key
from gradsigns_lightning.runs.suspect import open_control
from gradsigns_lightning.verification.api.queries import read_journal

KEY = WatermarkKey.generate("A", 8, input_shape=(1, 8, 8), target_class=1, n_carriers=16, secret=bytes(32))
MODEL, IMAGES = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.rand(60, 1, 8, 8)
SIGNER = Ed25519PrivateKey.generate()
BUNDLE = Bundle(key=KEY, statement=make_statement([KEY], SIGNER))
FOLDER = {"_target_": "gradsigns_lightning.data.ImageFolder", "image_size": 8}

READERS = {
    "WatermarkKey.load": WatermarkKey.load,
    "verify": lambda path: verify(MODEL, path, IMAGES),
    "load_key": lambda path: load_key(str(path)),
    "Bundle.load": Bundle.load,
    "read_journal": read_journal,
    "read_checkpoint": lambda path: read_checkpoint(str(path)),
    "a control": lambda path: open_control(f"{path}.onnx", KEY),
    "strip": lambda path: strip(path, path.with_name("out.ckpt")),
    "OnnxOracle": OnnxOracle,
    "load_2021": load_2021,
    "read_folder": lambda path: read_folder(str(path), (1, 8, 8)),
    "MNIST": lambda path: MNIST(path).load_images(train=True),
    "CIFAR10": lambda path: CIFAR10(path).load_images(train=True),
    "SVHN": lambda path: SVHN(path).load_images(train=True),
    "ImageFolder": lambda path: ImageFolder(path, image_size=8),
    "ImageFolder, configured": lambda path: build(FOLDER | {"root": str(path)}, option="data.module"),
    "YouTubeFaces": lambda path: YouTubeFaces(path),
}
WRITERS = {
    "WatermarkKey.save": KEY.save,
    "Bundle.save": lambda path: BUNDLE.save(path, SIGNER),
    "strip": lambda path: strip("any.ckpt", path),
    "verify_api": lambda path: verify_api(MODEL, KEY, IMAGES, journal=path, max_queries=1),
}
EXTRAS = {"OnnxOracle": "onnxruntime", "load_2021": "h5py"}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_there_is_not_found(reader, tmp_path):
    if reader in EXTRAS and importlib.util.find_spec(EXTRAS[reader]) is None:
        pytest.skip(f"{EXTRAS[reader]} is not installed")
    with pytest.raises(MissingFileError, match=r"^`.*nowhere"):
        READERS[reader](tmp_path / "nowhere")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_to_write_to_that_is_not_there_is_not_found(writer, tmp_path):
    with pytest.raises(MissingFileError, match=r"^`.*nowhere"):
        WRITERS[writer](tmp_path / "nowhere" / "a")


# which goes on from a journal
@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "verify_api"])
def test_what_would_be_replaced_exists(writer, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ExistingFileError, match=r"^`.*must not name an existing"):
        WRITERS[writer](tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("reader", ["WatermarkKey.load", "read_journal", "read_checkpoint", "strip", "MNIST"])
def test_what_is_there_but_something_else_is_no_missing_file(reader, tmp_path):
    folder = tmp_path / "nowhere"
    folder.mkdir()
    kind = MissingFileError if reader == "MNIST" else ValueError  # a folder without the data set's files
    with pytest.raises(ValueError, match=r"must name|must hold") as caught:
        READERS[reader](folder)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("kind", "usual"), [(MissingFileError, FileNotFoundError), (ExistingFileError, FileExistsError)]
)
def test_they_are_caught_as_either(kind, usual):
    error = pickle.loads(pickle.dumps(kind("`path` says why.")))
    assert isinstance(error, usual)
    assert isinstance(error, ValueError)
    assert str(error) == "`path` says why."
