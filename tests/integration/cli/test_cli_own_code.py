"""The user's own network, data module and callbacks in `gradsigns train`; other commands run no such code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gradsigns_lightning import WatermarkKey, verify
from gradsigns_lightning.cli import main
from gradsigns_lightning.data import Digits
from gradsigns_lightning.models import Classifier
from gradsigns_lightning.runs.own import modules_of, without_inherited

MODULE = """
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn

from gradsigns_lightning.data import Digits


class Net(nn.Sequential):
    def __init__(self, n_classes, width=64):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, n_classes))


class Module(LightningModule):
    pass


class Data(LightningDataModule):
    def __init__(self, batch_size=64, scale=1.0):
        super().__init__()
        self.batch_size, self.scale = batch_size, scale

    def setup(self, stage):
        self.digits = Digits(mean=[0.305], std=[0.376 * self.scale], batch_size=self.batch_size)
        self.digits.setup(stage)

    def train_dataloader(self):
        return self.digits.train_dataloader()

    def val_dataloader(self):
        return self.digits.val_dataloader()

    def test_dataloader(self):
        return self.digits.test_dataloader()


class Untested(LightningDataModule):
    def train_dataloader(self):
        return []


class Note(Callback):
    def __init__(self, file):
        self.file = file

    def on_fit_end(self, trainer, pl_module):
        with open(self.file, "a") as out:
            out.write(type(pl_module.net).__name__)
"""
QUICK = [
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "progress=false",
    "hydra.run.dir=run",
    "json=a.json",
]
DATA = [
    "data.module._target_=mine_18.Data",
    "data.input_shape=[1,8,8]",
    "data.mean=[0.305]",
    "data.std=[0.376]",
    "data.n_classes=10",
]


@pytest.fixture(autouse=True)
def project(tmp_path):
    """The user's folder, which is the current one."""
    Path("mine_18.py").write_text(MODULE)
    yield
    sys.modules.pop("mine_18", None)


def test_everything_may_be_the_users_own(capsys):
    note = ["+callbacks.note._target_=mine_18.Note", "+callbacks.note.file=note.txt"]
    before = list(sys.path)
    words = [
        "model._target_=mine_18.Net",
        "+model.width=32",
        "data=own",
        *DATA,
        "+data.module.batch_size=32",
        *note,
    ]
    assert main(["train", "code=.", *QUICK, *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert sys.path == before
    assert Path("note.txt").read_text() == "Net"
    content = json.loads(Path("a.json").read_text())
    assert content["config"]["model"] == {"_target_": "mine_18.Net", "n_classes": 10, "width": 32}
    assert content["data"] == "mine_18.Data"
    # The call that `train` prints reads the same mark that `train` read.
    assert "mine_18.Net is not a network of this package or torchvision" in out
    assert "Classifier.load_from_checkpoint('run/model.ckpt', net=..., n_classes=10)" in out
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model = Classifier.load_from_checkpoint("run/model.ckpt", net=net, n_classes=10)
    key = WatermarkKey.load("run/key.gskey")
    result = verify(model, key, Digits().raw_images("test", 0))
    assert (result.n_matches, result.n_queries) == (content["n_matches"], content["n_queries"])
    assert main(["verify", "checkpoint=run/model.ckpt", "key=run/key.gskey", "data=digits"]) == 1
    assert (
        "describes a model 'mine_18.Net', which is not a network of this package" in capsys.readouterr().err
    )


def test_a_shipped_network_on_data_of_ones_own_is_not_said_to_be_of_the_shipped_data(capsys):
    """`verify` would read other images than the model was trained on."""
    assert main(["train", "code=.", "data=digits", DATA[0], *QUICK, "callbacks=model_checkpoint"]) == 0
    assert "is not a network of this package" not in capsys.readouterr().out
    for file in ("model.ckpt", "checkpoints/last.ckpt"):
        assert main(["verify", f"checkpoint=run/{file}", "key=run/key.gskey"]) == 1
        assert "names the data 'mine_18.Data'" in capsys.readouterr().err
        assert main(["verify", f"checkpoint=run/{file}", "key=run/key.gskey", "data=digits"]) in (0, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model._target_=mine_18.Net"],
            "No module named 'mine_18'. code=FOLDER names the folder of your own modules, code=. the",
        ),
        (["code=.", "model._target_=mine_18.Met"], "Did you mean mine_18.Net?"),
        (
            ["code=.", "model._target_=mine_18.Net", "+model.widht=3"],
            "unexpected keyword argument 'widht' (mine_18.Net)",
        ),
        (["code=.", "model._target_=mine_18.Data"], "`model` must be a Module, got Data of mine_18.Data."),
        (
            ["code=.", "model._target_=mine_18.Module"],
            "a LightningModule, which says itself how it is trained",
        ),
        (
            ["code=.", "data.module._target_=mine_18.Net", "+data.module.n_classes=3"],
            "`data.module` must be a LightningDataModule, got Net of mine_18.Net.",
        ),
        (
            ["code=.", "data.module._target_=mine_18.Untested"],
            "`data.module` must have test_dataloader, got mine_18.Untested",
        ),
        (
            ["code=.", "+callbacks.a._target_=mine_18.Data"],
            "`callbacks.a` must be a Callback, got Data of mine_18.Data.",
        ),
        (
            ["code=.", DATA[0], "+data.module.scale=0.1"],
            "`data.mean` and `data.std` must say how `data.module` normalizes",
        ),
        (["code=nowhere"], "`code` must name a folder, got 'nowhere', which is not there."),
        (
            ["model._target_=os.getcwd"],
            "code of your own that is not of Python's standard library, got 'os.getcwd'.",
        ),
        (["model._target_=torch.os.system"], "got 'torch.os.system'."),
        (
            ["code=.", "+callbacks.a._target_=mine_18.nn.modules.module.functools.partial"],
            "`_target_` must be one of",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_with_ones_own_code_is_said_in_a_line(words, message, capsys):
    assert main(["train", "data=digits", *QUICK, *words]) == 1
    err = capsys.readouterr().err.replace("\n  ", " ")
    assert message in err
    assert "Traceback" not in err


def test_a_second_mark_is_not_the_twins():
    WatermarkKey.generate(
        "B", 32, input_shape=(1, 8, 8), target_class=1, input_mean=0.305, input_std=0.376
    ).save("b.gskey")
    second = ["_target_=gradsigns_lightning.GradSigns", "key=b.gskey", "name=second"]
    words = [f"+callbacks.second.{word}" for word in second]
    assert main(["train", "data=digits", *QUICK, *words, "twin=true"]) == 0
    logged = {name: Path("run", name, "metrics.csv").read_text() for name in ("logs", "twin")}
    assert "second/ber" in logged["logs"]
    assert "val/acc" in logged["twin"]
    assert "second/ber" not in logged["twin"]


@pytest.mark.parametrize("command", ["verify", "trace", "judge"])
def test_what_reads_a_suspect_takes_no_code_at_all(command, capsys, monkeypatch):
    """Not even the user's own that Python finds: what is on its path may be a received folder's."""
    monkeypatch.syspath_prepend(str(Path.cwd()))
    WatermarkKey.generate("A", 32, input_shape=(1, 8, 8), target_class=0).save("a.gskey")
    words = ["key=a.gskey"] if command != "judge" else ["bundle=a.gskey"]
    assert main([command, *words, "code=."]) == 2
    if command == "verify":
        words += ["endpoint=http://127.0.0.1:9"]
        assert main([command, *words, "data=digits", "data.module._target_=mine_18.Data"]) == 1
        assert main([command, *words, "images=.", "protocol._target_=mine_18.Net"]) == 1
        assert (
            capsys.readouterr().err.count(
                "_target_` must be one of gradsigns_lightning.*, torchvision.*, lightning.*, torch.*, got"
            )
            == 2
        )
    assert "mine_18" not in sys.modules


def test_modules_that_are_installed_come_before_those_of_a_folder():
    Path("torch.py").write_text("raise SystemExit")
    with modules_of("."):
        assert sys.path[-1] == str(Path.cwd())
    with modules_of(None):
        assert str(Path.cwd()) not in sys.path
    assert torch.ones(1) == 1


def test_a_folder_that_python_knows_stays_where_it_is(monkeypatch):
    monkeypatch.syspath_prepend(str(Path.cwd()))
    before = list(sys.path)
    with modules_of("."):
        assert sys.path == before
    assert sys.path == before


def test_what_the_user_wrote_is_never_left_out(monkeypatch):
    monkeypatch.syspath_prepend(str(Path.cwd()))
    shipped = {
        "_target_": "gradsigns_lightning.models.MLP",
        "n_classes": "${data.n_classes}",
        "hidden": [256, 128],
    }
    part = {**shipped, "_target_": "mine_18.Net", "depth": 3}
    assert without_inherited(part, shipped) == {
        "_target_": "mine_18.Net",
        "n_classes": "${data.n_classes}",
        "depth": 3,
    }
    assert without_inherited({**part, "hidden": [3]}, shipped)["hidden"] == [3]
    assert without_inherited(shipped, shipped) == shipped
    assert without_inherited(part, {}) == part
