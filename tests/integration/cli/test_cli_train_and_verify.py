from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.cli import main
from gradsigns_lightning.data import Digits

RESULT = {
    *(
        "n_bits",
        "n_matches",
        "n_erasures",
        "bit_error_rate",
        "p_value",
        "log10_p_value",
        "margin",
        "n_queries",
        "alpha",
        "verdict",
    ),
    "commitment",
}


def read_json(name):
    return json.loads(Path(name).read_text())


def files_with(folder, needle):
    return [file.name for file in folder.rglob("*") if file.is_file() and needle in file.read_bytes()]


@pytest.mark.parametrize(
    ("words", "says", "warns"),
    [
        (
            ["key=b32"],
            ["`judge` charges for 2^64 keys tried, 94 bits would do", "44 bits would do for 10000 customers"],
            False,
        ),
        (["data=fashion_mnist", "key=b128"], [], False),
        (["key.n_bits=24"], ["94 bits would do", "44 bits would do"], True),
    ],
)
def test_keygen_says_what_the_key_can_never_do(words, says, warns, capsys):
    assert main(["keygen", "owner=A", "out=k.gskey", *words]) == 0
    out, err = capsys.readouterr()
    assert out.count("would do") == len(says)
    assert all(part in out for part in says)
    assert ("warning: A key of 24 bits can never be `owned`" in err) is warns


def test_train_says_what_a_new_key_can_never_do(capsys):
    words = ["train", "experiment=demo", "trainer.max_epochs=1", "hydra.run.dir=run"]
    assert main([*words, "key.n_bits=24"]) == 0
    out, err = capsys.readouterr()
    assert "94 bits would do" in out
    assert "warning: A key of 24 bits can never be `owned`" in err
    assert (
        main(["train", "experiment=demo", "trainer.max_epochs=1", "hydra.run.dir=other", "key=run/key.gskey"])
        == 0
    )
    out, err = capsys.readouterr()
    assert "94 bits would do" not in out
    assert "warning: A key of 24 bits" not in err  # it was said when the key was made


def test_a_configuration_names_a_key_by_its_file(capsys):
    assert main(["keygen", "owner=A", "out=k.gskey", "key=b32"]) == 0
    Path("conf/experiment").mkdir(parents=True)
    content = "# @package _global_\ndefaults:\n  - demo\nkey: k.gskey\ntrainer:\n  max_epochs: 1\n"
    Path("conf/experiment/mine.yaml").write_text(content)
    assert main(["train", "--config-dir", "conf", "experiment=mine", "json=a.json"]) == 0
    assert read_json("a.json")["commitment"] == WatermarkKey.load("k.gskey").commitment
    assert not list(Path("outputs").rglob("*.gskey"))


def test_a_key_file_may_have_any_name_but_a_choices(capsys):
    assert main(["keygen", "owner=A", "out=plain", "key=b32"]) == 0
    Path("b32").write_bytes(Path("plain").read_bytes())
    words = ["train", "experiment=demo", "trainer.max_epochs=1"]
    for name in ("plain", "b32"):
        assert main([*words, f"key={name}", f"json={name}.json"]) == 0
    commitments = [read_json(f"{name}.json")["commitment"] for name in ("plain", "b32")]
    own = WatermarkKey.load("plain").commitment
    assert commitments[0] == own
    assert commitments[1] != own


@pytest.mark.parametrize(
    "words", [["key=file", "key.path=plain"], ["key.path=plain"], ["key=b64", "key=plain"]]
)
def test_a_key_file_is_a_choice_of_the_group(words):
    assert main(["keygen", "owner=A", "out=plain", "key=b32", "target_class=3"]) == 0
    # An experiment's settings for a new key are ignored.
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults: [demo]\nkey: {n_bits: 40, target_class: 1}\n"
    )
    quick = [
        "--config-dir",
        "conf",
        "experiment=mine",
        "trainer.max_epochs=1",
        "hydra.run.dir=run",
        "progress=false",
        "json=a.json",
    ]
    assert main(["train", *quick, *words]) == 0
    assert read_json("a.json")["commitment"] == WatermarkKey.load("plain").commitment
    assert not Path("run/key.gskey").exists()


def test_a_key_file_takes_no_settings_of_a_new_key(capsys):
    assert main(["train", "experiment=demo", "key=plain.gskey", "key.n_bits=64"]) == 2
    assert "`key.n_bits`" in capsys.readouterr().err
    assert main(["train", "experiment=demo", "key=file"]) == 2
    assert "`key` must be given, as in `key=FILE`" in capsys.readouterr().err


def test_commit_says_what_no_judge_can_find(capsys):
    assert main(["keygen", "owner=A", "out=k.gskey", "key=b32"]) == 0
    capsys.readouterr()
    assert main(["commit", "key=k.gskey"]) == 0
    assert "`judge` charges for 2^64 keys tried, 94 bits would do" in capsys.readouterr().out


def test_keygen_prints_the_commitment_and_refuses_to_overwrite(capsys):
    words = [
        "keygen",
        "owner=Acme Vision",
        "data=digits",
        "key=b32",
        "out=k.gskey",
        "scope=demo",
        "target_class=2",
        "json=k.json",
    ]
    assert main(words) == 0
    key = WatermarkKey.load("k.gskey")
    assert (key.owner, key.scope, key.n_bits, key.target_class) == ("Acme Vision", "demo", 32, 2)
    assert (key.input_shape, key.input_mean, key.input_std) == ((1, 8, 8), (0.305,), (0.376,))
    out = capsys.readouterr().out
    assert key.commitment in out
    assert key.reveal()["secret"] not in out
    assert read_json("k.json")["commitment"] == key.commitment
    assert main(words) == 1
    assert "existing file" in capsys.readouterr().err
    assert WatermarkKey.load("k.gskey").commitment == key.commitment


def test_train_signs_and_its_twin_is_not_signed(signed):
    content = signed.content
    assert set(content) >= RESULT
    assert content["n_bits"] == 32
    assert content["bit_error_rate"] <= 0.1 < content["twin_bit_error_rate"]
    assert content["p_value"] < 1e-5 < content["twin_p_value"]
    assert content["twin_verdict"] == "not_proven"
    assert 0.8 < content["accuracy"] <= 1
    assert 0.8 < content["twin_accuracy"] <= 1
    assert content["seconds_per_epoch"] > 0
    assert content["twin_seconds_per_epoch"] > 0
    assert (content["epochs"], content["seed"]) == (3, 5)
    assert content["config"]["watermark"]["_target_"] == "gradsigns_lightning.GradSigns"
    assert content["watermark"] is True
    assert content["commitment"] == WatermarkKey.load(signed.key).commitment


def test_train_reports_how_the_mark_stands_at_the_end_of_the_fit(signed, capsys):
    ended = signed.content["end_of_fit"]
    assert ended["n_bits"] == 32
    assert ended["held_out"]
    assert ended["n_embedded"] > 10
    assert ended["owned"] is (ended["n_matches"] == 32)
    assert f"{ended['n_matches']} of 32 bits held, p = " in signed.printed
    assert f"read on {ended['n_images']} held-out images" in signed.printed
    quick = ["experiment=demo", "trainer.max_epochs=1", "optimizer.lr=1e-6", "progress=false"]
    words = ["train", *quick, "json=a.json", "hydra.run.dir=run"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert not read_json("a.json")["end_of_fit"]["owned"]
    assert ": not owned at alpha 1e-09; read on" in out
    assert err.count("the model would not be `owned`") == 1
    assert main([*words[:-2], "watermark=none", "json=b.json", "hydra.run.dir=unmarked"]) == 0
    assert read_json("b.json")["end_of_fit"] is None


def test_train_prints_one_table_and_nothing_else(signed):
    assert signed.content["commitment"] in signed.printed
    assert "points against the unmarked twin's" in signed.printed
    assert signed.printed.splitlines()[0].strip() == "gradsigns train"


def test_no_file_of_the_run_but_the_key_holds_the_secret(signed):
    secret = bytes.fromhex(WatermarkKey.load(signed.key).reveal()["secret"])
    assert files_with(signed.folder.parent, secret) == ["acme.gskey"]
    assert files_with(signed.folder.parent, secret.hex().encode()) == []
    assert secret.hex() not in signed.printed


def test_verify_reads_what_train_read(signed, capsys):
    words = [f"checkpoint={signed.folder / 'model.ckpt'}", f"key={signed.key}", "json=v.json"]
    assert main(["verify", *words]) == 0
    content = read_json("v.json")
    for name in RESULT:
        assert content[name] == pytest.approx(signed.content[name]), name
    assert content["commitment"] in capsys.readouterr().out


def test_verify_of_the_twin_exits_with_3(signed):
    words = [f"checkpoint={signed.folder / 'twin.ckpt'}", f"key={signed.key}", "json=v.json"]
    assert main(["verify", *words]) == 3
    content = read_json("v.json")
    assert content["verdict"] == "not_proven"
    assert content["n_matches"] == signed.content["twin_n_matches"]


def test_verify_with_a_folder_of_images(signed, tmp_path):
    raw = Digits().raw_images("test", 3)
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(raw):
        pixels = (image[0] * 255).round().numpy().astype(np.uint8)
        # Every second one in another size, which is undone by the reader.
        Image.fromarray(np.kron(pixels, np.ones((2, 2), np.uint8)) if i % 2 else pixels).save(
            folder / f"{i:03}.png"
        )
    (folder / "notes.txt").write_text("no image")
    words = [
        f"checkpoint={signed.folder / 'model.ckpt'}",
        f"key={signed.key}",
        f"images={folder}",
        "json=v.json",
    ]
    assert main(["verify", *words]) == 0
    content = read_json("v.json")
    assert content["n_queries"] == len(raw)
    assert content["n_matches"] >= signed.content["n_matches"] - 2
    assert main(["verify", *words[:2], f"images={tmp_path}"]) == 1


def test_alpha_decides_the_verdict(signed):
    words = [f"checkpoint={signed.folder / 'model.ckpt'}", f"key={signed.key}", "json=v.json"]
    assert main(["verify", *words, "alpha=0.01"]) == 0
    assert read_json("v.json")["verdict"] == "owned"
    assert main(["verify", *words, "alpha=1e-30"]) == 3
    assert read_json("v.json")["verdict"] == "not_proven"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda content: {"state_dict": content["state_dict"]}, "not written by `gradsigns train`"),
        (lambda content: [1, 2], "no `state_dict`"),
        (
            lambda content: {**content, "hyper_parameters": _with_target(content, "os.getcwd")},
            "not a network of this package",
        ),
        (
            lambda content: {**content, "hyper_parameters": _with_target(content, "torch.hub.load")},
            "not a network of this package",
        ),
        (lambda content: {**content, "state_dict": {}}, "do not fit the model"),
        (lambda content: Digits, "damaged"),
    ],
)
def test_foreign_checkpoints_are_refused(signed, make, message, capsys):
    content = torch.load(signed.folder / "model.ckpt", weights_only=True)
    torch.save(make(content), "foreign.ckpt")
    assert main(["verify", "checkpoint=foreign.ckpt", f"key={signed.key}"]) == 1
    assert message in capsys.readouterr().err


def with_data(signed, **changes):
    """Write the signed model as a checkpoint that states other data."""
    content = torch.load(signed.folder / "model.ckpt", weights_only=True)
    content["hyper_parameters"]["gradsigns"]["data"] |= changes
    torch.save(content, "other.ckpt")
    return "checkpoint=other.ckpt"


@pytest.mark.parametrize("command", ["verify", "trace"])
def test_a_checkpoint_of_other_normalisation_is_refused(signed, capsys, command):
    assert main([command, with_data(signed, mean=[0.5]), f"key={signed.key}"]) == 1
    assert "`input_mean` is (0.305,) in the key and (0.5,) in the data" in capsys.readouterr().err


def test_a_checkpoint_of_data_that_need_a_folder_is_read_with_images(signed, capsys, tmp_path):
    words = ["verify", with_data(signed, name="image_folder"), f"key={signed.key}", "json=v.json"]
    assert main(words) == 1
    assert "`images=FOLDER`" in capsys.readouterr().err
    for i, image in enumerate(Digits().raw_images("test", 3)):
        Image.fromarray((image[0] * 255).round().numpy().astype(np.uint8)).save(tmp_path / f"{i:03}.png")
    assert main([*words, f"images={tmp_path}"]) in (0, 3)
    assert read_json("v.json")["n_matches"] >= signed.content["n_matches"] - 2
    assert main([*words, "data=digits"]) in (0, 3)
    assert read_json("v.json")["n_matches"] == signed.content["n_matches"]


def _with_target(content, target):
    entry = content["hyper_parameters"]["gradsigns"]
    return {"gradsigns": {**entry, "model": {**entry["model"], "_target_": target}}}


def test_a_key_of_other_images_is_refused(signed, capsys):
    WatermarkKey.generate("x", 32, input_shape=(1, 28, 28), target_class=0).save("other.gskey")
    assert main(["verify", f"checkpoint={signed.folder / 'model.ckpt'}", "key=other.gskey"]) == 1
    assert "`input_shape`" in capsys.readouterr().err
    assert main(["train", "data=digits", "model=mlp", "key=other.gskey"]) == 1
    assert "`key` does not fit the data: `input_shape` is (1, 28, 28) in the key" in capsys.readouterr().err


def test_verify_names_what_is_missing(capsys):
    assert main(["verify"]) == 2
    assert "`key` must be given" in capsys.readouterr().err


def test_a_trained_model_is_signed_afterwards(signed):
    """Both models start from the given weights, so one short epoch keeps the accuracy."""
    words = [
        "train",
        "data=digits",
        "model=mlp",
        "trainer.accelerator=cpu",
        "progress=false",
        "data.module.batch_size=32",
    ]
    words += [
        f"init={signed.folder / 'twin.ckpt'}",
        f"key={signed.key}",
        "trainer.max_epochs=1",
        "json=t.json",
        "logger=none",
    ]
    assert main([*words, "optimizer.lr=1e-6", "watermark=none"]) == 0
    unmarked = read_json("t.json")
    assert unmarked["accuracy"] == pytest.approx(signed.content["twin_accuracy"], abs=0.01)
    assert unmarked["verdict"] == "not_proven"
    assert math.isclose(unmarked["bit_error_rate"], signed.content["twin_bit_error_rate"], abs_tol=0.1)
    assert main([*words, "optimizer.lr=1e-3"]) == 0
    marked = read_json("t.json")
    assert marked["n_matches"] > unmarked["n_matches"]


LINKED = ["data=digits", "model=mlp", "key=b32", "trainer.accelerator=cpu", "progress=false"]


def test_a_link_out_of_the_current_folder_is_told(tmp_path, monkeypatch, capsys):
    """In a received folder, `outputs` may lead to where others read."""
    (tmp_path / "received").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "received" / "outputs").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "received")
    assert main(["train", *LINKED, "trainer.max_epochs=1"]) == 0
    out, err = capsys.readouterr()
    (key,) = (tmp_path / "elsewhere").rglob("key.gskey")
    assert "is a link out of the current folder" in err
    assert str(key.parent) in err
    assert str(key) in "".join(out.split())
    assert main(["train", *LINKED, "trainer.max_epochs=1", "hydra.run.dir=own"]) == 0
    out, err = capsys.readouterr()
    assert "is a link" not in err
    assert "own/key.gskey" in out
