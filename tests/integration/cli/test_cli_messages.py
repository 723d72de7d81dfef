"""Errors name what the user typed, say what a path is, and show an endpoint's answer without credentials."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.cli import main
from gradsigns_lightning.oracles.http import without_credentials
from gradsigns_lightning.runs.options import options, without_overrides


@pytest.fixture
def files(tmp_path):
    """A key, images, and a folder as transformers saves a model; in the current folder."""
    WatermarkKey.generate("A", 32, input_shape=(1, 8, 8), target_class=0).save("a.gskey")
    Path("images").mkdir()
    for number in range(4):
        Image.fromarray(torch.full((8, 8), number, dtype=torch.uint8).numpy()).save(f"images/{number}.png")
    Path("hf").mkdir()
    Path("hf/config.json").write_text("{}")
    Path("hf/model.safetensors").write_bytes(b"")


KEY = ["key=a.gskey"]
QUICK = ["data=digits", "model=mlp", "trainer.accelerator=cpu", "progress=false"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["keygen", "owner=A", "out=a.gskey"], "`out` must not name an existing file, got 'a.gskey'."),
        (["keygen", "owner=A", "out=."], "`out` must name a file, got '.', which is a folder."),
        (
            ["keygen", "owner=A", "out=b.gskey", "key.n_bits=0"],
            "`key.n_bits` must be an integer in [8, 8192], got 0.",
        ),
        (
            ["keygen", "owner=B", "out=b.gskey", "key=file", "key.path=a.gskey"],
            "`key` must be the size of a new key, such as b128, got",
        ),
        (["keygen", "owner=A", "out=b.gskey", "target_class=-1"], "`target_class` must be an integer"),
        (
            ["keygen", "master=.", "customer=1", "out=c.gskey"],
            "`master` must name a readable key file, got '.': it is a folder.",
        ),
        (
            ["verify", "checkpoint=.", *KEY],
            "`checkpoint` must name a checkpoint file, got '.', which is a folder.",
        ),
        (
            ["verify", "checkpoint=nowhere", *KEY],
            "`checkpoint` must name a checkpoint file, got 'nowhere', which is not there.",
        ),
        (
            ["verify", "checkpoint=hf/model.safetensors", *KEY],
            "`checkpoint`: 'hf/model.safetensors' holds weights alone",
        ),
        (
            ["verify", "checkpoint=hf", "key=."],
            "`key` must name a readable key file, got '.': it is a folder.",
        ),
        (
            ["verify", "checkpoint=hf", "key=nowhere.gskey"],
            "`key` must name a readable key file, got 'nowhere.gskey': No such",
        ),
        (["verify", "onnx=.", *KEY], "`onnx` must name an ONNX file, got '.', which is a folder."),
        (
            ["verify", "endpoint=host/x", *KEY],
            "`endpoint` must start with http:// or https://, got 'host/x'.",
        ),
        (
            ["verify", "endpoint=http://host/x", "images=a.gskey", *KEY],
            "`images` must name a folder, got 'a.gskey', which is a file.",
        ),
        (
            ["verify", "endpoint=http://host/x", "images=images", *KEY, "api.max_queries=0"],
            "`api.max_queries` must be",
        ),
        (
            ["verify", "endpoint=http://host/x", "images=images", *KEY, "http.retries=-1"],
            "`http.retries` must be",
        ),
        (
            ["trace", "onnx=nowhere", *KEY],
            "`onnx` must name an ONNX file, got 'nowhere', which is not there.",
        ),
        (["commit", "key=."], "`key` must name a readable key file, got '.': it is a folder."),
        (["commit", "key=null"], "`key` must name one key file (.gskey), got null."),
        (["commit", "key=[]"], "`key` must name a key file, or several as in key=[a.gskey,b.gskey], got []."),
        (["commit", "key=[a.gskey,null]"], "`key` must name one key file (.gskey), got null."),
        (["commit", "key=7"], "`key` must name a readable key file, got '7': No such file"),
        (
            ["verify", "key=[a.gskey,b.gskey]"],
            "`key` must name one key file (.gskey), got ['a.gskey', 'b.gskey'].",
        ),
        (["commit", *KEY, "api.max_queries=0"], "`api.max_queries` must be"),
        (
            ["judge", "bundle=a.gskey"],
            "`bundle` must be an evidence bundle; this file is damaged or something else.\n",
        ),
        (
            ["train", *QUICK, "key=b32", "model._target_=gradsigns_lightning.models.MPL"],
            "gradsigns: `_target_` must name a class or function, got 'gradsigns_lightning.models.MPL', "
            "which is not there. "
            "Did you mean gradsigns_lightning.models.MLP?\n",
        ),
        (["judge", "bundle=."], "`bundle` must name a readable file, got '.': it is a folder."),
        (
            ["train", *QUICK, "key=b32", "init=."],
            "`init` must name a checkpoint file, got '.', which is a folder.",
        ),
        (["train", *QUICK, "key=b32", "optimizer.lr=-1"], "`optimizer`: Invalid learning rate: -1"),
        (["train", *QUICK, "key=b32", "data.module.batch_size=0"], "`data.module.batch_size` must be"),
        (["train", *QUICK, "key=b32", "watermark.strength=-1"], "`watermark.strength` must be"),
        (["train", *QUICK, "key=b32", "watermark.cadence=0"], "`watermark.cadence` must be"),
        (["train", *QUICK, "key=b32", "model.hidden=[0]"], "`model.hidden` must be"),
        (
            ["train", *QUICK, "key=b32", "data.input_shape=[1,9,9]"],
            "`data.input_shape` must be [1, 8, 8], as the images are, got [1, 9, 9].\n",
        ),
        (
            ["train", *QUICK, "key=b32", "data.n_classes=5"],
            "`data.n_classes` must be at least 10, as the labels are, got 5.\n",
        ),
        (
            ["train", *QUICK, "key=b32", "model.input_shape=[1,9,9]"],
            "`model` failed on images of the batch: RuntimeError: ",
        ),
        (["train", *QUICK, "key=b32", "trainer.precision=3"], "`trainer`: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_message_speaks_of_the_option(words, message, files, capsys):
    assert main(words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("gradsigns: ")
    assert not re.search(r"`(path|url|n_bits|max_queries)`|overwrite=|Override|GradSigns\.", error)


def test_a_missing_owner_is_called_owner(capsys):
    assert main(["keygen", "out=a.gskey"]) == 2
    assert "`owner` must be given, as in `owner=NAME`: who owns the key." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["verify", "model.ckpt"],
            "settings are written as name=value, got 'model.ckpt'. `gradsigns verify --help` lists them.",
        ),
        (
            ["verify", "protocol=json", "protocol.request={images: }"],
            "`protocol.request` cannot be read, got '{images: }'.",
        ),
        (["train", "seed=a"], "`seed` must be an integer, got 'a'."),
        (["train", "label_smoothing=a"], "`label_smoothing` must be a number, got 'a'."),
        (["train", "twin=perhaps"], "`twin` must be true or false, got 'perhaps'."),
        (
            ["verify", "key=a.gskey", "api.max_queries=many"],
            "`api.max_queries` must be an integer, got 'many'.",
        ),
        (["train", "model.hidden=[1"], "`model.hidden` cannot be read, got '[1'."),
        (["verify", "--key", "a.gskey"], "settings are written without dashes: `key=a.gskey`, got '--key'."),
        (
            ["verify", "--key=a.gskey"],
            "settings are written without dashes: `key=a.gskey`, got '--key=a.gskey'.",
        ),
        (["train", "key=null"], "`key` must be one of b128, b256, b32, b64, file, new, got null."),
        (["train", "model=3"], "`model` must be one of "),
        (["train", "model=[mlp,vit]"], "`model` must be one of "),
        (
            ["train", "experiment=sign_trained"],
            "`init` must be given, as in `init=FILE`: checkpoint to start from.",
        ),
        (
            ["train", "data=image_folder"],
            "must be given, as in `data.n_classes=NUMBER data.module.root=FOLDER`.",
        ),
        (
            ["train", "data=ytf"],
            "`data.n_classes` must be given, as in `data.n_classes=NUMBER`: the data set's number of "
            "classes.",
        ),
        (
            ["verify", "key=a.gskey", "protocol=json"],
            "`protocol.request` must be given, as in `protocol.request='{inputs: $images}'`: ",
        ),
        (["judge"], "`bundle` must be given, as in `bundle=FILE`: the claimant's evidence."),
        (["strip"], "`checkpoint` and `out` must be given, as in `checkpoint=FILE out=FILE`."),
        (
            ["train", "--max-epochs", "3"],
            "settings are written without dashes: `trainer.max_epochs=3`, got '--max-epochs'.",
        ),
        (
            ["train", "--trainer.precision", "-m"],
            "settings are written without dashes: `trainer.precision=...`, got",
        ),
        (
            ["train", "--experiment", "seed=1"],
            "settings are written without dashes: `experiment=...`, got '--experiment'.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_of_another_kind_of_command_line(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_hydras_own_options_are_no_settings(capsys):
    assert main(["keygen", "owner=A", "out=a.gskey", "--cfg", "job"]) == 0
    assert "owner: A" in capsys.readouterr().out


def test_what_a_training_lacks_is_told_before_it_is_said_to_begin(capsys):
    assert main(["train", "data=digits", "init=nowhere.ckpt"]) == 1
    shown = capsys.readouterr()
    assert "`init` must name a checkpoint file" in shown.err
    assert "training" not in shown.out


def test_a_hugging_face_folder_is_refused_with_what_to_do(files, capsys):
    assert main(["verify", "checkpoint=hf", *KEY]) == 1
    error = capsys.readouterr().err
    assert (
        "`checkpoint` must name a checkpoint file, got 'hf', which is a folder. It looks like a Hugging Face "
        "model" in error
    )
    assert "from_pretrained('hf'); gradsigns_lightning.verify(model, key, images)" in error


@pytest.mark.parametrize(
    "words",
    [
        ["data=mnist", "paths.data=nowhere"],
        ["trainer.precision=3"],
        ["watermark.n_images=0"],
        ["data.module.val_fraction=2"],
        ["watermark.engine=finite_difference"],
    ],
)
def test_a_run_that_fails_before_training_leaves_no_key(words, capsys):
    assert main(["train", *QUICK, "key=b32", "hydra.run.dir=run", *words]) == 1
    assert list(Path.cwd().rglob("*.gskey")) == []


def test_a_run_of_no_epochs_keeps_its_key(capsys):
    assert (
        main(
            ["train", *QUICK, "key=b32", "hydra.run.dir=run", "trainer.max_epochs=0", "lr_schedule=constant"]
        )
        == 0
    )
    assert Path("run/key.gskey").is_file()
    assert main(["train", *QUICK, "key=b32", "hydra.run.dir=run", "trainer.max_epochs=0"]) == 1
    assert "`hydra.run.dir` must name a folder without a key" in capsys.readouterr().err


@pytest.fixture
def server():
    """Answers as ``reply`` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = self.server.reply
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        ((403, b"no\x1b[2K key"), "refused the request with status 403. It answered: 'no\\x1b[2K key'."),
        (
            (500, b"x" * 1000),
            "failed 1 times, at last with status 500. It answered: '" + "x" * 200 + "... (800 characters)'.",
        ),
        ((200, b"<html>"), "It answered: '<html>'."),
        ((404, b""), "refused the request with status 404.\n"),
    ],
)
def test_an_endpoints_errors_say_where_and_what(reply, shown, files, server, capsys):
    server.reply = reply
    address = f"127.0.0.1:{server.server_port}/predict"
    words = [
        f"endpoint=http://me:s3cr3t@{address}?token=t0ken",
        "protocol=json",
        "protocol.request={x: $images}",
        "http.retries=0",
    ]
    assert main(["verify", *words, "images=images", *KEY]) == 1
    error = capsys.readouterr().err
    assert f"`endpoint` http://{address}: " in error
    assert shown in error
    assert "s3cr3t" not in error
    assert "t0ken" not in error


def test_an_address_is_shown_without_credentials():
    assert without_credentials("https://user:pw@host:8/a/b?key=1#x") == "https://host:8/a/b"
    assert without_credentials("http://[bad") == "(no valid address)"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "`batch` must be two tensors. Override `GradSigns.images_and_labels` in a subclass:\n    def "
            "f(): ...",
            "`batch` must be two tensors.",
        ),
        (
            "Give (1, 8). Make a key with `input_shape=(1, 8)`, or override `GradSigns.logits` if so.",
            "Give (1, 8). Make a key with `input_shape=(1, 8)`.",
        ),
        ("Are they one-hot? Override `GradSigns.images_and_labels` ...", "Are they one-hot?"),
        (
            "No reading: it failed. Override `GradSigns.logits` so:\n x (Override "
            "`GradSigns.images_and_labels` or "
            "`GradSigns.logits`, or set `n_val_images=0`.)",
            "No reading: it failed. Set `n_val_images=0`.",
        ),
        (
            "train until it knows the class; if it does, `GradSigns.logits` must return the logits. More.",
            "train until it knows the class. More.",
        ),
        ("Override this.", "Override this."),
    ],
)
def test_a_command_line_has_nothing_to_override(said, shown):
    assert without_overrides(said) == shown


def test_options_leave_other_errors_alone():
    with pytest.raises(UnicodeDecodeError), options({"path": "key"}):
        b"\xff".decode()
    with pytest.raises(TypeError, match="`key` of `other`"), options({"path": "key"}):
        raise TypeError("`path` of `other`")
    with (
        pytest.raises(ValueError, match=r"^`data.module.download=true` or `x=A`$"),
        options({"download": "data.module.download"}),
    ):
        raise ValueError("`download=True` or `x=A`")
