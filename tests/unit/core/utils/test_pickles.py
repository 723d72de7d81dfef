"""Untrusted pickles are walked, not loaded."""

import pickle
from collections import OrderedDict

import pytest

from gradsigns_lightning.core.utils.pickles import Outline, PickleWalk


def plain(outline: Outline):
    if outline.kind in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[outline.kind](plain(part) for part in outline.content)
    return (
        {key: plain(value) for key, value in outline.content.items()}
        if outline.kind == "dict"
        else outline.content
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        *(
            0,
            -1,
            255,
            65536,
            -(2**40),
            2**200,
            1.5,
            float("inf"),
            True,
            False,
            None,
            "",
            "text \u00e9",
            (),
            [],
            {},
            (1,),
            (1, 2, 3),
        ),
        *((1, 2, 3, 4), [1, [2, [3]]], {"a": {"b": [None, 1.0]}, 3: ()}, [[]] * 3, list(range(2000))),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_plain_values_are_outlined(value, protocol):
    assert plain(PickleWalk(pickle.dumps(value, protocol)).outline()) == value


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def doubled(times):
    value = [0]
    for _ in range(times):
        value = [value, value]
    return value


def circle():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (OrderedDict(a=1), "it names"),
        (print, "it names"),
        ({1, 2}, "EMPTY_SET|it names"),
        (bytearray(b"x"), "BYTEARRAY8|it names"),
        (1j, "it names"),
        ({2.5: 1}, "a key of a dictionary is neither text nor a small integer"),
        ({2**40: 1}, "a key of a dictionary"),
        ({(1,): 1}, "a key of a dictionary"),
        (nested(100), "nested too deep"),
        (doubled(40), "repeated too often"),
        (circle(), "changed after it was used|nested too deep"),
        (list(range(2**20)), "too long"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_everything_else_is_refused(value, reason):
    for protocol in (2, 5):
        with pytest.raises(ValueError, match=reason):
            PickleWalk(pickle.dumps(value, protocol)).outline()


@pytest.mark.parametrize("cut", range(1, 30))
def test_what_was_cut_off_is_refused(cut):
    whole = pickle.dumps({"a": [1, 2.5, ("x", None)]}, 2)
    with pytest.raises(ValueError, match=r"."):
        PickleWalk(whole[:-cut]).outline()


@pytest.mark.parametrize(
    "steps",
    [
        b"\x80\x02t.",
        b"\x80\x02(K\x01u.",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02h\x05.",
        b"\x80\x02.",
        b"\x80\x02K\x01K\x02R.",
        b"\x80\x02}(K\x01u.",
    ],
)
def test_steps_that_do_not_fit_are_damage(steps):
    with pytest.raises(ValueError, match=r"damaged|filled like"):
        PickleWalk(steps).outline()
