"""Which kind a response is read as, and which number comes out."""

import math

import numpy as np
import pytest
import torch

from gradsigns_lightning.verification.api.responses import ResponseParser

T = 2
NAN, INF = math.nan, math.inf


def read(rows, kind=None):
    """The kind and the log-odds of one response."""
    parser = ResponseParser(T, kind)
    log_odds = parser.log_odds(parser.array(rows, len(rows)))
    return parser.kind, log_odds


def log_odds(p):
    return math.log(p / (1 - p))


# --- kinds


PROBABILITIES = [[0.125, 0.25, 0.625], [0.5, 0.375, 0.125]]
KINDS = {
    "probabilities": (PROBABILITIES, "probabilities", [log_odds(0.625), log_odds(0.125)]),
    "their logarithms": (np.log(PROBABILITIES), "log_probabilities", [log_odds(0.625), log_odds(0.125)]),
    "logits": ([[0.0, 1.0, 3.0], [2.0, 2.0, -1.0]], "logits", [3 - math.log(1 + math.e), -3 - math.log(2)]),
    "negative logits": ([[-1.0, -0.5, -0.25]], "logits", [-0.25 - math.log(math.exp(-1) + math.exp(-0.5))]),
    "a logit above zero": (
        [[0.0025, -8.0, -9.0]],
        "logits",
        [-9 - math.log(math.exp(0.0025) + math.exp(-8))],
    ),
    "shares of a hundred": ([[10.0, 20.0, 70.0]], "logits", [50.0]),
    "labels": ([2, 0, 1, 2], "labels", [1, 0, 0, 1]),
    "one-hot": ([[0, 0, 1], [1, 0, 0]], "labels", [1, 0]),
    "two values": ([[-3.0, -3.0, 5.0], [5.0, -3.0, -3.0]], "labels", [1, 0]),
    "noise beyond [0, 1]": (
        [[-0.25, 0.375, 0.875], [0.25, 0.125, 0.625]],
        "probabilities",
        [log_odds(0.875), log_odds(0.625)],
    ),
    "the best class only": (
        [[NAN, NAN, 0.875], [0.75, NAN, NAN], [0.625, NAN, NAN]],
        "probabilities",
        [log_odds(0.875), NAN, NAN],
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_is_found_and_log_odds_come_out(name):
    rows, kind, expected = KINDS[name]
    found, log_odds = read(rows)
    assert found == kind
    np.testing.assert_allclose(log_odds, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("probabilities", log_odds(0.625)),
        ("logits", 0.625 - math.log(math.exp(0.125) + math.exp(0.25))),
        ("labels", 1.0),
    ],
)
def test_a_kind_that_is_given_is_not_found(kind, expected):
    found, log_odds = read(PROBABILITIES, kind)
    assert found == kind
    assert log_odds[0] == pytest.approx(expected)


@pytest.mark.parametrize("as_type", [torch.tensor, np.array, list])
def test_tensors_arrays_and_lists_are_the_same_answer(as_type):
    assert read(as_type(PROBABILITIES))[1].tolist() == read(PROBABILITIES)[1].tolist()


def test_the_first_answers_fix_the_kind():
    parser = ResponseParser(T)
    parser.log_odds(np.array(PROBABILITIES))
    parser.log_odds(np.array([[5.0, 6.0, -7.0]]))
    assert parser.kind == "probabilities"


def test_two_values_are_labels_until_a_third_shows_or_the_boundary_was_seen():
    hard, soft = np.array([[0.0, 0.0, 1.0]]), np.array(PROBABILITIES)
    confident, labels = ResponseParser(T), ResponseParser(T)
    for parser in (confident, labels):
        assert parser.log_odds(hard).tolist() == [1]
        assert parser.kind == "labels"
    labels.settle()
    assert confident.log_odds(soft).tolist() == pytest.approx([log_odds(0.625), log_odds(0.125)])
    assert labels.log_odds(soft).tolist() == [1, 0]
    assert (confident.kind, labels.kind) == ("probabilities", "labels")


def test_the_values_of_all_answers_are_counted_together():
    parser = ResponseParser(T)
    parser.log_odds(np.array([[NAN, NAN, 1.0]]))
    parser.log_odds(np.array([[NAN, NAN, 0.875], [0.75, NAN, NAN]]))
    assert parser.kind == "probabilities"


def test_answers_that_say_nothing_have_no_kind_and_no_number():
    parser = ResponseParser(T)
    assert np.isnan(parser.log_odds(parser.array([[NAN] * 3, [INF] * 3], 2))).all()
    assert parser.kind is None
    assert parser.log_odds(np.array(PROBABILITIES))[0] == pytest.approx(log_odds(0.625))


# --- rounding


@pytest.mark.parametrize(
    ("p", "resolution"),
    [(0.5, 1e-1), (0.25, 1e-2), (0.125, 1e-3), (0.0000123, 1e-6), (1 / 3, 1e-6), (1.0, 1.0)],
)
def test_the_resolution_is_that_of_the_probabilities_seen(p, resolution):
    parser = ResponseParser(T, "probabilities")
    parser.log_odds(np.array([[1 - p, 0, p]]))
    assert parser.resolution == pytest.approx(resolution)


def test_the_finest_probability_tells_the_resolution():
    parser = ResponseParser(T, "probabilities")
    for p in (0.25, 0.5):
        parser.log_odds(np.array([[1 - p, 0, p]]))
    assert parser.resolution == pytest.approx(1e-2)


def test_what_rounding_hides_is_half_a_step():
    _, found = read(
        [[0.26, 0.24, 0.5], [0.0, 0.0, 1.0], [0.75, 0.25, 0.0], [0.01, 0.0, 0.99]], "probabilities"
    )
    assert found.tolist() == pytest.approx([0, math.log(1 / 0.005), math.log(0.005), log_odds(0.99)])


# --- which class is predicted


def test_the_highest_score_names_the_class():
    parser = ResponseParser(T)
    values = np.array([[0.125, 0.25, 0.625], [0.5, 0.375, 0.125], [NAN, NAN, NAN], [0.5, NAN, NAN]])
    parser.log_odds(values)
    np.testing.assert_equal(parser.is_target(values), [1, 0, NAN, 0])


def test_a_label_names_the_class():
    parser = ResponseParser(T)
    values = parser.array([2, 1, NAN], 3)
    np.testing.assert_equal(parser.log_odds(values), [1, 0, NAN])
    np.testing.assert_equal(parser.is_target(values), [1, 0, NAN])


# --- form


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ([2, 1], PROBABILITIES, "must return labels throughout"),
        (PROBABILITIES, [2, 1], "must return scores throughout"),
        (PROBABILITIES, [[0.5, 0.5, 0.0, 0.0]] * 2, "must return 3 scores for each image throughout, got 4"),
    ],
)
def test_the_form_of_answers_must_not_change(first, then, message):
    parser = ResponseParser(T)
    parser.array(first, 2)
    with pytest.raises(ValueError, match=message):
        parser.array(then, 2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            PROBABILITIES[:1],
            r"scores of shape \(2, n_classes\) or labels of shape \(2,\).* got shape \(1, 3\)",
        ),
        (1.0, r"got shape \(\)"),
        ([[[0.5]]] * 2, r"got shape \(2, 1, 1\)"),
        ([[0.5, 0.5]] * 2, "a score for every class, of which 2 is one, got 2"),
        (["cat", "dog"], "must return an array of numbers, got list"),
    ],
)
def test_what_is_no_answer_is_named(answer, message):
    with pytest.raises(ValueError, match=message):
        ResponseParser(T).array(answer, 2)


def test_labels_are_no_scores_of_the_kind_that_was_given():
    with pytest.raises(ValueError, match="must return logits throughout"):
        ResponseParser(T, "logits").array([2, 1], 2)
