"""Keys that can never prove what they are made for are warned of when they are made."""

import re
import warnings

import pytest

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.core.key.checks import check_capacity
from gradsigns_lightning.core.key.payload import check_traceable, free_bits, out_of_reach
from gradsigns_lightning.core.key.reach import (
    USUAL_ALPHA,
    USUAL_CUSTOMERS,
    USUAL_GRINDING_BITS,
    least_bits,
    least_matches,
    what_is_out_of_reach,
)
from gradsigns_lightning.core.objective import make_objective
from gradsigns_lightning.core.statistics import ownership_p_value


def made(**settings):
    """Return the warnings when a key is made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        key = WatermarkKey.generate(
            "A",
            **{"n_bits": 64, "input_shape": (1, 16, 16), "target_class": 0, "secret": bytes(32), **settings},
        )
    assert {w.filename for w in caught} <= {__file__}
    return key, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("alpha", "tries"), [(1e-9, 0), (1e-9, 64), (1e-3, 0), (0.5, 0), (2.0**-20, 4), (1.0, 0)]
)
def test_so_many_bits_prove_and_one_less_does_not(alpha, tries):
    n_bits = least_bits(alpha=alpha, tries=tries)
    assert ownership_p_value(n_bits, n_bits) * 2.0**tries <= alpha
    assert n_bits == 0 or ownership_p_value(n_bits - 1, n_bits - 1) * 2.0**tries > alpha


@pytest.mark.parametrize("n_bits", [8, 24, 29])
def test_a_key_that_can_never_be_owned_is_warned_of_in_one_sentence(n_bits):
    _, (message,) = made(n_bits=n_bits)
    assert message.startswith(f"A key of {n_bits} bits can never be `owned` at the default alpha of 1e-09")
    assert "30 bits would do" in message


@pytest.mark.parametrize("n_bits", [30, 32, 128])
def test_a_key_that_can_be_owned_is_made_in_silence(n_bits):
    assert made(n_bits=n_bits)[1] == []


def test_rebuilding_a_short_key_does_not_nag(tmp_path):
    key, _ = made(n_bits=24)
    key.save(tmp_path / "a.gskey")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WatermarkKey.load(tmp_path / "a.gskey")
        key.with_payload(b"a")


@pytest.mark.parametrize(
    ("n_bits", "payload", "says"),
    [
        (32, None, ["94 bits would do", "44 bits would do"]),
        (44, None, ["94 bits would do"]),
        (93, None, ["94 bits would do"]),
        (94, None, []),
        (94, b"ab", ["2^64 keys tried and 16 bits of free choice, 110 bits would do"]),
        (110, b"ab", []),
    ],
)
def test_what_no_judge_finds_and_no_trace_tells(n_bits, payload, says):
    key, _ = made(n_bits=n_bits, payload=payload)
    text = out_of_reach(key)
    assert text.count("would do") == len(says)
    assert all(part in text for part in says)
    judged = ownership_p_value(n_bits, n_bits) * 2.0 ** (USUAL_GRINDING_BITS + free_bits(key)) <= USUAL_ALPHA
    assert ("judge" in text) is not judged


def test_the_bits_that_a_trace_takes_are_those_that_it_asks_for():
    check_traceable(44, n_customers=USUAL_CUSTOMERS, alpha=USUAL_ALPHA)
    with pytest.raises(ValueError, match="at least 44 bits"):
        check_traceable(43, n_customers=USUAL_CUSTOMERS, alpha=USUAL_ALPHA)
    assert "44 bits" in what_is_out_of_reach(43, free_bits=0, is_master=True)


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (48, 64, 3), (224, 224, 4)])
def test_channels_last_are_warned_of(shape):
    _, (message,) = made(input_shape=shape, n_bits=32)
    assert str(shape) in message
    assert str((shape[2], *shape[:2])) in message


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 32, 32), (3, 4, 64), (4, 4, 4), (12, 5000, 1), (1, 16, 8), (64, 8, 8)]
)
def test_other_shapes_are_not(shape):
    assert made(input_shape=shape, n_bits=32)[1] == []


@pytest.mark.parametrize(
    ("n_bits", "n_carriers", "size", "advice"),
    [
        (32, 16, 64, "Take at least 64 carriers"),
        (32, 16, 63, "Take 30 to 31 bits"),
        (128, 64, 64, "Take 30 to 32 bits"),
        (31, 30, 36, "Take 30 bits, on all of the input's 36 coordinates"),
        (32, 16, 31, "sign larger inputs, or the output of a layer"),
        (32, 16, 16, "sign larger inputs, or the output of a layer"),
    ],
)
def test_advice_leads_to_no_key_that_can_never_be_owned_or_embedded(n_bits, n_carriers, size, advice):
    with pytest.raises(ValueError, match=advice):
        check_capacity(n_bits, n_carriers, (1, 1, size))
    if found := re.search(r"at least (\d+) carriers", advice):
        make_objective("margin", made(n_bits=n_bits, n_carriers=int(found[1]), input_shape=(1, 1, size))[0])
    if found := re.search(r"Take 30(?: to (\d+))? bits", advice):
        n_bits = int(found[1] or 30)
        assert n_bits >= least_bits()
        key, warned = made(n_bits=n_bits, input_shape=(1, 1, size))
        make_objective("margin", key).check_key(key)
        assert warned == []


@pytest.mark.parametrize(("n_bits", "n_carriers"), [(63, 64), (64, 64), (64, 65)])
def test_a_key_that_cannot_be_embedded_is_warned_of_when_it_is_made(n_bits, n_carriers):
    key, (message,) = made(n_bits=n_bits, n_carriers=n_carriers)
    assert f"{n_bits} bits on {n_carriers} carriers leave no room" in message
    advice = f"Take at least {2 * n_bits} carriers (six per bit are usual; the input has 256 coordinates)."
    assert message.endswith(advice)
    with pytest.raises(ValueError, match=re.escape(advice)):
        make_objective("margin", key).check_key(key)


@pytest.mark.parametrize(("n_bits", "n_carriers"), [(62, 64), (64, 66)])
def test_a_key_with_a_little_room_is_made_in_silence(n_bits, n_carriers):
    key, warned = made(n_bits=n_bits, n_carriers=n_carriers)
    make_objective("margin", key).check_key(key)
    assert warned == []


@pytest.mark.parametrize("n_bits", [8, 30, 32, 64, 128])
def test_the_least_matches_are_the_least(n_bits):
    least = least_matches(n_bits)
    if n_bits < least_bits():
        assert least == n_bits
    else:
        assert ownership_p_value(least, n_bits) <= 1e-9 < ownership_p_value(least - 1, n_bits)
