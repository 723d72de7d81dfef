"""Strength over training and the cadence with its back-off."""

import pytest

from gradsigns_lightning import Cadence, StrengthSchedule


def test_constant_without_warmup():
    assert [StrengthSchedule(2.0).at(epoch=e, steps_since_start=s) for e, s in ((0, 0), (9, 999))] == [2.0, 2.0]


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


def test_the_interval_doubles_up_to_the_limit_and_falls_back_at_once():
    cadence, intervals = Cadence(10, max_backoff=5), [10]
    for satisfied in (True, True, True, True, False, False, True):
        intervals.append(cadence.next_interval(intervals[-1], satisfied=satisfied))
    assert intervals == [10, 20, 40, 50, 50, 10, 10, 20]


@pytest.mark.parametrize(
    ("n_steps", "interval"),
    [(0, 1), (1, 1), (139, 1), (140, 2), (5599, 79), (5600, 80), (10**9, 80), (float("inf"), 80)],
)
def test_the_default_interval_gives_seventy_embedding_steps_and_an_interval_of_at_most_80(n_steps, interval):
    assert Cadence.for_training_of(n_steps) == Cadence(interval)


def test_a_backoff_of_one_never_backs_off():
    assert Cadence(3, max_backoff=1).next_interval(3, satisfied=True) == 3


@pytest.mark.parametrize("name", ["every_n_steps", "max_backoff"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_bad_cadences_are_named(name, value, error):
    with pytest.raises(error, match=f"`{name}` must be an integer"):
        Cadence(**{name: value})
