"""Wherever a key is accepted, its file is too."""

import lightning.pytorch as L
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from lightning.fabric import Fabric

from gradsigns_lightning import (
    FabricGradSigns,
    GradSigns,
    GradSignsMixin,
    WatermarkKey,
    customer_key,
    message_key,
    read_message,
    trace,
    verify,
    verify_api,
    verify_many,
)
from gradsigns_lightning.evidence import make_statement

KEY = WatermarkKey.generate(
    "A", 64, input_shape=(3, 16, 16), target_class=2, n_carriers=384, secret=bytes(32)
)
IMAGES = 0.2 + 0.6 * torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(planted):
    return planted(KEY)


@pytest.fixture
def file(tmp_path):
    KEY.save(tmp_path / "acme.gskey")
    return tmp_path / "acme.gskey"


class Net(GradSignsMixin, L.LightningModule):
    pass


SIGNER = Ed25519PrivateKey.generate()
FABRIC = Fabric(accelerator="cpu", devices=1)
TAKERS = {
    "verify": ("key", lambda model, key: verify(model, key, IMAGES)),
    "verify_many": ("keys", lambda model, key: verify_many(model, [key], IMAGES)),
    "verify_many, names": ("keys", lambda model, key: verify_many(model, {"mine": key}, IMAGES)),
    "verify_api": ("key", lambda model, key: verify_api(lambda x: model(x), key, IMAGES)),
    "trace": ("master", lambda model, key: trace(model, key, IMAGES)),
    "read_message": ("master", lambda model, key: _message(model, key)),
    "customer_key": ("master", lambda model, key: customer_key(key, 7)),
    "message_key": ("master", lambda model, key: message_key(key, "hi").commitment),
    "make_statement": ("keys", lambda model, key: make_statement([key], SIGNER)),
    "GradSigns": ("key", lambda model, key: GradSigns(key).key),
    "the mixin": ("key", lambda model, key: Net().sign_with(key).key),
    "Fabric": ("key", lambda model, key: FabricGradSigns(FABRIC, key).watermarker.key),
}


def _message(model, key):
    try:
        return read_message(model, key, IMAGES)
    except ValueError as error:
        if "`bits` hold no codeword" in str(error) or "no message" in str(error):
            return "none"
        raise


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
@pytest.mark.parametrize("taker", TAKERS)
def test_a_file_does_what_its_key_does(taker, kind, model, file):
    _, take = TAKERS[taker]
    assert take(model, kind(file)) == take(model, KEY)


@pytest.mark.parametrize("taker", TAKERS)
def test_a_missing_file_is_named_with_its_argument(taker, model, tmp_path):
    argument, take = TAKERS[taker]
    for kind in (FileNotFoundError, ValueError):
        with pytest.raises(
            kind, match=f"`{argument}` must name a readable key file, got '.*nowhere.gskey': No such file"
        ):
            take(model, tmp_path / "nowhere.gskey")


@pytest.mark.parametrize("taker", TAKERS)
def test_what_is_no_key_file_is_named_with_its_argument(taker, model, tmp_path):
    argument, take = TAKERS[taker]
    (tmp_path / "a.gskey").write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"`{argument}` must name a gradsigns key file"):
        take(model, tmp_path / "a.gskey")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [(None, "None"), (7, "int"), (KEY.reveal(), "dict"), (bytes(32), "bytes")],
    ids=["none", "7", "dict", "bytes"],
)
@pytest.mark.parametrize("taker", TAKERS)
def test_what_is_no_key_at_all_is_named_and_not_shown(taker, wrong, found, model):
    argument, take = TAKERS[taker]
    message = rf"^`{argument}` must be a WatermarkKey or the path of a key file \(\.gskey\), got {found}\.$"
    with pytest.raises(TypeError, match=message):
        take(model, wrong)


@pytest.mark.parametrize("use", [WatermarkKey.load, KEY.save], ids=["load", "save"])
def test_what_is_no_path_is_named(use):
    with pytest.raises(TypeError, match="`path` must be str or PathLike, got NoneType"):
        use(None)


def test_named_keys_give_named_results(model, file):
    other = WatermarkKey.generate("B", 64, input_shape=(3, 16, 16), target_class=2)
    results = verify_many(model, {"mine": file, 2: other}, IMAGES)
    assert {name: result.verdict for name, result in results.items()} == {"mine": "owned", 2: "not_proven"}


@pytest.mark.parametrize("keys", ["acme.gskey", b"acme", [], {}, 3, KEY])
def test_many_keys_are_many(keys, model):
    with pytest.raises(
        ValueError, match="`keys` must be a non-empty sequence of keys or key files, or a mapping"
    ):
        verify_many(model, keys, IMAGES)
