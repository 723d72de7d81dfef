"""Fuzz what comes from others: `python fuzz_readers.py key|bundle|commitment|journal|server [libFuzzer options]`.

Every input must give a result or a ValueError (OracleError of a server); any other exception, a hang, or the attempt to run
something ends the program with a non-zero exit code.
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gradsigns_lightning"]):
    from gradsigns_lightning import WatermarkKey, verify_api
    from gradsigns_lightning.extraction.asking import read_journal
    from gradsigns_lightning.extraction.black_box import replay
    from gradsigns_lightning.extraction.evidence import Bundle, Statement, judge, make_statement
    from gradsigns_lightning.extraction.oracles import JsonTemplate, MlflowProtocol, OpenInferenceProtocol

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SHAPE = (1, 4, 5)
KEY = WatermarkKey.generate("A", 8, input_shape=SHAPE, target_class=1, secret=bytes(32))
IMAGES = (torch.rand(9, *SHAPE, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
PIXELS = (IMAGES * 255).to(torch.uint8)
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(32))
FOLDER = Path(tempfile.mkdtemp())
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect")


def predict(images):
    """A model of two classes."""
    return torch.stack([images.flatten(1).mean(1), 1 - images.flatten(1).mean(1)], 1)


def make_journal():
    path = FOLDER / "seed.jsonl"
    verify_api(predict, KEY, IMAGES, max_queries=40, alpha=0.5, journal=path)
    return path.read_bytes()


def make_bundle():
    (FOLDER / "lines.jsonl").write_bytes(make_journal())
    path = FOLDER / "seed.gsbundle"
    statement = make_statement([KEY.commitment], SIGNER)
    Bundle(key=KEY, statement=statement, images=PIXELS, transcript=read_journal(FOLDER / "lines.jsonl")).save(path, SIGNER)
    return path.read_bytes()


def make_key():
    KEY.save(FOLDER / "seed.gskey")
    return (FOLDER / "seed.gskey").read_bytes()


def read_key(data):
    (FOLDER / "key").write_bytes(data)
    WatermarkKey.load(FOLDER / "key")


def read_bundle(data):
    """Read a bundle as it is, and its edited content signed anew, as a dishonest claimant would."""
    for content in (data, signed_anew(data)):
        if content is not None:
            judge(Bundle.from_bytes(content), grinding_bits=0)


def signed_anew(data):
    try:
        evidence = json.loads(data)["evidence"]
        text = json.dumps(evidence, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        outer = {"evidence": evidence, "signature": SIGNER.sign(text).hex()}
        return json.dumps(outer, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_lines(data):
    (FOLDER / "lines").write_bytes(data)
    replay(KEY, PIXELS, read_journal(FOLDER / "lines"))


def read_reply(data):
    """Read any JSON as the reply of each kind of server."""
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        return
    for protocol in (
        OpenInferenceProtocol(),
        MlflowProtocol(),
        JsonTemplate({"x": "$images"}, answer="/outputs"),
        JsonTemplate({"x": "$images"}, classes=["a", "b"]),
    ):

        def ask(images, protocol=protocol):
            return protocol.scores(reply, len(images))

        try:
            verify_api(ask, KEY, IMAGES, max_queries=20, batch_size=1)
        except ValueError:
            continue


TARGETS = {
    "key": (read_key, make_key),
    "bundle": (read_bundle, make_bundle),
    "commitment": (Statement.from_bytes, lambda: make_statement([KEY.commitment], SIGNER).to_bytes()),
    "journal": (read_lines, make_journal),
    "server": (read_reply, lambda: b'{"outputs": [{"name": "p", "shape": [1, 2], "datatype": "FP32", "data": [0.25, 0.75]}]}'),
}


def main():
    read, make_seed = TARGETS[sys.argv.pop(1)]
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    (seeds / "seed").write_bytes(make_seed())
    read((seeds / "seed").read_bytes())

    def check(data):
        try:
            read(data)
        except ValueError as error:
            if not str(error):
                raise RuntimeError("an error without a message") from error

    def forbid(event, _):
        if event in FORBIDDEN:
            raise SystemError(f"input made the reader do {event}")

    sys.addaudithook(forbid)
    atheris.Setup([*sys.argv, str(seeds)], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
