"""Targets for what an owner hands over: a key, a commitment and its time-stamp, a journal, a bundle."""

import importlib.util
import json
from pathlib import Path

import fuzz_mutation as plain
from fuzz_base import FOLDER, SHAPE, Reader, owned, predict


def key_file():
    from safetensors.numpy import load, save

    from gradsigns_lightning import WatermarkKey

    path, seeds = FOLDER / "a.gskey", []
    key = WatermarkKey.generate(
        "A", 8, input_shape=SHAPE, target_class=1, secret=bytes(32), payload=b"x", input_mean=(0.5,)
    )
    first = {
        name: value for name, value in key.to_public_dict().items() if name not in ("version", "purpose")
    }
    old = WatermarkKey.from_parts(
        {**first, "owner": "株\x1b\n\ud800", "scope": "s"}, payload=b"", secret=bytes(32)
    )
    for made in (key, old, key.derive("message", b"y")):
        made.save(path, overwrite=True)
        seeds.append(path.read_bytes())

    def unpack(data):
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        tensors = {name: values.tolist() for name, values in load(data).items()}
        return {"metadata": {**metadata, "key": json.loads(metadata["key"])}, "tensors": tensors}

    def pack(value):
        import numpy as np

        tensors = {name: np.array(values, dtype=np.uint8) for name, values in value["tensors"].items()}
        texts = {
            name: text if isinstance(text, str) else json.dumps(text)
            for name, text in value["metadata"].items()
        }
        return save(tensors, texts)

    return Reader(lambda data: repr(WatermarkKey.load(path)), seeds, path.write_bytes, unpack, pack)


def commitment():
    from gradsigns_lightning.evidence import Statement, make_statement

    key, _, signer = owned()
    seeds = [make_statement([key] * n, signer).to_bytes() for n in (1, 3)]
    return Reader(Statement.from_bytes, seeds, unpack=plain.from_json, pack=plain.to_canonical)


def journal():
    from gradsigns_lightning import verify_api
    from gradsigns_lightning.verification.api.queries import read_journal
    from gradsigns_lightning.verification.api.verify import replay

    key, images, _ = owned()
    path, seeds = FOLDER / "a.jsonl", []
    for answer in (predict, lambda x: predict(x).argmax(1)):
        path.unlink(missing_ok=True)
        verify_api(answer, key, images, max_queries=40, alpha=0.5, journal=path)
        seeds.append(path.read_bytes())
    path.with_suffix(".jsonl.lock").unlink(missing_ok=True)
    pixels = (images * 255).byte()
    return Reader(
        lambda data: replay(key, pixels, read_journal(path)),
        seeds,
        path.write_bytes,
        plain.from_lines,
        plain.to_lines,
    )


def bundle():
    """A bundle as it is, and one that is committed to and signed again after a change, as a forger would."""
    from gradsigns_lightning import WatermarkKey
    from gradsigns_lightning.evidence import Bundle, Statement, judge, make_statement
    from gradsigns_lightning.verification.api.queries import read_journal

    key, images, signer = owned()
    path = FOLDER / "a.gsbundle"
    (FOLDER / "b.jsonl").write_bytes(journal().seeds[0])
    parts = {"images": (images * 255).byte(), "transcript": read_journal(FOLDER / "b.jsonl")}
    statement, seeds = make_statement([key], signer), []
    for content in (parts, {}):
        path.unlink(missing_ok=True)
        Bundle(key=key, statement=statement, **content).save(path, signer)
        seeds.append(path.read_bytes())

    def pack(value):
        evidence = value["evidence"]
        try:
            parts = evidence["key"]
            made = WatermarkKey.from_parts(
                parts["public"],
                payload=bytes.fromhex(parts["payload"]),
                secret=bytes.fromhex(parts["secret"]),
            )
            evidence["statement"] = make_statement([made], signer).to_bytes().decode()
        except (ValueError, TypeError, KeyError):
            pass
        signed = signer.sign(plain.to_canonical(evidence)[:-1]).hex()
        return plain.to_canonical({**value, "signature": signed})

    assert Statement.from_bytes(statement.to_bytes()) == statement
    return Reader(
        lambda data: judge(Bundle.load(path), grinding_bits=0).to_dict(),
        seeds,
        path.write_bytes,
        plain.from_json,
        pack,
    )


def time_stamp():
    """A time-stamp authority's reply, DER; and its certificates, PEM."""
    from gradsigns_lightning.evidence import check_timestamp, make_statement, timestamp_request

    specification = importlib.util.spec_from_file_location(
        "authorities", Path(__file__).parents[1] / "conftest.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    key, _, signer = owned()
    statement = make_statement([key], signer)
    authority = module.Authority(FOLDER / "authority")
    reply = authority.stamp(timestamp_request(statement))
    pem = authority.certificates.read_bytes()

    def read(data):
        if data.startswith(b"-----BEGIN"):
            return check_timestamp(reply, statement, data)
        return check_timestamp(data, statement, pem)

    return Reader(read, [reply, pem], unpack=plain.from_der, pack=plain.to_der)
