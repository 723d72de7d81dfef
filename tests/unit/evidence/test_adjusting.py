"""P-values and verdicts after the charges for everything that could be tried; no model is read here."""

import math
import re

import numpy as np
import pytest

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.core.key.signature_key import KeyAsRead
from gradsigns_lightning.core.result import VerificationResult
from gradsigns_lightning.evidence import Statement
from gradsigns_lightning.evidence.adjusting import Charges, adjust
from gradsigns_lightning.evidence.dating import Dating
from gradsigns_lightning.evidence.reading import Readings

KEY = WatermarkKey.generate("Acme", 64, input_shape=(1, 20, 20), target_class=0, secret=bytes(32))
ALPHA, FREE = 1e-9, Charges(n_commitments=1, payload_bits=0.0, grinding_bits=0.0)
DATED, UNDATED, LATER = (
    Dating(None, precedes_suspect=True),
    Dating(None, None),
    Dating(None, precedes_suspect=False),
)


def result(n_matches=64, *, alpha=ALPHA, recognised=1.0, silent=False) -> VerificationResult:
    signed = np.where(np.arange(KEY.n_bits) < n_matches, 1.0, -1.0) * (not silent)
    return VerificationResult.of(signed, KEY, n_queries=50, alpha=alpha, recognised=recognised)


def readings(suspect=None, *, transcript=None, as_announced=True, **controls) -> Readings:
    key = KeyAsRead.of(KEY, input_mean=0.25, input_std=0.5)
    return Readings(key, suspect, transcript, as_announced, controls)


OTHER = result(35, alpha=1e-3)


@pytest.mark.parametrize(
    ("read", "charges", "dating", "verdict", "objections", "remarks"),
    [
        (readings(result(), other=OTHER), FREE, DATED, "owned", [], []),
        (readings(result(), other=OTHER), FREE, UNDATED, "not_proven", ["no trusted time-stamp"], []),
        (readings(result(), other=OTHER), FREE, LATER, "not_proven", ["not known to be older"], []),
        # 2^-64 is what 2^64 tries find
        (readings(result(), other=OTHER), Charges(1, 0, 64), DATED, "not_proven", [], []),
        (readings(result(), other=OTHER), Charges(1, 34, 0), DATED, "owned", [], []),
        (readings(result(), other=OTHER), Charges(1, 35, 0), DATED, "not_proven", [], []),
        (
            readings(result(), same=result(alpha=1e-3)),
            FREE,
            DATED,
            "not_proven",
            ["'same' shows the signature too"],
            [],
        ),
        (readings(result()), FREE, DATED, "owned", [], ["no control model of the same task"]),
        (
            readings(result(), mute=result(silent=True)),
            FREE,
            DATED,
            "owned",
            [],
            ["'mute' gives no usable answers", "no control model"],
        ),
        (
            readings(result(silent=True), other=OTHER),
            FREE,
            LATER,
            "inconclusive",
            ["not known to be older"],
            [],
        ),
        (
            readings(result(recognised=0.4), other=OTHER),
            FREE,
            DATED,
            "inconclusive",
            [],
            [r"\(0.25,\), \(0.5,\)"],
        ),
        (readings(transcript=result()), FREE, DATED, "claimed", [], ["what the claimant says"]),
        (
            readings(transcript=result(), as_announced=False),
            FREE,
            DATED,
            "claimed",
            [],
            ["claimant says", "not read as"],
        ),
    ],
)
def test_verdict_and_words_follow_from_readings_charges_and_date(
    read, charges, dating, verdict, objections, remarks
):
    finding = adjust(read, charges, dating, alpha=ALPHA)
    assert finding.verdict == verdict
    for said, expected in ((finding.objections, objections), (finding.remarks, remarks)):
        assert len(said) == len(expected)
        assert all(re.search(part, words) for part, words in zip(expected, said, strict=True))


def test_as_many_secrets_are_charged_as_could_be_opened_at_least():
    statement = Statement(tuple(f"{i % 8:064x}" for i in range(16)), "0" * 64)  # each digest twice
    assert Charges.of(statement, KEY, 0) == Charges(8, 0.0, 3.0)
    assert Charges.of(statement, KEY.with_payload(b"ab"), 64) == Charges(8, 16.0, 64.0)


@pytest.mark.parametrize(
    ("charges", "alpha"), [(FREE, 1.0), (FREE, 1e-9), (Charges(1, 16, 64), 1e-9), (Charges(1, 900, 0), 1e-9)]
)
def test_what_is_read_at_the_level_left_is_significant_when_charged(charges, alpha):
    assert charges.adjusted(math.log10(charges.alpha_left(alpha))) == pytest.approx(
        math.log10(alpha), abs=1e-9
    )


def test_the_level_left_is_one_that_a_float_can_hold():
    assert Charges(1, 0, 10**4).alpha_left(1e-9) == 1e-290


def test_charges_make_no_p_value_larger_than_one_and_none_of_what_is_none():
    charges = Charges(1, 0, 10)
    assert (charges.adjusted(-1.0), charges.adjusted(-5.0)) == (0.0, pytest.approx(-5 + 10 * math.log10(2)))
    assert math.isnan(charges.adjusted(math.nan))
