"""The key file is written completely or not at all, and never yields another key than was saved."""

import itertools
import json
import os
import pickle
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.core.key import file as keyfile

KEY = WatermarkKey.generate(
    "Acme",
    16,
    input_shape=(1, 6, 6),
    target_class=1,
    scope="m",
    payload=b"a",
    input_mean=0.25,
    secret=bytes(range(32)),
)


@pytest.fixture
def path(tmp_path):
    KEY.save(tmp_path / "acme.gskey")
    return tmp_path / "acme.gskey"


def outcome(path, data: bytes):
    """Return the key in ``data``, or None if it is refused; errors other than a ValueError are raised."""
    path.write_bytes(data)
    try:
        return WatermarkKey.load(path)
    except ValueError as error:
        assert "`path`" in str(error)  # noqa: PT017
        assert KEY._secret.reveal().hex() not in str(error)  # noqa: PT017
        return None


def file_of(**changes) -> bytes:
    """Return a key file with some entries replaced; None omits one."""
    entries = {
        "format": "gradsigns-key",
        "version": "2",
        "commitment": KEY.commitment,
        "key": json.dumps(KEY.to_public_dict()),
    }
    tensors = {
        "secret": np.frombuffer(KEY._secret.reveal(), np.uint8),
        "payload": np.frombuffer(KEY._payload, np.uint8),
    }
    for name, value in changes.items():
        (tensors if name in tensors else entries)[name] = value
    return save(
        {k: v for k, v in tensors.items() if v is not None},
        {k: v for k, v in entries.items() if v is not None},
    )


def raw_file(header: object, body: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + body


@pytest.mark.parametrize("payload", [None, b"ab"])
@pytest.mark.parametrize("as_path", [str, lambda p: p])
def test_round_trip(tmp_path, payload, as_path):
    key = WatermarkKey.generate(
        "Acme", 16, input_shape=(3, 6, 6), target_class=1, payload=payload, input_std=[0.1, 0.2, 0.3]
    )
    key.save(as_path(tmp_path / "k"))
    loaded = WatermarkKey.load(as_path(tmp_path / "k"))
    assert loaded == key
    assert loaded.commitment == key.commitment
    assert torch.equal(loaded.signature, key.signature)


def test_only_the_owner_may_read_it(path):
    umask = os.umask(0)
    try:
        KEY.save(path, overwrite=True)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_secret_is_at_no_time_readable_by_others(path, monkeypatch):
    modes = []
    replace = os.replace

    def spy(source, target):
        modes.append(stat.S_IMODE(Path(source).stat().st_mode))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    KEY.save(path, overwrite=True)
    assert modes == [0o600]


def test_an_existing_file_is_not_overwritten(path):
    before = path.read_bytes()
    other = WatermarkKey.generate("B", 16, input_shape=(1, 6, 6), target_class=1)
    with pytest.raises(ValueError, match="`path` must not name an existing key file unless overwrite=True"):
        other.save(path)
    assert path.read_bytes() == before
    other.save(path, overwrite=True)
    assert WatermarkKey.load(path) == other


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`path` must name a file in an existing folder, got '.*nowhere/k'"):
        KEY.save(tmp_path / "nowhere" / "k")


@pytest.mark.parametrize("failing", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(path, monkeypatch, failing, error):
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, failing, fail)
    other = WatermarkKey.generate("B", 16, input_shape=(1, 6, 6), target_class=1)
    with pytest.raises(type(error)):
        other.save(path, overwrite=True)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_failing_first_write_leaves_no_file(tmp_path, monkeypatch):
    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        KEY.save(tmp_path / "k")
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_refused_at_every_length(path):
    data = path.read_bytes()
    assert all(outcome(path, data[:length]) is None for length in range(len(data)))
    assert outcome(path, data) == KEY


def flip(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def test_no_flipped_bit_makes_another_key(path, monkeypatch):
    data = path.read_bytes()
    refused = 0
    for position, bit in itertools.product(range(len(data)), range(8)):
        flipped = flip(data, position, bit)
        monkeypatch.setattr(keyfile, "read_file", lambda *_, flipped=flipped, **__: flipped)
        try:
            assert WatermarkKey.load(path) == KEY, (position, bit)
        except ValueError:
            refused += 1
    assert refused > 0.99 * 8 * len(data)


def test_appended_bytes_are_refused(path):
    assert outcome(path, path.read_bytes() + b"\0") is None


def test_another_version_is_named(path):
    path.write_bytes(file_of(version="3"))
    with pytest.raises(ValueError, match="has version '3', this release reads 1, 2"):
        WatermarkKey.load(path)


def test_the_files_version_must_be_the_keys(path):
    assert outcome(path, file_of(version="1")) is None


def test_a_key_of_version_1_is_written_and_read(tmp_path):
    public = {
        name: value for name, value in KEY.to_public_dict().items() if name not in ("version", "purpose")
    }
    old = WatermarkKey.from_parts(public, payload=b"", secret=bytes(32))
    old.save(tmp_path / "old.gskey")
    assert WatermarkKey.load(tmp_path / "old.gskey") == old
    assert b'"version":"1"' in (tmp_path / "old.gskey").read_bytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged, truncated or something else"),
        (pickle.dumps({"secret": b"x"}), "damaged, truncated or something else"),
        (save({"a": np.zeros(3, np.float32)}), "damaged, truncated or something else"),
        (save({"a": np.zeros(3, np.float32)}, {"format": "pt"}), "damaged, truncated or something else"),
        (raw_file({"__metadata__": None}), "damaged, truncated or something else"),
        (raw_file({}), "damaged, truncated or something else"),
        (raw_file(b"[" * 100_000), "damaged, truncated or something else"),
        (file_of(version=None), "has version None"),
        (file_of(commitment=None), "something else"),
        (file_of(commitment="0" * 64), "does not match its own commitment"),
        (file_of(commitment=KEY.commitment.upper()), "does not match its own commitment"),
        (file_of(key=None), "something else"),
        (file_of(key="{"), "something else"),
        (file_of(key="7"), "something else"),
        (file_of(key="[" * 100_000), "something else"),
        (file_of(key="{}", version="1"), "parameters in key file"),
        (file_of(secret=None), "something else"),
        (file_of(payload=None), "something else"),
        (file_of(payload=np.frombuffer(b"b", np.uint8)), "does not match its own commitment"),
        (file_of(payload=np.zeros(9, np.uint8)), "parameters in key file"),
        (file_of(secret=np.zeros(31, np.uint8)), "something else"),
        (file_of(secret=np.zeros(64, np.uint8)), "parameters in key file"),
        (file_of(secret=np.zeros((4, 8), np.uint8)), "something else"),
        (file_of(secret=np.zeros(8, np.float32)), "something else"),
        (b"\0" * ((1 << 20) + 1), "at most 1048576 bytes"),
    ],
    ids=range(25),
)
def test_files_that_are_no_key_are_refused(path, data, message):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        WatermarkKey.load(path)


@pytest.mark.parametrize(("purpose", "payload"), [("customer", b"\1\2"), ("message", b"a")])
def test_keys_of_copies_come_back_and_not_with_half_their_secret(path, purpose, payload):
    key = KEY.derive(purpose, payload)
    key.save(path, overwrite=True)
    assert WatermarkKey.load(path) == key
    assert KEY._secret.reveal() not in path.read_bytes()
    entries = {
        "commitment": key.commitment,
        "key": json.dumps(key.to_public_dict()),
        "payload": np.frombuffer(payload, np.uint8),
    }
    secret = np.frombuffer(key._secret.reveal(), np.uint8)
    assert outcome(path, file_of(**entries, secret=secret)) == key
    for wrong in (
        secret[:32],
        secret[32:],
        secret[:63],
        np.zeros(65, np.uint8),
        secret[::-1].copy(),
        np.roll(secret, 32),
    ):
        assert outcome(path, file_of(**entries, secret=wrong)) is None


@pytest.mark.parametrize(
    "dtype", ["BOOL", "I8", "F4", "F8_E4M3", "F8_E5M2", "BF16", "F16", "I64", "C64", "U9"]
)
def test_key_material_of_another_dtype_is_refused(path, dtype):
    width = {"BF16": 2, "F16": 2, "I64": 8, "C64": 8}.get(dtype, 1)
    header = {
        "__metadata__": {
            "format": "gradsigns-key",
            "version": "1",
            "commitment": KEY.commitment,
            "key": json.dumps(KEY.to_public_dict()),
        },
        "secret": {"dtype": dtype, "shape": [32], "data_offsets": [0, 32 * width]},
        "payload": {"dtype": "U8", "shape": [0], "data_offsets": [32 * width, 32 * width]},
    }
    assert outcome(path, raw_file(header, bytes(32 * width))) is None


@pytest.mark.parametrize(
    "name", ["owner", "n_bits", "input_shape", "input_mean", "input_std", "target_class"]
)
@pytest.mark.parametrize(
    "value", [None, 10**400, -1, 1e308, float("nan"), "x", [], [10**400], [None], {}, [[1]], True, "\ud800"]
)
def test_edited_parameters_are_refused(path, name, value):
    assert outcome(path, file_of(key=json.dumps({**KEY.to_public_dict(), name: value}))) is None


def test_paths_that_cannot_be_read_are_named(tmp_path):
    for bad in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"`path` must name a readable key file, got '{bad}': "):
            WatermarkKey.load(bad)


def test_a_huge_file_is_refused_without_reading_it(tmp_path):
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="larger"):
        WatermarkKey.load(tmp_path / "huge")


def test_what_was_read_prints_no_secret(path):
    content = keyfile.read(path)
    assert content.secret == KEY._secret
    assert KEY._secret.reveal().hex() not in repr(content)
    assert "secret=Secret(...)" in repr(content)
    assert "payload=" not in repr(content)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "k"


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(scratch, data):
    assert outcome(scratch, data) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=4),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*KEY.to_public_dict(), "other"]), json_values, max_size=3))
def test_arbitrary_parameters_are_refused_or_mean_the_same_key(scratch, changes):
    assert outcome(scratch, file_of(key=json.dumps({**KEY.to_public_dict(), **changes}))) in (None, KEY)


@settings(max_examples=100, deadline=None)
@given(
    header=st.dictionaries(
        st.sampled_from(["__metadata__", "secret", "payload"]),
        json_values | st.dictionaries(st.text(max_size=8), json_values),
    )
)
def test_arbitrary_headers_are_refused(scratch, header):
    assert outcome(scratch, raw_file(header)) is None


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_mean_the_same_key(scratch, data):
    whole = bytearray(file_of())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    assert outcome(scratch, bytes(whole)) in (None, KEY)


def test_saving_through_a_symbolic_link_replaces_the_link_only(path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    copy = shutil.copy(path, tmp_path / "copy")
    WatermarkKey.generate("B", 16, input_shape=(1, 6, 6), target_class=1).save(link, overwrite=True)
    assert not link.is_symlink()
    assert path.read_bytes() == copy.read_bytes()
