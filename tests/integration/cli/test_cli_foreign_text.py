"""Foreign names and messages reach terminals, reports and files only escaped, and never prevent a verdict."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
import unicodedata
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.cli import main
from gradsigns_lightning.cli.callbacks import EpochLines
from gradsigns_lightning.cli.tables import print_rows, write_json

# A cleared screen, a title, a forged line, a turned direction, C1 and surrogates, markup of rich, an emoji's
# name.
NASTY = (
    "\x1b[2J\x1b]0;x\x07\ngradsigns: verdict\rowned \u202egpj.\x85\x9b1m\x7f\u2028\ud800 "
    "[red]x[/red] [/b] :smile: Zürich 株"
)
FILE_NAME = "\x1b[2J\ngradsigns: \r\u202e\x85\udc9b [red]x[bold] ü"
# torch reads no file whose name is not UTF-8.
CHECKPOINT = FILE_NAME.replace("\udc9b", "") + ".ckpt"
# Every character that cannot be shown, except the line break, which is our own layout's.
RAW = re.compile(
    "[^\n"
    + "".join(f"{chr(a)}-{chr(b)}" for a, b in ((0x20, 0x7E), (0xA0, 0xD7FF), (0xE000, 0x10FFFF)))
    + "]"
)
TURNING = re.compile("[\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
TRAIN = [
    "train",
    "data=digits",
    "model=mlp",
    "trainer.max_epochs=5",
    "data.module.batch_size=32",
    "trainer.accelerator=cpu",
]


def quoted(text):
    """A value on Hydra's command line."""
    return "'" + text.replace("'", "\\'") + "'"


def assert_clean(text):
    assert not RAW.search(text), ascii(text)
    assert not TURNING.search(text), ascii(text)
    assert not re.search(r"^\s?(gradsigns: verdict|owned)", text, re.M), ascii(text)


@pytest.fixture
def shown(capfd):
    """What the commands since the last call wrote to standard output and standard error (descriptors)."""

    def read():
        out, err = capfd.readouterr()
        assert_clean(out)
        assert_clean(err)
        return out + err

    return read


@contextmanager
def server(reply, status=200):
    """A service that answers everything with ``reply``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = json.dumps(reply).encode()
            self.send_response(status, "\x1b[2J")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{service.server_port}/v2/models/m"
    finally:
        service.shutdown()
        service.server_close()


@pytest.fixture(scope="module")
def claim(tmp_path_factory):
    """A folder with a nasty owner's key, the model signed with it and the evidence, all with nasty names."""
    folder = tmp_path_factory.mktemp("claim") / FILE_NAME
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    key, commitment, bundle = (quoted(FILE_NAME + end) for end in (".gskey", ".commitment.json", ".gsbundle"))
    try:
        owner = [f"owner={quoted(NASTY)}", f"scope={quoted(NASTY)}"]
        assert (
            main(
                [
                    "keygen",
                    "data=digits",
                    "key=b32",
                    "target_class=3",
                    *owner,
                    f"out={key}",
                    "json=keygen.json",
                ]
            )
            == 0
        )
        train = [
            *TRAIN,
            f"key.path={key}",
            f"+key.owner={quoted(NASTY)}",
            "hydra.run.dir=run",
            "json=train.json",
        ]
        assert main(train) == 0
        Path("run/model.ckpt").rename(CHECKPOINT)
        assert main(["commit", f"key={key}", f"out={commitment}", "json=commit.json"]) == 0
        words = [
            f"checkpoint={quoted(CHECKPOINT)}",
            f"bundle={bundle}",
            f"commitment={commitment}",
            "alpha=1e-4",
        ]
        assert main(["verify", f"key={key}", *words, "json=verify.json"]) == 0
    finally:
        os.chdir(before)
    return folder


def judge(*words):
    code = main(
        [
            *["judge", f"bundle={quoted(FILE_NAME + '.gsbundle')}", f"checkpoint={quoted(CHECKPOINT)}"],
            *[
                "data=digits",
                "grinding_bits=0",
                "alpha=1e-4",
                f"controls=[{quoted(CHECKPOINT)}]",
                "json=judge.json",
                *words,
            ],
        ]
    )
    return code, json.loads(Path("judge.json").read_text())


def test_a_judge_gets_the_verdict_and_the_names_escaped(claim, monkeypatch, shown):
    monkeypatch.chdir(claim)
    _, judged = judge()
    text = shown()
    assert judged["owner"] == NASTY
    assert judged["reading"]["verdict"] == "owned"
    assert any("control model" in objection for objection in judged["objections"])
    assert (
        r"\x1b[2J\x1b]0;x\x07\ngradsigns: verdict\rowned \u202egpj.\x85\x9b1m\x7f\u2028\ud800 [red]x[/red] "
        r"[/b]" in text
    )
    assert ":smile: Zürich 株" in text
    assert r"control \x1b[2J\ngradsigns: \r\u202e\x85 [red]x[bold] ü.ckpt" in text


def test_no_file_holds_a_raw_character(claim):
    texts = [path for path in claim.rglob("*") if path.suffix in (".json", ".gsbundle", ".yaml")]
    assert {path.suffix for path in texts} == {".json", ".gsbundle", ".yaml"}
    for path in texts:
        # of Hydra and of the logger, of the user's own words: marks of direction stay
        if path.suffix == ".yaml":
            assert not RAW.search(path.read_text("utf-8"))
        else:
            assert_clean(path.read_bytes().decode("ascii"))
    key = WatermarkKey.load(claim / f"{FILE_NAME}.gskey")
    assert (key.owner, key.scope) == (NASTY, NASTY)
    assert_clean(repr(key))


@pytest.mark.parametrize("command", ["verify", "keygen", "commit"])
def test_every_command_escapes_what_it_is_given(claim, monkeypatch, shown, command):
    monkeypatch.chdir(claim)
    key, ckpt = f"key={quoted(FILE_NAME + '.gskey')}", f"checkpoint={quoted(CHECKPOINT)}"
    new = f"{FILE_NAME}2"
    words = {
        "verify": [key, ckpt, f"json={quoted(new + '.json')}"],
        "keygen": [f"owner={quoted(NASTY)}", f"out={quoted(new + '.gskey')}"],
        "commit": [key, f"out={quoted(new + '.commitment.json')}"],
    }
    main([command, *words[command]])
    assert FILE_NAME.encode("unicode_escape").decode().replace("\\xfc", "ü") in shown()


def test_a_sweep_escapes_what_it_is_given(claim, monkeypatch, shown):
    """A name with an equals sign needs no quotation marks; Hydra accepts control characters only in these."""
    monkeypatch.chdir(claim)
    names = ["a=" + "".join(sorted(set(CHECKPOINT) - set("\"'\n"))), "b"]
    assert main(["verify", "-m", f"key={quoted(FILE_NAME + '.gskey')}", f"checkpoint={','.join(names)}"]) == 1
    text = shown()
    assert "#0 checkpoint='a=" in text
    assert "\\x1b" in text


@pytest.mark.parametrize(
    "words",
    [
        ["judge", "bundle={name}"],
        ["verify", "key={name}", "checkpoint=x"],
        ["verify", "key={key}", "checkpoint={name}"],
        ["verify", "key={key}", "onnx={name}"],
        ["verify", "key={key}", "endpoint={name}"],
        ["verify", "key={key}", "checkpoint={key}"],
        ["verify", "key={key}", "onnx={key}"],
        ["verify", "key={key}", "checkpoint={ckpt}", "images={name}"],
        ["verify", "key={key}", "checkpoint={ckpt}", "json={name}/x"],
        ["verify", "key={key}", "checkpoint={ckpt}", "data={name}"],
        ["verify", "key={key}", "checkpoint={ckpt}", "{name}=1"],
        ["verify", "key={ckpt}", "checkpoint={ckpt}"],
        ["commit", "key={key}", "attach={name}", "authority={name}"],
        ["judge", "bundle={key}"],
        ["judge", "bundle={bundle}", "authority={name}"],
        ["judge", "bundle={bundle}", "suspect_since={name}"],
        ["import-2021", "folder={name}", "images={name}"],
        ["keygen", "owner={name}", "out={name}/x"],
        ["keygen", "owner=A", "out={key}"],
        ["keygen", "owner=A", "out=x", "key={name}"],
        ["{name}"],
    ],
)
def test_every_message_is_escaped(claim, monkeypatch, shown, words):
    monkeypatch.chdir(claim)
    ends = {"name": "no such", "key": ".gskey", "bundle": ".gsbundle"}
    names = {"ckpt": quoted(CHECKPOINT), **{name: quoted(FILE_NAME + end) for name, end in ends.items()}}
    assert main([word.format(**names) for word in words]) in (1, 2)
    text = shown()
    assert text.startswith("gradsigns: ")
    assert text.strip() != "gradsigns:"


@pytest.mark.parametrize(
    "reply",
    [
        {"inputs": [{"name": "x", "datatype": NASTY}]},
        {"inputs": [{"name": NASTY, "datatype": "FP32"}], "outputs": NASTY},
        {"inputs": NASTY},
        NASTY,
    ],
    ids=["datatype", "outputs", "inputs", "text"],
)
@pytest.mark.parametrize("status", [200, 404])
def test_a_servers_text_is_escaped(claim, monkeypatch, shown, reply, status):
    monkeypatch.chdir(claim)
    with server(reply, status) as url:
        words = [
            "verify",
            f"key={quoted(FILE_NAME + '.gskey')}",
            f"endpoint={url}",
            "data=digits",
            "http.retries=0",
        ]
        assert main(words) == 1
    assert shown().startswith("gradsigns: `endpoint` http://127.0.0.1:")


def test_a_servers_class_names_are_escaped(claim, monkeypatch, shown):
    monkeypatch.chdir(claim)
    template = [
        "protocol=json",
        "protocol.request={data: $images}",
        "protocol.answer=/p",
        "protocol.classes=[a, b]",
    ]
    with server({"p": [{NASTY: 1.0}]}) as url:
        words = [
            f"key={quoted(FILE_NAME + '.gskey')}",
            f"endpoint={url}",
            "data=digits",
            "api.batch_size=1",
            *template,
        ]
        assert main(["verify", *words]) == 1
    assert "which is not one of the 2 `classes`" in shown()


def test_the_names_in_an_onnx_file_are_escaped(claim, monkeypatch, shown):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(claim)
    name = "\x1b[2J\ngradsigns: verdict"
    for n_inputs, form in ((1, ["n", 1, 8, 8]), (2, ["n", 1, 8, 8]), (1, ["n", 1, 9, 9])):
        inputs = [
            onnx.helper.make_tensor_value_info(name * n, onnx.TensorProto.FLOAT, form)
            for n in range(1, n_inputs + 1)
        ]
        # The wrong shape and the double name make the runtime itself complain.
        output = onnx.helper.make_tensor_value_info(name + "y", onnx.TensorProto.FLOAT, [3])
        nodes = [onnx.helper.make_node("Flatten", [name], [name + "y"], name=name) for _ in range(n_inputs)]
        graph = onnx.helper.make_graph(nodes, name, inputs, [output])
        opset = [onnx.helper.make_opsetid("", 17)]
        Path("names.onnx").write_bytes(
            onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
        )
        main(
            [
                "verify",
                f"key={quoted(FILE_NAME + '.gskey')}",
                "onnx=names.onnx",
                "data=digits",
                "api.max_queries=20",
            ]
        )
        shown()


def test_a_key_of_version_1_with_such_an_owner_stays_readable(tmp_path, monkeypatch, shown):
    monkeypatch.chdir(tmp_path)
    key = WatermarkKey.generate("A", 32, input_shape=(1, 8, 8), target_class=0)
    public = {
        name: value for name, value in key.to_public_dict().items() if name not in ("version", "purpose")
    }
    old = WatermarkKey.from_parts({**public, "owner": NASTY, "scope": NASTY}, payload=b"", secret=bytes(32))
    old.save("old.gskey")
    assert WatermarkKey.load("old.gskey").owner == NASTY
    assert main(["commit", "key=old.gskey", "out=old.commitment.json"]) == 0
    shown()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_narrow_encoding_keeps_nobody_from_a_verdict(claim, monkeypatch, encoding):
    monkeypatch.chdir(claim)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    _, judged = judge()
    assert judged["reading"]["verdict"] == "owned"
    assert main(["judge", f"bundle={quoted('nö株' + FILE_NAME)}"]) == 1
    for stream in streams:
        stream.flush()
        assert stream.errors == "strict"
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert_clean(out)
    assert_clean(err)
    assert "Zürich 株" in unescaped(out)
    assert "nö株" in unescaped(err)


def unescaped(text):
    return re.sub(
        r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4}))",
        lambda found: chr(int(found.group(1) or found.group(2), 16)),
        text,
    )


def test_an_owner_called_owned_is_not_printed_like_a_verdict(monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(
        "gradsigns_lightning.cli.tables.Console",
        lambda **_: Console(file=printed, force_terminal=True, color_system="standard"),
    )
    print_rows(
        {"verdict": "not proven", "owner": "owned", "control [/b] \x1b[2J": ":smile:"},
        title="[/b]",
        note="[/b]\n[red]",
    )
    green, yellow = "\x1b[1;32m", "\x1b[1;33m"
    assert f"{yellow}not proven" in printed.getvalue()
    assert green not in printed.getvalue()
    assert r"control [/b] \x1b[2J" in printed.getvalue()
    assert "[/b]\n  [red]" in printed.getvalue()


def test_two_names_that_are_shown_alike_have_two_rows(capsys):
    print_rows({"\x1b": "first", r"\x1b": "second"}, title="t")
    out = capsys.readouterr().out
    assert "first" in out
    assert "second" in out


def test_nothing_is_folded_where_there_is_no_terminal(capsys):
    print_rows({"control " + "n" * 120: "株" * 200}, title="t")
    assert f"│ control {'n' * 120} │ {'株' * 200} │" in capsys.readouterr().out


def test_a_json_file_keeps_every_character(tmp_path):
    write_json(str(tmp_path / "x.json"), {NASTY: [NASTY, "\udc9b"]})
    written = (tmp_path / "x.json").read_bytes()
    assert_clean(written.decode("ascii"))
    assert json.loads(written) == {NASTY: [NASTY, "\udc9b"]}


def test_an_epochs_line_is_escaped(capsys):
    class Trainer:
        is_global_zero, current_epoch, max_epochs = True, 0, 1
        callback_metrics = {}  # noqa: RUF012

    EpochLines("[/b] \x1b[2J").on_train_epoch_end(Trainer(), None)
    assert capsys.readouterr().out.strip() == r"[/b] \x1b[2J: epoch 1/1"


def test_the_nasty_name_is_a_valid_owner():
    assert unicodedata.normalize("NFC", NASTY) == NASTY
