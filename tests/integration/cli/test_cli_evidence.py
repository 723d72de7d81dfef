"""`gradsigns commit`, `judge`, `trace`, `import-2021`, and `verify` of files and endpoints."""

import json
import re
import stat
import threading
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from gradsigns_lightning.cli import main
from gradsigns_lightning.data import Digits
from gradsigns_lightning.runs.checkpoint import description_of, load_classifier, read_checkpoint

pytest.importorskip("onnx")
pytest.importorskip("rfc3161_client")
DIGITS = Digits()


def result(*words):
    """Run a command that must succeed and return what it wrote as JSON."""
    assert main([*map(str, words), "json=result.json"]) in (0, 3)  # 3: not proven
    return json.loads(Path("result.json").read_text())


def rows_of(printed):
    """Return the rows of a table by their names."""
    lines = [line.split("\u2502") for line in printed.splitlines() if line.startswith("\u2502")]
    return {name.strip(): value.strip() for _, name, value, _ in lines}


def network_of(checkpoint):
    content = read_checkpoint(str(checkpoint))
    return load_classifier(content, description_of(content, str(checkpoint)))


def to_onnx(checkpoint, path):
    """Export normalized digits to probabilities."""
    network = nn.Sequential(network_of(checkpoint), nn.Softmax(1)).eval()
    names = {"input_names": ["x"], "output_names": ["p"], "dynamic_axes": {"x": {0: "n"}, "p": {0: "n"}}}
    torch.onnx.export(network, (torch.zeros(2, 1, 8, 8),), str(path), dynamo=False, **names)
    return path


@contextmanager
def endpoint(checkpoint):
    """A service of the model that requires a token."""
    network, seen = network_of(checkpoint), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(self.headers.get("Authorization"))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            images = torch.tensor(body["data"])
            with torch.inference_mode():
                probabilities = network((images - DIGITS.mean[0]) / DIGITS.std[0]).softmax(1)
            content = json.dumps({"result": {"p": probabilities.tolist()}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/classify", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def files(signed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    return {
        name: to_onnx(signed.folder / f"{name}.ckpt", folder / f"{name}.onnx") for name in ("model", "twin")
    }


API = ["data=digits", "normalized=true", "alpha=1e-4", "api.max_queries=600"]


def test_an_onnx_file_is_verified(signed, files, capsys):
    own, twin = (
        result("verify", f"onnx={files[name]}", f"key={signed.key}", *API) for name in ("model", "twin")
    )
    assert (own["verdict"], own["answers"], own["onnx"]) == ("owned", "probabilities", str(files["model"]))
    assert twin["verdict"] == "not_proven"
    assert max(own["n_queries"], twin["n_queries"]) <= 600
    printed = capsys.readouterr().out
    for found in (own, twin):
        assert re.search(
            rf"queries +│ {found['n_queries']}, probes around {found['n_images']} images?, "
            rf"answers read as",
            printed,
        )
    assert "images read" not in printed


def test_an_endpoint_is_verified(signed, monkeypatch, capsys):
    monkeypatch.setenv("TOKEN", "123")
    template = ["protocol=json", "protocol.request={data: $images}", "protocol.answer=/result/p"]
    with endpoint(signed.folder / "model.ckpt") as (url, seen):
        # The service normalizes by itself; the token comes from the environment.
        words = [f"endpoint={url}?token=t0ken", f"key={signed.key}", *API, "normalized=false", *template]
        found = result("verify", *words, "http.headers={Authorization: Bearer ${oc.env:TOKEN}}")
    assert (found["verdict"], found["endpoint"]) == ("owned", url)
    assert set(seen) == {"Bearer 123"}
    assert "t0ken" not in capsys.readouterr().out + json.dumps(found)


def test_from_commitment_to_judgement(signed, files, authority, capsys):
    committed = result("commit", f"key={signed.key}", "out=acme.commitment.json")
    assert json.loads(Path("acme.commitment.json").read_text())["commitments"] == committed["commitments"]
    assert stat.S_IMODE(Path("acme.commitment.pem").stat().st_mode) == 0o600
    assert committed["committed_at"] is None
    printed = rows_of(capsys.readouterr().out)
    assert printed["published commitment"] == committed["commitments"][0]
    assert [printed["key's commitment"]] == committed["key_commitments"] == [signed.content["commitment"]]
    assert main(["keygen", "owner=Other", "data=digits", "key=b32", "out=other.gskey"]) == 0

    Path("reply").write_bytes(authority.stamp(Path("acme.commitment.tsq").read_bytes()))
    attach = ["commit", f"key={signed.key}", "out=acme.commitment.json", "attach=reply"]
    assert main(attach) == 1
    assert "`authority` must name" in capsys.readouterr().err
    assert main(["commit", "key=other.gskey", *attach[2:], f"authority={authority.certificates}"]) == 1
    assert (
        "`key` must name keys that 'acme.commitment.json' commits to, got another." in capsys.readouterr().err
    )
    assert not Path("acme.commitment.tsr").exists()
    stamped = result(*attach, f"authority={authority.certificates}")
    assert stamped["committed_at"] is not None
    assert authority.verify(Path("acme.commitment.json").resolve(), Path("acme.commitment.tsr").resolve())

    evidence = ["bundle=acme.gsbundle", "commitment=acme.commitment.json"]
    found = result(
        "verify", f"onnx={files['model']}", f"key={signed.key}", *API, *evidence, "api.journal=answers.jsonl"
    )
    capsys.readouterr()
    claim = ["judge", "bundle=acme.gsbundle", "grinding_bits=0", "alpha=1e-3"]
    judged = result(*claim)
    assert (judged["verdict"], judged["reading"]) == ("claimed", None)
    assert judged["published_commitment"] == committed["commitments"][0]
    assert judged["transcript"]["p_value"] == found["p_value"]
    printed = capsys.readouterr().out
    shown = rows_of(printed)
    assert shown["published commitment"].startswith(f"{committed['commitments'][0]} (must be in the file")
    assert shown["key's commitment"] == signed.content["commitment"]
    assert "the answers are what the claimant says" in printed
    assert "not read as the published commitment announced" in printed  # at another alpha and budget
    assert main(claim) == 3
    later = (datetime.now(timezone.utc) + timedelta(days=1)).isoformat()
    dated = [
        f"authority={authority.certificates}",
        f"suspect_since='{later}'",
        f"controls=[{signed.folder / 'twin.ckpt'}]",
    ]
    claim += [f"checkpoint={signed.folder / 'model.ckpt'}", *dated]
    assert main(claim) == 1
    # the judge's own, whatever the checkpoint names
    assert "`images` must name a folder" in capsys.readouterr().err
    claim.append("data=digits")
    judged = result(*claim)
    assert (judged["verdict"], judged["precedes_suspect"], judged["objections"]) == ("owned", True, [])
    assert judged["input_mean"] == pytest.approx(DIGITS.mean)
    assert main(claim) == 0
    assert "the earlier valid time-stamp takes precedence" in capsys.readouterr().out
    unlike = result(*claim, "input_mean=[0]", "input_std=[0.00001]")
    assert (unlike["verdict"], unlike["input_std"]) != ("owned", [0.376])
    assert main([*claim, "input_mean=[0]"]) == 1
    assert "`input_mean` and `input_std` must be given together" in capsys.readouterr().err
    undated = result(*[word for word in claim if not word.startswith("suspect_since")])
    assert (undated["verdict"], len(undated["objections"])) == ("not_proven", 1)
    capsys.readouterr()
    assert (
        main([word.replace("model.ckpt", "twin.ckpt") for word in claim if not word.startswith("controls")])
        == 3
    )
    assert "\nnot proven: adjusted p > alpha = 0.001.\n" in capsys.readouterr().out
    assert judged["reading"]["n_queries"] > 50
    assert list(judged["controls"]) == [str(signed.folder / "twin.ckpt")]


def test_a_bundle_without_transcript_for_who_reads_weights(signed):
    result("commit", f"key={signed.key}", "out=a.commitment.json")
    made = ["verify", f"checkpoint={signed.folder / 'model.ckpt'}", f"key={signed.key}", "bundle=a.gsbundle"]
    assert result(*made, "commitment=a.commitment.json")["bundle"] == "a.gsbundle"
    assert json.loads(Path("a.gsbundle").read_text())["evidence"]["transcript"] is None


def test_several_keys_in_one_commitment(signed):
    assert main(["keygen", "owner=Acme", "data=digits", "key=b32", "out=second.gskey"]) == 0
    found = result("commit", f"key=[{signed.key},second.gskey]", "out=both.commitment.json")
    assert len(set(found["commitments"])) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "key={key}"], "one of `checkpoint`, `onnx` and `endpoint` must be given, got none"),
        (["verify", "key={key}", "onnx=a", "endpoint=b"], "got onnx and endpoint"),
        (["verify", "key={key}", "onnx=nowhere.onnx"], "`onnx` must name an ONNX file"),
        (["verify", "key={key}", "endpoint=ftp://x", "data=digits"], "`endpoint` must start with http"),
        (["verify", "key={key}", "onnx={onnx}"], "`images` must name a folder"),
        (
            ["verify", "key={key}", "onnx={onnx}", "bundle=x", "api.journal=j"],
            "`commitment` must name the file",
        ),
        (["verify", "key={key}", "onnx={onnx}", "bundle=x", "commitment=y"], "`api.journal` must name"),
        (
            ["verify", "key={key}", "onnx={onnx}", "bundle=no/x", "commitment=y"],
            "`bundle` must name a new file",
        ),
        (
            ["verify", "key={key}", "checkpoint={ckpt}", "bundle=x", "commitment=y"],
            "`commitment` must name a readable file",
        ),
        (["judge", "bundle=nowhere"], "`bundle` must name a readable file"),
        (["commit", "key={key}", "signer=nowhere"], "`signer` must name a readable file"),
        (
            ["commit", "key={key}", "attach=nowhere", "authority=nowhere"],
            "`commitment` must name a readable file",
        ),
        (["trace", "key={key}", "checkpoint={ckpt}"], "`key` must be a key without payload"),
        (["judge", "bundle=nowhere", "normalized=true"], "`bundle` must name a readable file"),
        (["import-2021", "folder=nowhere", "images=nowhere"], "`folder` must hold"),
        (["keygen", "owner=A", "master={key}", "out=x.gskey"], "`customer` or `message` must be given"),
        (["keygen", "owner=A", "customer=1", "out=x.gskey"], "`customer` needs `master=FILE`"),
        (
            ["keygen", "owner=A", "target_class=10", "out=x.gskey"],
            "`target_class` must be below the data set's number",
        ),
    ],
)
def test_what_is_missing_is_named(signed, files, words, message, capsys):
    names = {"key": signed.key, "onnx": files["model"], "ckpt": signed.folder / "model.ckpt"}
    assert main([word.format(**names) for word in words]) == 1
    assert message in capsys.readouterr().err
    assert not list(Path.cwd().glob("*.gs*"))


def test_a_commitment_is_not_overwritten(signed, capsys):
    words = ["commit", f"key={signed.key}", "out=a.commitment.json"]
    assert main(words) == 0
    before = {path: path.read_bytes() for path in Path.cwd().iterdir()}
    assert main(words) == 1
    assert "`out` must not name an existing commitment" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path.cwd().iterdir()} == before


def test_the_signer_may_be_kept(signed):
    first = result("commit", f"key={signed.key}", "out=a.commitment.json")
    second = result("commit", f"key={signed.key}", "out=b.commitment.json", "signer=a.commitment.pem")
    assert first["signer"] == second["signer"]


def test_a_leaked_copy_names_its_customer(capsys):
    pytest.importorskip("galois")
    for words in (["out=master.gskey"], ["master=master.gskey", "customer=42", "out=c42.gskey"]):
        assert (
            main(
                ["keygen", "owner=Acme", "data=digits", "key=b32", "key.n_bits=48", "target_class=3", *words]
            )
            == 0
        )
    train = [
        "train",
        "data=digits",
        "model=mlp",
        "key=c42.gskey",
        "trainer.max_epochs=12",
        "progress=false",
        "hydra.run.dir=run",
    ]
    assert main([*train, "data.module.batch_size=32", "trainer.accelerator=cpu"]) == 0
    found = result(
        "trace", "checkpoint=run/model.ckpt", "key=master.gskey", "n_customers=10000", "alpha=1e-3"
    )
    assert (found["customer"], found["verdict"], found["present"]) == (42, "owned", [42])
    assert (
        main(
            [
                "keygen",
                "owner=Other",
                "data=digits",
                "key=b32",
                "key.n_bits=48",
                "target_class=3",
                "out=other.gskey",
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert main(["trace", "checkpoint=run/model.ckpt", "key=other.gskey"]) == 3
    printed = capsys.readouterr().out
    assert "not proven: p > alpha = 1e-09 for every customer." in printed
    assert "nearest's key's commitment" in printed
