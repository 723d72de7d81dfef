"""The key derivation against published vectors, by an implementation that shares no code with the package.

``docs/key-format.md`` specifies what is computed here.
"""

import hashlib
import hmac
import json
import re
from pathlib import Path

import numpy as np
import pytest

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.core.key import derivation

VECTORS = json.loads((Path(__file__).parent / "key_vectors.json").read_text())
DOCUMENT = Path(__file__).parents[4] / "docs" / "key-format.md"
BOUND = {1: ("owner", "scope", "n_bits", "n_carriers", "input_shape", "target_class")}
BOUND[2] = (*BOUND[1], "input_mean", "input_std")
COMMITTED = {1: (*BOUND[2], "payload", "secret"), 2: (*BOUND[2], "version", "purpose", "payload", "secret")}
PURPOSES = ("owner", "customer", "message")
SECRET_BYTES = 32
SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\f": "\\f", "\b": "\\b"}


def canonical(value) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical(k)}:{canonical(value[k])}" for k in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(map(escaped, value)) + '"'
    return repr(value)


def escaped(character: str) -> str:
    if character in SHORT_ESCAPES:
        return SHORT_ESCAPES[character]
    if " " <= character <= "~":
        return character
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def hkdf_sha256(secret: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    pseudorandom_key = hmac.new(salt, secret, hashlib.sha256).digest()
    okm, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.new(pseudorandom_key, block + info + bytes([counter]), hashlib.sha256).digest()
        okm += block
    return okm[:length]


def stream(vector, secret: bytes, label: str, n_bytes: int) -> bytes:
    version = vector["version"]
    context = canonical({name: vector[name] for name in BOUND[version]}).encode("ascii")
    info = b"gradsigns/v%d/" % version + label.encode("ascii") + b"\n" + context
    return hashlib.shake_256(hkdf_sha256(secret, b"gradsigns-lightning/key/v%d" % version, info)).digest(
        n_bytes
    )


def halves(vector) -> tuple[bytes, bytes]:
    """Return the secrets of carriers and projection, and of everything else."""
    secret = bytes.fromhex(vector["secret"])
    if vector["version"] == 1:
        return secret, secret
    if vector["purpose"] == "owner":
        return stream(vector, secret, "space", SECRET_BYTES), secret
    return secret[:SECRET_BYTES], secret[SECRET_BYTES:]


def secret_of_copy(vector) -> bytes:
    """Return the secret of a copy's key from its master's."""
    master, customer = (
        bytes.fromhex(vector["master"]),
        int.from_bytes(bytes.fromhex(vector["payload"]), "little"),
    )
    if vector["purpose"] == "customer":
        mark = stream(vector, master, "mark/customers", SECRET_BYTES * (customer + 1))[
            SECRET_BYTES * customer :
        ]
    else:
        mark = stream(vector, master, "mark/messages", SECRET_BYTES)
    return stream(vector, master, "space", SECRET_BYTES) + mark


def bits(data: bytes, count: int) -> list[int]:
    return [data[i // 8] >> (i % 8) & 1 for i in range(count)]


def packed(values) -> bytes:
    out = bytearray(-(-len(values) // 8))
    for i, value in enumerate(values):
        out[i // 8] |= value << (i % 8)
    return bytes(out)


def derived(vector) -> dict:
    """Return all derived parts of a vector, in plain Python."""
    channels, height, width = vector["input_shape"]
    size = channels * height * width
    space, mark = halves(vector)
    words = stream(vector, space, "carriers", 8 * size)
    ranked = sorted(range(size), key=lambda i: (int.from_bytes(words[8 * i : 8 * i + 8], "little"), i))
    carriers = sorted(ranked[: vector["n_carriers"]])
    n_entries = vector["n_bits"] * vector["n_carriers"]
    entries = bytes(
        1 if bit else 255 for bit in bits(stream(vector, space, "projection", -(-n_entries // 8)), n_entries)
    )
    committed = {name: vector[name] for name in COMMITTED[vector["version"]]}
    salt = stream(vector, mark, "commitment-salt", 32)
    prefix = b"gradsigns/v%d/commitment\n" % vector["version"]
    return {
        "first_carriers": carriers[:6],
        "last_carriers": carriers[-6:],
        "carriers_sha256": hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in carriers)).hexdigest(),
        "projection_sha256": hashlib.sha256(entries).hexdigest(),
        "signature": packed(signature(vector)).hex(),
        "commitment": hashlib.sha256(prefix + salt + canonical(committed).encode("ascii")).hexdigest(),
    }


def signature(vector) -> list[int]:
    n_bits, n_bytes = vector["n_bits"], -(-vector["n_bits"] // 8)
    space, mark = halves(vector)
    keystream = bits(stream(vector, mark, label(vector, space), n_bytes), n_bits)
    payload = b"" if vector["purpose"] == "customer" else bytes.fromhex(vector["payload"])
    return [k ^ p for k, p in zip(keystream, bits(payload.ljust(n_bytes, b"\0"), n_bits), strict=True)]


def label(vector, space: bytes) -> str:
    tag = stream(vector, space, "tag", 32).hex()
    number = int.from_bytes(bytes.fromhex(vector["payload"]), "little")
    labels = {
        "owner": "signature",
        "customer": f"signature/customer/{number}/{tag}",
        "message": f"signature/message/{tag}",
    }
    return labels[vector["purpose"]]


def key_of(vector) -> WatermarkKey:
    names = BOUND[2] if vector["version"] == 1 else (*BOUND[2], "version", "purpose")
    public = {name: vector[name] for name in names}
    return WatermarkKey.from_parts(
        public, payload=bytes.fromhex(vector["payload"]), secret=bytes.fromhex(vector["secret"])
    )


def test_what_is_generated_is_of_the_latest_version():
    vector = next(v for v in VECTORS if v["version"] == 2 and v["purpose"] == "owner")
    names = ("n_bits", "n_carriers", "input_shape", "target_class", "input_mean", "input_std", "scope")
    secret, payload = (bytes.fromhex(vector[name]) for name in ("secret", "payload"))
    key = WatermarkKey.generate(
        vector["owner"], **{n: vector[n] for n in names}, secret=secret, payload=payload
    )
    assert key == key_of(vector)


@pytest.mark.parametrize("vector", [v for v in VECTORS if "master" in v], ids=lambda v: v["name"])
def test_keys_of_copies_follow_from_their_masters(vector):
    assert secret_of_copy(vector).hex() == vector["secret"]
    master = key_of({**vector, "purpose": "owner", "payload": "", "secret": vector["master"]})
    key = master.derive(vector["purpose"], bytes.fromhex(vector["payload"]))
    assert key == key_of(vector)
    if vector["purpose"] == "customer":
        number = int.from_bytes(bytes.fromhex(vector["payload"]), "little")
        assert packed(master.customer_signatures(number + 1)[number].tolist()).hex() == vector["signature"]


def test_there_is_a_vector_of_every_version_and_purpose():
    assert {(v["version"], v["purpose"]) for v in VECTORS} == {
        (1, "owner"),
        *((2, purpose) for purpose in PURPOSES),
    }
    assert [v["name"] for v in VECTORS if "master" in v] == [
        v["name"] for v in VECTORS if v["purpose"] != "owner"
    ]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_an_independent_implementation_gives_the_published_vector(vector):
    assert derived(vector) == {name: vector[name] for name in derived(vector)}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_the_package_gives_the_published_vector(vector):
    key = key_of(vector)
    carriers = key.carriers.numpy()
    assert carriers[:6].tolist() == vector["first_carriers"]
    assert carriers[-6:].tolist() == vector["last_carriers"]
    assert hashlib.sha256(carriers.astype("<i8").tobytes()).hexdigest() == vector["carriers_sha256"]
    assert hashlib.sha256(key.projection.numpy().tobytes()).hexdigest() == vector["projection_sha256"]
    assert packed(key.signature.tolist()).hex() == vector["signature"]
    assert key.commitment == vector["commitment"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_the_document_prints_the_same_vectors(vector):
    section = re.search(
        rf"^### {re.escape(vector['name'])}\n(.*?)(?=^###? |\Z)", DOCUMENT.read_text(), re.M | re.S
    )
    assert section is not None
    printed = dict(re.findall(r"^\| `(\w+)` \| `(.*)` \|$", section[1], re.M))
    assert printed == {name: json.dumps(value) for name, value in vector.items() if name != "name"}


def test_own_hkdf_follows_rfc_5869_test_case_1():
    okm = hkdf_sha256(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"


def test_streams_of_other_labels_and_contexts_differ():
    secret = derivation.Secret(bytes(32))
    streams = {
        derivation.Streams(secret, context, version).bytes(label, 32)
        for label in "ab"
        for context in (b"", b"c")
        for version in (1, 2)
    }
    assert len(streams) == 8


def test_a_shorter_stream_is_a_prefix_of_a_longer_one():
    streams = derivation.Streams(derivation.Secret(bytes(32)), b"", 2)
    assert streams.bytes("a", 100)[:7] == streams.bytes("a", 7)


def test_equal_words_go_to_the_smaller_value(monkeypatch):
    words = np.array([5, 1, 5, 0, 5], dtype="<u8")
    monkeypatch.setattr(derivation.Streams, "bytes", lambda *_: words.tobytes())
    assert derivation.Streams(derivation.Secret(bytes(32)), b"", 2).subset("x", 5, 3).tolist() == [0, 1, 3]
