"""Who chooses the images chooses the reading: a folder `data` next to a received file is not read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.cli import main
from gradsigns_lightning.data import FashionMNIST
from gradsigns_lightning.evidence import Bundle, make_statement
from gradsigns_lightning.models import MLP
from gradsigns_lightning.runs import suspect
from gradsigns_lightning.runs.checkpoint import describe

SHAPE, MEAN, STD = (1, 28, 28), [0.286], [0.353]
READERS = {
    "verify": ["verify", "checkpoint=x.ckpt", "key=a.gskey"],
    "verify with data": ["verify", "checkpoint=x.ckpt", "key=a.gskey", "data=fashion_mnist"],
    "trace": ["trace", "checkpoint=x.ckpt", "key=a.gskey"],
    "judge": ["judge", "checkpoint=x.ckpt", "bundle=a.gsbundle", "data=fashion_mnist"],
}
OTHERS = {"mnist": "t10k-images-idx3-ubyte", "cifar10": "cifar-10-batches-bin", "svhn": "test_32x32.mat"}


def write_images(folder: Path, n: int) -> Path:
    """Write ``n`` grey test images of class 0."""
    folder.mkdir(parents=True)
    head = bytes([0, 0, 8])
    images = (
        head + b"\3" + b"".join(size.to_bytes(4, "big") for size in (n, 28, 28)) + bytes([99]) * (n * 784)
    )
    (folder / "t10k-images-idx3-ubyte").write_bytes(images)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(head + b"\1" + n.to_bytes(4, "big") + bytes(n))
    return folder / "t10k-images-idx3-ubyte"


@pytest.fixture
def received(tmp_path, monkeypatch):
    """A folder with a model, a key, a bundle and crafted images; it is the current folder."""
    folder = tmp_path / "received"
    crafted = write_images(folder / "data", 61)
    key = WatermarkKey.generate("A", 128, input_shape=SHAPE, target_class=0, input_mean=MEAN, input_std=STD)
    key.save(folder / "a.gskey")
    signer = Ed25519PrivateKey.generate()
    Bundle(key=key, statement=make_statement([key], signer)).save(folder / "a.gsbundle", signer)
    model = {
        "_target_": "gradsigns_lightning.models.MLP",
        "input_shape": list(SHAPE),
        "n_classes": 10,
        "hidden": [16],
    }
    data = {"name": "fashion_mnist", "n_classes": 10, "input_shape": list(SHAPE), "mean": MEAN, "std": STD}
    weights = {f"net.{name}": value for name, value in MLP(SHAPE, 10, [16]).state_dict().items()}
    torch.save(
        {"state_dict": weights, "hyper_parameters": describe(model, data, key.commitment)}, folder / "x.ckpt"
    )
    monkeypatch.setattr(FashionMNIST, "_system_folders", ())
    monkeypatch.delenv("GRADSIGNS_DATA", raising=False)
    monkeypatch.chdir(folder)
    return crafted


def report(words, capsys) -> dict:
    assert main([*words, "json=r.json"]) in (0, 3), capsys.readouterr().err
    return json.loads(Path("r.json").read_text())


@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
def test_no_data_folder_is_read_for_a_verdict_that_nobody_named(words, received, capsys):
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "must hold the FashionMNIST files" in error
    assert "paths.data=FOLDER" in error
    assert "`data` that happens to be in the current one is not read" in error


@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
def test_a_named_data_folder_is_read_and_told(words, received, capsys, monkeypatch):
    found = report([*words, "paths.data=data"], capsys)
    assert (found["images_from"], found["n_images_given"]) == (str(received), 61)
    assert f"61, from {received}" in capsys.readouterr().out
    monkeypatch.setenv("GRADSIGNS_DATA", "data")
    assert report(words, capsys)["images_from"] == str(received)


@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
def test_the_systems_folder_is_read_without_a_word(words, received, capsys, tmp_path, monkeypatch):
    own = write_images(tmp_path / "system", 52)
    monkeypatch.setattr(FashionMNIST, "_system_folders", (own.parent,))
    found = report(words, capsys)
    assert (found["images_from"], found["n_images_given"]) == (str(own), 52)


@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
def test_an_empty_name_is_not_the_current_folder(words, received, capsys, monkeypatch):
    for file in received.parent.iterdir():
        file.rename(file.name)
    monkeypatch.setenv("GRADSIGNS_DATA", "")
    assert main(words) == 1
    assert (
        "`paths.data` (or the variable GRADSIGNS_DATA) must name a folder, got ''" in capsys.readouterr().err
    )


@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
@pytest.mark.parametrize("word", ["images=", "images=' '", "data.module.root=", "json="])
def test_an_unset_variable_of_a_script_is_not_the_current_folder(words, word, received, capsys):
    for file in received.parent.iterdir():
        file.rename(file.name)
    data = ["data=fashion_mnist"] if word.startswith("data.") else []
    assert main([*words, *data, word]) == 1
    kind = "file" if word == "json=" else "folder"
    assert f"`{word.partition('=')[0]}` must name a {kind}, got '" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["checkpoint=", "key=", "controls=['']", "bundle=", "api.journal="])
def test_no_file_has_an_empty_name(word, received, capsys):
    command = "judge" if word.startswith(("controls", "bundle")) else "verify"
    name = word.partition("=")[0]
    assert main([*(w for w in READERS[command] if not w.startswith(f"{name}=")), word]) == 1
    assert f"`{name}` must name a file, got ''" in capsys.readouterr().err


def test_no_more_images_are_read_than_a_folder_may_hold(received, capsys, monkeypatch):
    monkeypatch.setattr(suspect, "MAX_VALUES", 55 * 784 + 1)
    assert report([*READERS["verify"], "paths.data=data"], capsys)["n_images_given"] == 55


@pytest.mark.parametrize("name", OTHERS)
def test_other_data_sets_are_looked_for_nowhere_either(name, received, capsys):
    words = ["verify", "checkpoint=x.ckpt", "key=a.gskey", f"data={name}"]
    assert main(words) == 1
    assert "is not read for a verdict" in capsys.readouterr().err
    assert main([*words, "paths.data=elsewhere"]) == 1
    error = capsys.readouterr().err
    assert OTHERS[name] in error
    assert "is not read for a verdict" not in error
