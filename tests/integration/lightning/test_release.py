"""A stripped checkpoint says nothing of the mark, and Lightning still loads it."""

from __future__ import annotations

import json
import sys
import warnings
import zipfile
from collections import OrderedDict

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradsigns_lightning import GradSigns, WatermarkKey, strip, verify
from gradsigns_lightning.cli import main
from gradsigns_lightning.integration import release
from gradsigns_lightning.runs.checkpoint import describe


class Net(lightning.LightningModule):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.rand(48, 1, 8, 8, generator=generator), torch.arange(48) % 3), batch_size=12
    )


def trainer(folder, callbacks, **settings):
    silent = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
    }
    return lightning.Trainer(
        default_root_dir=folder, callbacks=callbacks, **{"max_epochs": 2, **silent, **settings}
    )


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    """A checkpoint of a fit with two callbacks that watch figures, one of them the mark's."""
    folder = tmp_path_factory.mktemp("release")
    key = WatermarkKey.generate("A", 8, input_shape=(1, 8, 8), target_class=1)
    watchers = [
        ModelCheckpoint(folder / "mark", monitor="wm/ber"),
        ModelCheckpoint(folder / "loss", monitor="val/loss"),
    ]
    fit = trainer(folder, [GradSigns(key, cadence=1, n_images=4), *watchers])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(Net(), loader(), loader())
    fit.model.hparams.update(
        describe(
            {},
            {"name": "x", "n_classes": 3, "input_shape": [1, 8, 8], "mean": [0.0], "std": [1.0]},
            key.commitment,
        )
    )
    fit.save_checkpoint(folder / "signed.ckpt")
    return folder, key


def words_of(file):
    """Return the bytes of everything in a checkpoint's file, and its entries' names."""
    with zipfile.ZipFile(file) as archive:
        return b"".join(name.encode() + archive.read(name) for name in archive.namelist())


def test_a_stripped_checkpoint_announces_nothing(signed, tmp_path):
    folder, key = signed
    tell_tale = [b"radsigns", b"adSigns", b"wm/", key.commitment.encode(), b"target_class"]
    before = words_of(folder / "signed.ckpt")
    assert all(word in before for word in (b"gradsigns", b"wm/", key.commitment.encode()))
    removed = strip(folder / "signed.ckpt", tmp_path / "release.ckpt")
    after = words_of(tmp_path / "release.ckpt")
    assert [word for word in tell_tale if word in after] == []
    assert removed[:2] == ("hyper_parameters.gradsigns", "gradsigns")
    assert f"callbacks.GradSigns[{key.commitment}]" in removed
    assert len(removed) == 4
    kept = torch.load(tmp_path / "release.ckpt", weights_only=True)
    assert [key for key in kept["callbacks"] if "val/loss" in key] == list(kept["callbacks"])
    assert kept["hyper_parameters"] == {"width": 12}


def test_lightning_loads_and_resumes_a_stripped_checkpoint(signed, tmp_path):
    folder, key = signed
    strip(folder / "signed.ckpt", tmp_path / "release.ckpt")
    original, copy = (
        Net.load_from_checkpoint(file) for file in (folder / "signed.ckpt", tmp_path / "release.ckpt")
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(original.state_dict().values(), copy.state_dict().values(), strict=True)
    )
    images = next(iter(loader()))[0]
    assert verify(copy, key, images).n_matches == verify(original, key, images).n_matches
    fit = trainer(tmp_path, [ModelCheckpoint(folder / "loss", monitor="val/loss")], max_epochs=3)
    fit.fit(Net(), loader(), loader(), ckpt_path=tmp_path / "release.ckpt")
    assert fit.current_epoch == 3


def test_a_copy_replaces_no_file_unless_told(signed, tmp_path):
    folder, _ = signed
    out = tmp_path / "release.ckpt"
    out.write_text("mine")
    with pytest.raises(ValueError, match="`out` must not name an existing file"):
        strip(folder / "signed.ckpt", out)
    assert out.read_text() == "mine"
    assert strip(folder / "signed.ckpt", out, overwrite=True)
    assert strip(out, tmp_path / "again.ckpt") == ()
    assert {path.name for path in tmp_path.iterdir()} == {"release.ckpt", "again.ckpt"}


def test_what_is_not_a_checkpoint_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "evil.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    for name, reason in [
        ("evil.ckpt", "add_safe_globals"),
        ("list.ckpt", "state_dict"),
        ("no.ckpt", "not there"),
        (".", "a folder"),
    ]:
        with pytest.raises(ValueError, match=f"`checkpoint`.*{reason}"):
            strip(tmp_path / name, tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize("content", [b"words", b"", b"\x80\x02}q\x00."], ids=["text", "empty", "pickle"])
def test_the_fault_of_a_file_that_is_not_a_checkpoint_is_named(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.ckpt").write_bytes(content)
    WatermarkKey.generate("A", 32, input_shape=(1, 8, 8), target_class=0).save("a.gskey")
    for words in (
        ["strip", "checkpoint=a.ckpt", "out=b.ckpt"],
        ["verify", "checkpoint=a.ckpt", "key=a.gskey", "images=."],
    ):
        assert main(words) == 1
        told = capsys.readouterr().err
        assert (
            "`checkpoint`: 'a.ckpt' is damaged, or not a checkpoint of weights and plain types: it was not "
            "written by torch.save" in told
        )
        assert "add_safe_globals" not in told


def test_the_command_strips(signed, tmp_path, monkeypatch, capsys):
    folder, key = signed
    monkeypatch.chdir(tmp_path)
    (tmp_path / "epoch=1-step=8.ckpt").write_bytes((folder / "signed.ckpt").read_bytes())
    words = ["strip", "checkpoint=epoch=1-step=8.ckpt", "out=release.ckpt"]
    assert main(words) == 0
    assert f"callbacks.GradSigns[{key.commitment}]" in capsys.readouterr().out
    assert main(words) == 1
    assert "`out` must not name an existing file" in capsys.readouterr().err
    assert main([*words, "overwrite=true"]) == 0
    assert main(["strip", "checkpoint=release.ckpt", "out=again.ckpt"]) == 0
    assert "Nothing in it announced a mark." in capsys.readouterr().out


def test_stripping_takes_no_more_than_the_file_holds(signed, tmp_path, monkeypatch):
    folder, _ = signed
    with (
        zipfile.ZipFile(folder / "signed.ckpt") as archive,
        zipfile.ZipFile(tmp_path / "p.ckpt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    torch.save({"state_dict": {}, "x": Made()}, tmp_path / "made.ckpt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch read the file"))
    for name, reason in [("p.ckpt", "not written by torch.save"), ("made.ckpt", "it names '.* bytearray'")]:
        with pytest.raises(ValueError, match=f"`checkpoint`.*{reason}"):
            strip(tmp_path / name, tmp_path / "out.ckpt")


class Made:
    """Pickles as a buffer of any size, which torch would make."""

    def __reduce__(self):
        return bytearray, (2**40,)


class Own:
    """A type that a user may trust."""


def test_types_that_the_user_trusts_are_kept(tmp_path):
    torch.save({"state_dict": {}, "own": Own(), "gradsigns": {}}, tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match=r"it names .*Own"):
        strip(tmp_path / "own.ckpt", tmp_path / "out.ckpt")
    with torch.serialization.safe_globals([Own]):
        assert strip(tmp_path / "own.ckpt", tmp_path / "out.ckpt") == ("gradsigns",)
        assert isinstance(torch.load(tmp_path / "out.ckpt", weights_only=True)["own"], Own)


def test_an_attribute_hides_no_method(tmp_path):
    content = OrderedDict(state_dict={}, gradsigns={})
    content.get = "no method"
    torch.save(content, tmp_path / "attribute.ckpt")
    assert strip(tmp_path / "attribute.ckpt", tmp_path / "out.ckpt") == ("gradsigns",)


def test_no_path_names_the_package(tmp_path):
    """W&B's default project is a folder of the checkpoints."""
    key = WatermarkKey.generate("A", 8, input_shape=(1, 8, 8), target_class=1)
    watchers = [
        ModelCheckpoint(tmp_path / "GradSigns" / "v1"),
        ModelCheckpoint(tmp_path / "m", monitor="Mark/ber"),
        ModelCheckpoint(tmp_path / "loss", monitor="val/loss"),
    ]
    fit = trainer(tmp_path, [GradSigns(key, name="Mark", cadence=1, n_images=4), *watchers], max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(Net(), loader(), loader())
    fit.save_checkpoint(tmp_path / "signed.ckpt")
    strip(tmp_path / "signed.ckpt", tmp_path / "release.ckpt")
    assert b"gradsigns" in words_of(tmp_path / "signed.ckpt").lower()
    after = words_of(tmp_path / "release.ckpt").lower()
    assert [word for word in (b"gradsigns", b"mark/", b"wm/") if word in after] == []
    assert len(torch.load(tmp_path / "release.ckpt", weights_only=True)["callbacks"]) == 1


class Steps:
    """Counts the calls that ``strip`` itself makes."""

    def __enter__(self):
        self.n = 0
        sys.setprofile(self.count)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def count(self, frame, event, _):
        self.n += event in ("call", "c_call") and frame.f_code.co_filename == release.__file__


TEXTS = [f"text {i}" for i in range(2000)]


@pytest.mark.parametrize(
    "content", [{"callbacks": dict.fromkeys(range(1000), TEXTS)}, {"callbacks": {0: [TEXTS] * 1000}}]
)
def test_what_is_shared_is_visited_once(tmp_path, content):
    torch.save({"state_dict": {}, "gradsigns": {}, **content}, tmp_path / "shared.ckpt")
    with Steps() as steps:
        assert strip(tmp_path / "shared.ckpt", tmp_path / "out.ckpt") == ("gradsigns",)
    assert steps.n < 20 * (len(TEXTS) + 1000)


def test_a_shared_value_that_names_the_mark_removes_every_state_that_holds_it(tmp_path):
    shared = [{"monitor": "wm/ber"}]
    content = {"a": shared, "b": ({"c": shared},), "d": [1], "e": shared}
    torch.save({"state_dict": {}, "gradsigns": {"wm": {}}, "callbacks": content}, tmp_path / "shared.ckpt")
    removed = strip(tmp_path / "shared.ckpt", tmp_path / "out.ckpt")
    assert removed == ("gradsigns", "callbacks.a", "callbacks.b", "callbacks.e")
    assert torch.load(tmp_path / "out.ckpt", weights_only=True)["callbacks"] == {"d": [1]}


def test_names_of_very_many_marks_are_not_searched_for(tmp_path):
    """Each of them would be looked for in every text."""
    for n in (64, 65):
        marks = {f"wm{i}": {} for i in range(n)}
        torch.save(
            {"state_dict": {}, "gradsigns": marks, "callbacks": {"x": "wm63/ber"}}, tmp_path / f"{n}.ckpt"
        )
    assert strip(tmp_path / "64.ckpt", tmp_path / "out.ckpt") == ("gradsigns", "callbacks.x")
    with pytest.raises(ValueError, match="`checkpoint` must have at most 64 marks in `gradsigns`, got 65"):
        strip(tmp_path / "65.ckpt", tmp_path / "more.ckpt")
    assert not (tmp_path / "more.ckpt").exists()


def test_the_command_shows_few_of_many_names_and_no_long_one(tmp_path, monkeypatch, capsys):
    """Every line of a table is as long as its longest."""
    monkeypatch.chdir(tmp_path)
    states = {f"GradSigns[{i}": 0 for i in range(300)} | {"GradSigns[" + "x" * 10**6: 0}
    torch.save({"state_dict": {}, "gradsigns": {}, "callbacks": dict(reversed(states.items()))}, "many.ckpt")
    assert main(["strip", "checkpoint=many.ckpt", "out=out.ckpt", "json=removed.json"]) == 0
    out = capsys.readouterr().out
    assert len(out) < 10**5
    assert "202 more of the same kind" in out
    assert len(json.loads((tmp_path / "removed.json").read_text())["removed"]) == 302


def text(word):
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


def write(file, *, callback, own=b"N"):
    """Write a checkpoint of pickled values: the state of a callback, and something before it."""
    entries = text("own") + own + text("state_dict") + b"}" + text("gradsigns") + b"}"
    pickled = b"\x80\x02}(" + entries + text("callbacks") + b"}(" + text("x") + callback + b"uu."
    writer = torch._C.PyTorchFileWriter(str(file))
    for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()


OWN = f"c{Own.__module__}\n{Own.__qualname__}\n".encode()  # what comes after it is read as torch reads it


def test_what_a_trusted_type_lets_through_may_hold_itself(tmp_path):
    write(tmp_path / "itself.ckpt", callback=b"]q\x05h\x05a", own=OWN)
    with torch.serialization.safe_globals([Own]):
        assert strip(tmp_path / "itself.ckpt", tmp_path / "out.ckpt") == ("gradsigns",)
        kept = torch.load(tmp_path / "out.ckpt", weights_only=True)["callbacks"]["x"]
    assert kept[0] is kept


def test_what_a_trusted_type_lets_through_may_be_nested_too_deep(tmp_path):
    write(tmp_path / "deep.ckpt", callback=b"]" * 10**5 + b"a" * (10**5 - 1), own=OWN)
    with (
        torch.serialization.safe_globals([Own]),
        pytest.raises(
            ValueError,
            match=r"`checkpoint`.*cannot be "
            r"written again",
        ),
    ):
        strip(tmp_path / "deep.ckpt", tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


def test_an_attribute_hides_no_method_of_a_callbacks_state(tmp_path):
    hides = (
        b"ccollections\nOrderedDict\n)R}("
        + b"".join(text(name) + b"N" for name in ("keys", "values", "items"))
        + b"ub"
    )
    write(tmp_path / "a.ckpt", callback=hides + text("monitor") + text("GradSigns/ber") + b"s")
    assert strip(tmp_path / "a.ckpt", tmp_path / "out.ckpt") == ("gradsigns", "callbacks.x")
    write(tmp_path / "kept.ckpt", callback=hides)
    with pytest.raises(ValueError, match=r"`checkpoint`.*cannot be written again"):
        strip(tmp_path / "kept.ckpt", tmp_path / "more.ckpt")
