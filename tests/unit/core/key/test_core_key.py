"""The key: what it accepts, what it derives, what it never reveals."""

import copy
import dataclasses
import logging
import math
import pickle
import traceback
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from scipy import stats

from gradsigns_lightning import WatermarkKey

SHAPE = (1, 6, 6)
SECRET = bytes(range(1, 33))
ARGUMENTS = {
    "owner": "Acme",
    "n_bits": 12,
    "input_shape": SHAPE,
    "target_class": 1,
    "n_carriers": 30,
    "scope": "m1",
    "secret": SECRET,
}


def make(**changes) -> WatermarkKey:
    return WatermarkKey.generate(**{**ARGUMENTS, **changes})


def numbered(i: int, **changes) -> WatermarkKey:
    return make(secret=i.to_bytes(32, "big"), **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"owner": ""}, ValueError, "`owner` must be NFC-normalized text of 1 to 256 characters, got 0"),
        ({"owner": "x" * 257}, ValueError, "`owner`.*got 257"),
        ({"owner": "Mu\u0308ller"}, ValueError, "`owner` must be NFC-normalized"),
        ({"owner": b"Acme"}, TypeError, "`owner` must be str, got bytes"),
        ({"scope": "x" * 257}, ValueError, "`scope`.*0 to 256 characters, got 257"),
        ({"scope": None}, TypeError, "`scope` must be str, got NoneType"),
        ({"n_bits": 7}, ValueError, r"`n_bits` must be an integer in \[8, 8192\], got 7"),
        (
            {"n_bits": 8193, "input_shape": (1, 100, 100), "n_carriers": 9000},
            ValueError,
            r"`n_bits`.*\[8, "
            r"8192\], got 8193",
        ),
        ({"n_bits": 12.0}, TypeError, "`n_bits` must be an integer, got 12.0 of type float"),
        ({"n_bits": True}, TypeError, "`n_bits` must be an integer, got True of type bool"),
        ({"target_class": -1}, ValueError, r"`target_class` must be an integer in \[0, 2147483647\], got -1"),
        (
            {"target_class": 2**31},
            ValueError,
            r"`target_class` must be an integer in \[0, 2147483647\], got "
            r"2147483648",
        ),
        ({"target_class": 2**70}, ValueError, "`target_class`"),
        ({"target_class": "1"}, TypeError, "`target_class` must be an integer"),
        ({"input_shape": (6, 6)}, ValueError, r"`input_shape` must be three integers.*got \(6, 6\)"),
        ({"input_shape": "166"}, ValueError, "`input_shape` must be three integers"),
        ({"input_shape": 36}, ValueError, "`input_shape` must be three integers"),
        ({"input_shape": (1, 0, 6)}, ValueError, "`input_shape` must be an integer >= 1, got 0"),
        ({"input_shape": (1, 6.0, 6)}, TypeError, "`input_shape` must be an integer"),
        ({"n_carriers": 0}, ValueError, "`n_carriers` must be an integer >= 1, got 0"),
        (
            {"n_carriers": 37},
            ValueError,
            r"`n_carriers` must be at most 1 \* 6 \* 6 = 36 \(one per input "
            r"coordinate\), got 37",
        ),
        ({"n_carriers": 30.0}, TypeError, "`n_carriers` must be an integer"),
        ({"payload": b"ab"}, ValueError, "`payload` must have at most n_bits // 8 = 1 bytes, got 2 bytes"),
        ({"payload": "\N{EURO SIGN}"}, ValueError, "`payload`.*got 3 bytes"),
        ({"payload": 7}, TypeError, "`payload` must be bytes or str or None, got int"),
        ({"input_mean": math.nan}, ValueError, "`input_mean` must be a finite number"),
        ({"input_mean": 10**400}, ValueError, "`input_mean` must be a finite number"),
        (
            {"input_mean": [0.0, 0.0]},
            ValueError,
            r"`input_mean` must be one value or one per channel \(1\), "
            r"got 2 values",
        ),
        ({"input_mean": []}, ValueError, "`input_mean`.*got 0 values"),
        ({"input_mean": "0"}, TypeError, "`input_mean` must be a number, got '0' of type str"),
        ({"input_std": 0.0}, ValueError, "`input_std` must be positive, got 0.0"),
        ({"input_std": -1}, ValueError, "`input_std` must be positive, got -1.0"),
        ({"input_std": math.inf}, ValueError, "`input_std` must be a finite number"),
        ({"input_std": False}, TypeError, "`input_std` must be a number"),
        ({"secret": bytes(31)}, ValueError, "must be 32 bytes, or 64 for a copy's key, got 31 bytes"),
        (
            {"secret": bytes(64)},
            ValueError,
            "`secret` of a key of purpose 'owner' must be 32 bytes, got 64 bytes",
        ),
        ({"secret": "0" * 32}, TypeError, "`secret` must be bytes or None, got str"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"owner": "x" * 256, "scope": "y" * 256},
        {"n_bits": 8},
        {"n_bits": 30},  # as many bits as carriers
        {"n_carriers": 36},
        {"target_class": 0},
        {"target_class": 2**31 - 1},
        {"payload": b"a"},
        {"payload": b""},
        {"input_mean": 0, "input_std": 255},
        {"input_shape": [3, 2, 6], "input_mean": [0.1, 0.2, 0.3], "input_std": 0.5},
        {"input_shape": torch.Size(SHAPE)},
    ],
)
def test_bounds_are_inclusive(changes):
    assert isinstance(make(**changes).commitment, str)


def test_the_longest_signature_is_accepted():
    key = make(n_bits=8192, input_shape=(1, 91, 91), n_carriers=None)
    assert key.n_carriers == 91 * 91
    assert key.signature.shape == (8192,)


def test_too_many_bits_are_refused_with_the_arithmetic():
    with pytest.raises(
        ValueError,
        match=r"31 sign conditions on 30 carriers.*30 - 31 = -1 degrees of freedom.*Take 30 bits, on all of "
        r"the input's 36",
    ):
        make(n_bits=31)


@pytest.mark.parametrize(("n_bits", "n_carriers"), [(8, 36), (12, 36)])
def test_six_carriers_a_bit_or_all_by_default(n_bits, n_carriers):
    assert make(n_bits=n_bits, n_carriers=None).n_carriers == n_carriers
    assert make(n_bits=n_bits, n_carriers=None, input_shape=(3, 32, 32)).n_carriers == 6 * n_bits


def test_types_shapes_and_values_of_the_parts():
    key = make()
    assert (key.carriers.dtype, key.carriers.shape) == (torch.int64, (30,))
    assert (key.projection.dtype, key.projection.shape) == (torch.int8, (12, 30))
    assert (key.signature.dtype, key.signature.shape) == (torch.uint8, (12,))
    assert set(key.projection.unique().tolist()) == {-1, 1}
    assert set(key.signature.unique().tolist()) == {0, 1}


def test_parts_first_derived_in_inference_mode_can_be_trained_with():
    key = make()
    with torch.inference_mode():
        parts = key.carriers, key.projection, key.signature
    assert not any(part.is_inference() for part in parts)


def test_a_payload_is_masked_by_the_keystream_and_unmasks():
    plain, marked = make(n_bits=20), make(n_bits=20, payload=b"\x05\x80")
    difference = (plain.signature ^ marked.signature).numpy()
    assert np.packbits(difference[:16], bitorder="little").tobytes() == b"\x05\x80"
    assert not difference[16:].any()
    assert torch.equal(plain.projection, marked.projection)


def test_a_text_payload_is_utf_8():
    assert make(n_bits=16, payload="\u00e9") == make(n_bits=16, payload=b"\xc3\xa9")


def test_payload_shorter_than_the_signature_is_padded_but_committed_to():
    assert torch.equal(make(n_bits=16, payload=b"a").signature, make(n_bits=16, payload=b"a\0").signature)
    assert make(n_bits=16, payload=b"a").commitment != make(n_bits=16, payload=b"a\0").commitment


@pytest.mark.parametrize(
    "changes",
    [
        {"owner": "Acme2"},
        {"scope": "m2"},
        {"scope": ""},
        {"input_shape": (1, 4, 9)},
        {"n_bits": 13},
        {"n_carriers": 31},
        {"target_class": 2},
        {"input_mean": 0.5},
        {"input_std": 0.5},
    ],
    ids=str,
)
def test_every_part_changes_with_every_bound_parameter(changes):
    before, after = make(), make(**changes)
    assert before.carriers.tolist() != after.carriers.tolist()
    n, c = min(before.n_bits, after.n_bits), min(before.n_carriers, after.n_carriers)
    assert not torch.equal(before.projection.flatten()[: n * c], after.projection.flatten()[: n * c])
    assert not torch.equal(before.signature[:n], after.signature[:n])
    assert before.commitment != after.commitment


@pytest.mark.parametrize(
    "changes",
    [{"payload": b"a"}, {"input_mean": 0.5}, {"input_std": 0.5}, {"secret": bytes(32)}, {"owner": "acme"}],
    ids=str,
)
def test_the_commitment_changes_with_everything(changes):
    assert make().commitment != make(**changes).commitment


def test_owner_and_scope_do_not_run_into_each_other():
    assert make(owner="ab", scope="c").commitment != make(owner="a", scope="bc").commitment


def test_fresh_keys_differ():
    assert make(secret=None).commitment != make(secret=None).commitment


def test_carriers_are_distinct_ascending_and_in_range():
    for i in range(50):
        carriers = numbered(i).carriers
        assert bool((carriers[1:] > carriers[:-1]).all())
        assert int(carriers[0]) >= 0
        assert int(carriers[-1]) < 36


def test_carriers_are_uniform_over_the_input():
    keys = [numbered(i, n_carriers=12, n_bits=8) for i in range(1500)]
    counts = np.bincount(torch.cat([k.carriers for k in keys]).numpy(), minlength=36)

    # drawing without replacement makes the variance smaller by 24 / 35 than that of independent draws
    def p_value(counts):
        return stats.chi2(35).sf(((counts - 500) ** 2 / 500).sum() / (24 / 35))

    assert p_value(counts) > 1e-3
    assert p_value(counts + np.where(np.arange(36) < 18, 25, -25)) < 1e-3  # it would detect a bias of 5 %


def test_projection_and_signature_are_balanced():
    keys = [numbered(i) for i in range(400)]
    entries = torch.stack([k.projection for k in keys])
    n = entries.numel()
    assert stats.binomtest(int((entries > 0).sum()), n).pvalue > 1e-3
    columns = (entries > 0).sum((0, 1)).numpy()
    assert stats.chisquare(columns, np.full(30, columns.sum() / 30)).pvalue > 1e-3
    neighbours = entries[:, :, 1:] == entries[:, :, :-1]
    assert stats.binomtest(int(neighbours.sum()), neighbours.numel()).pvalue > 1e-3
    bits = torch.stack([k.signature for k in keys]).sum(0).numpy()
    assert all(stats.binomtest(int(b), 400).pvalue > 1e-4 for b in bits)


def test_equality_and_hash_follow_the_content():
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != make(payload=b"a")
    assert len({make(), make(), make(target_class=2)}) == 2


def test_equal_keys_have_equal_commitments_whatever_the_sign_of_zero():
    assert make(input_mean=-0.0).commitment == make(input_mean=0.0).commitment


def test_keys_cannot_be_edited():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().owner = "Mallory"


def derived(**changes) -> WatermarkKey:
    key = make(**changes)
    key.carriers, key.projection, key.signature, key.commitment  # noqa: B018
    return key


def customer_of(master):
    return master.derive("customer", b"\7\0")


def message_of(master):
    return master.derive("message", b"a")


@pytest.mark.parametrize("make_key", [make, derived])
@pytest.mark.parametrize("copy_of", [lambda key: key.with_payload(b"a"), customer_of, message_of])
def test_keys_survive_copying_and_the_way_to_another_process(make_key, copy_of):
    key = copy_of(make_key(n_bits=16))
    sent = pickle.loads(ForkingPickler.dumps(key))
    for twin in (sent, copy.deepcopy(key), copy.copy(key), copy.deepcopy([key])[0]):
        assert twin == key
        assert twin.commitment == key.commitment
        assert torch.equal(twin.projection, key.projection)


@pytest.mark.parametrize("make_key", [make, derived])
@pytest.mark.parametrize(
    "wrap", [lambda key: key, lambda key: {"hyper_parameters": {"key": key}}, dataclasses.asdict, vars]
)
def test_no_pickle_holds_the_secret(make_key, wrap, tmp_path):
    key = make_key(payload=b"\xfe")
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(wrap(key))
    with pytest.raises(TypeError, match="cannot be pickled"):
        torch.save(wrap(key), tmp_path / "file.pt")
    assert not any(SECRET in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.parametrize("copy_of", [customer_of, message_of])
def test_neither_a_copys_secret_nor_its_masters_is_printed_or_pickled(copy_of, tmp_path):
    key = copy_of(derived(n_bits=16))
    key.signature, key.commitment, key.claim("0" * 64)
    assert SECRET.hex() not in str(key.reveal())
    for text in (
        repr(key),
        str(vars(key._secret)) if hasattr(key._secret, "__dict__") else "",
        str(key.to_public_dict()),
    ):
        assert not tells(text, key)
    secret = key._secret.reveal()
    for half in (secret[:32], secret[32:], SECRET):
        assert not any(text in str(vars(key)) for text in (half.hex(), repr(half)[2:-1]))
    with pytest.raises(TypeError, match="cannot be pickled"):
        torch.save({"key": key}, tmp_path / "file.pt")


@pytest.mark.parametrize("copy_of", [customer_of, message_of])
def test_copies_share_carriers_and_projection_without_deriving_them_again(copy_of):
    master = derived(n_bits=16)
    key = copy_of(master)
    assert (key.carriers is master.carriers, key.projection is master.projection) == (True, True)
    alone = WatermarkKey.from_parts(**{**key.reveal(), "payload": key._payload, "secret": key._secret})
    assert torch.equal(alone.carriers, master.carriers)
    assert torch.equal(alone.projection, master.projection)
    assert torch.equal(alone.signature, key.signature)


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        (
            lambda: make().derive("owner", b""),
            ValueError,
            r"`purpose` must be one of \['customer', "
            r"'message'\], got 'owner'",
        ),
        (
            lambda: make().derive("customer", b"\7"),
            ValueError,
            "`payload` of a customer's key must have 2 bytes, got 1",
        ),
        (
            lambda: make().derive("customer", bytes(3)),
            ValueError,
            "`payload` must have at most n_bits // 8 = 1 bytes, got 3",
        ),
        (
            lambda: make().derive("message", bytes(2)),
            ValueError,
            "`payload` must have at most n_bits // 8 = 1 bytes, got 2",
        ),
        (lambda: make().derive("message", "a"), TypeError, "`payload` must be bytes, got str"),
        (
            lambda: message_of(customer_of(make(n_bits=16))),
            ValueError,
            "can be derived only from an owner's key .* purpose 'customer'",
        ),
        (
            lambda: message_of(make()).customer_signatures(2),
            ValueError,
            "can be derived only from an owner's key .* purpose 'message'",
        ),
        (
            lambda: customer_of(make(n_bits=16)).with_payload(b"a"),
            ValueError,
            "`payload` can be replaced only in owners' keys",
        ),
    ],
)
def test_what_no_copys_key_follows_from_is_named(fail, error, message):
    with pytest.raises(error, match=message):
        fail()


@pytest.mark.parametrize(
    ("changes", "n_bytes", "allowed"),
    [
        ({}, 64, 32),
        ({"purpose": "customer"}, 32, 64),
        ({"purpose": "message"}, 32, 64),
        ({"version": None, "purpose": None}, 64, 32),
    ],
)
def test_keys_with_a_secret_of_the_wrong_length_are_refused(changes, n_bytes, allowed):
    public = {
        name: value
        for name, value in {**make(n_bits=16).to_public_dict(), **changes}.items()
        if value is not None
    }
    payload = bytes(2) if public.get("purpose") == "customer" else b""
    assert (
        len(WatermarkKey.from_parts(public, payload=payload, secret=bytes(allowed))._secret.reveal())
        == allowed
    )
    with pytest.raises(ValueError, match=f"`secret` .* must be {allowed} bytes, got {n_bytes} bytes"):
        WatermarkKey.from_parts(public, payload=payload, secret=bytes(n_bytes))
    for never in (0, 33, 48, 96):
        with pytest.raises(
            ValueError, match=f"`secret` must be 32 bytes, or 64 for a copy's key, got {never} bytes"
        ):
            WatermarkKey.from_parts(public, payload=payload, secret=bytes(never))


def test_public_parameters_are_json_and_without_secrets():
    public = make(payload=b"\xabcd"[:1]).to_public_dict()
    assert public == {
        "owner": "Acme",
        "scope": "m1",
        "n_bits": 12,
        "n_carriers": 30,
        "input_shape": [1, 6, 6],
        "target_class": 1,
        "input_mean": [0.0],
        "input_std": [1.0],
        "version": 2,
        "purpose": "owner",
    }


def tells(text: str, key: WatermarkKey) -> bool:
    secret = key._secret.reveal()
    secrets = (
        secret.hex(),
        repr(secret)[2:-1],
        repr(list(secret))[1:-1],
        key._payload.hex(),
        repr(key._payload),
    )
    return any(s in text for s in secrets) or str(key.carriers.tolist()) in text


def test_the_leak_check_can_fail():
    key = make(payload=b"\xfe")
    assert tells(str(vars(key)), key)  # the payload, not the secret
    assert tells(f"{key._secret.reveal()!r}", key)
    assert tells(key._secret.reveal().hex(), key)


def test_nothing_that_prints_a_key_tells_the_secret(caplog):
    key = make(payload=b"\xfe")
    key.carriers, key.projection, key.signature  # noqa: B018
    caplog.set_level(logging.DEBUG)
    logging.getLogger().debug("%s %r", key, [key])
    texts = [
        repr(key),
        str(key),
        f"{key}",
        f"{key!r:>400}",
        str([key]),
        repr({"key": key}),
        caplog.text,
        str(key.to_public_dict()),
        str(vars(make())),
        str(dataclasses.asdict(make())),
        str(vars(make()._secret)) if hasattr(make()._secret, "__dict__") else "",
    ]
    assert not any(tells(text, key) for text in texts)
    assert key.commitment[:12] in repr(key)
    assert "Acme" in repr(key)


@pytest.mark.parametrize(
    "changes",
    [{"n_bits": 7}, {"n_carriers": 99}, {"input_std": 0.0}, {"owner": ""}, {"payload": b"\xfe\xfd\xfc"}],
)
def test_errors_do_not_tell_the_secret(changes):
    key = make(payload=b"\xfe")
    with pytest.raises(ValueError, match="`") as caught:
        make(**{"payload": b"\xfe", **changes})
    assert not tells("".join(traceback.format_exception(caught.value)).split("Error: ")[-1], key)


def test_a_wrong_secret_is_not_repeated_in_the_error():
    with pytest.raises(
        ValueError, match=r"`secret` must be 32 bytes, or 64 for a copy's key, got 33 bytes\.$"
    ):
        make(secret=b"\xfe" * 33)


def test_no_variable_in_the_traceback_of_a_failed_save_or_load_shows_the_secret(tmp_path):
    key = make()
    key.save(tmp_path / "there")
    damaged = tmp_path / "damaged"
    damaged.write_bytes((tmp_path / "there").read_bytes().replace(b"Acme", b"Emca"))
    for fail in (
        lambda: key.save(tmp_path / "there"),
        lambda: key.save(tmp_path / "no folder" / "key"),
        lambda: WatermarkKey.load(damaged),
    ):
        with pytest.raises(ValueError, match="`path`") as caught:
            fail()
        shown = "".join(
            traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
        )
        assert not any(text in shown for text in (SECRET.hex(), repr(SECRET)[2:-1], str(list(SECRET))[1:-1]))
