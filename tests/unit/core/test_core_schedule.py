"""Strength over training and the cadence with its back-off."""

import dataclasses

import pytest

from gradsigns_lightning import Cadence, StrengthSchedule


def test_constant_without_warmup():
    assert [StrengthSchedule(2.0).at(epoch=e, steps_since_start=s) for e, s in ((0, 0), (9, 999))] == [
        2.0,
        2.0,
    ]


def test_linear_warmup_by_hand():
    schedule = StrengthSchedule(2.0, warmup_steps=3)
    assert [schedule.at(epoch=0, steps_since_start=s) for s in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_nothing_before_the_start_epoch():
    schedule = StrengthSchedule(2.0, start_epoch=3)
    assert [schedule.at(epoch=e, steps_since_start=0) for e in range(5)] == [0, 0, 0, 2, 2]


def test_zero_strength_is_zero_everywhere():
    assert StrengthSchedule(0, warmup_steps=5).at(epoch=0, steps_since_start=2) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": -0.1}, ValueError, "`strength` must be a finite number >= 0, got -0.1"),
        ({"strength": float("inf")}, ValueError, "`strength`"),
        ({"strength": "1"}, TypeError, "`strength` must be a number, got '1' of type str"),
        ({"strength": True}, TypeError, "`strength`"),
        ({"warmup_steps": -1}, ValueError, "`warmup_steps` must be an integer >= 0"),
        ({"warmup_steps": 1.5}, TypeError, "`warmup_steps`"),
        ({"start_epoch": -1}, ValueError, "`start_epoch`"),
    ],
)
def test_bad_schedules_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        StrengthSchedule(**arguments)


def factors(cadence, *found):
    """Return the interval's factor after each embedding step, from its findings."""
    kinds = {
        "missing": {"missing": True, "safe": False, "satisfied": False},
        "held": {"missing": False, "safe": False, "satisfied": False},
        "safe": {"missing": False, "safe": True, "satisfied": False},
        "satisfied": {"missing": False, "safe": True, "satisfied": True},
    }
    factor, all_ = 1.0, []
    for kind in found:
        factor = cadence.next_factor(factor, **kinds[kind])
        all_.append(factor)
    return all_


def test_the_interval_doubles_up_to_the_limit_and_falls_back_at_once():
    cadence = Cadence(10, max_backoff=5)
    assert factors(cadence, *["satisfied"] * 4, "held", "held", "satisfied") == [2, 4, 5, 5, 1, 1, 2]


def test_the_interval_halves_while_bits_are_missing_and_grows_again_when_all_are_safe():
    cadence = Cadence(10, max_hurry=4)
    assert factors(cadence, *["missing"] * 3, "held", "safe", "safe", "safe") == [
        0.5,
        0.25,
        0.25,
        0.25,
        0.5,
        1,
        1,
    ]
    assert factors(cadence, "satisfied", "satisfied", "missing") == [2, 4, 0.5]


def test_a_backoff_and_a_hurry_of_one_change_nothing():
    assert factors(Cadence(3, max_backoff=1), "satisfied", "missing", "safe") == [1, 1, 1]


def test_a_fixed_interval_by_hand():
    assert [
        Cadence(20).interval(steps, factor) for steps, factor in ((0, 1.0), (5000, 1.0), (0, 4.0), (0, 0.25))
    ] == [
        20,
        20,
        80,
        5,
    ]


def test_two_steps_apart_at_least_unless_every_one_is_asked_for():
    assert Cadence(80).interval(0, 0.001) == 2
    assert Cadence(1).interval(0, 1.0) == 1
    assert Cadence(2, max_hurry=8).interval(0, 0.125) == 2


def test_the_default_interval_grows_with_the_steps_so_far():
    cadence = Cadence.following()
    assert [cadence.interval(steps, 1.0) for steps in (0, 10, 100, 500, 1000, 10**6)] == [2, 2, 8, 40, 80, 80]
    assert [cadence.interval(steps, 0.125) for steps in (100, 1000)] == [2, 10]
    # nor by backing off
    assert [cadence.interval(steps, 4.0) for steps in (100, 1000, 2000, 10**6)] == [8, 80, 160, 320]


@pytest.mark.parametrize(
    ("growth", "error"), [(0, ValueError), (1.5, ValueError), (-1, ValueError), ("1", TypeError)]
)
def test_bad_growths_are_named(growth, error):
    with pytest.raises(error, match="`growth` must be"):
        Cadence(growth=growth)


@pytest.mark.parametrize("name", ["every_n_steps", "max_backoff", "max_hurry"])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_bad_cadences_are_named(name, value, error):
    with pytest.raises(error, match=f"`{name}` must be an integer"):
        Cadence(**{name: value})


def steps_of(cadence, outcomes):
    """Return the steps that embed if each has these findings."""
    steps = [0]
    for factor in factors(cadence, *outcomes):
        steps.append(steps[-1] + cadence.interval(steps[-1], factor))
    return steps


@pytest.mark.parametrize("cadence", [Cadence.following(), Cadence(80, max_hurry=8)])
@pytest.mark.parametrize(
    "other",
    [
        {"every_n_steps": 40},
        {"max_backoff": 1},
        {"max_backoff": 2},
        {"max_backoff": 8},
        {"max_hurry": 2},
        {"growth": 0.04},
    ],
)
def test_no_number_of_a_cadence_is_ignored(cadence, other):
    outcomes = ["missing"] * 30 + ["satisfied"] * 100
    assert steps_of(cadence, outcomes) != steps_of(dataclasses.replace(cadence, **other), outcomes)
