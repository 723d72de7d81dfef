"""What a reading's table says."""

import pytest

from gradsigns_lightning import ApiVerificationResult, VerificationResult
from gradsigns_lightning.cli.strip import _note as strip_note
from gradsigns_lightning.cli.tables import as_sentence, verification_rows

READ = {
    **{
        "n_bits": 63,
        "n_matches": 54,
        "n_erasures": 7,
        "bit_error_rate": 2 / 56,
        "p_value": 3.7e-14,
        "log10_p_value": -13.4,
    },
    **{
        "margin": -0.5,
        "n_queries": 67,
        "alpha": 1e-9,
        "verdict": "owned",
        "commitment": "",
        "recognised": 1.0,
        "free_bits": 0.0,
    },
}
ASKED = {
    "answers": "labels",
    "estimator": "groups",
    "alignment": "identity",
    "step": 0.1,
    "n_images": 3,
    "n_looks": 1,
}


def test_a_reading_of_weights_counts_bits_and_images():
    rows = verification_rows(VerificationResult(**READ), n_key_bits=63)
    assert (rows["matching bits"], rows["images read"]) == ("54 of 56 (7 erased)", "67")
    assert "queries" not in rows


def test_a_reading_of_answers_counts_queries_and_says_what_its_groups_are():
    rows = verification_rows(ApiVerificationResult(**READ, **ASKED, stopped="proven"), n_key_bits=128)
    assert rows["matching bits"] == "54 of 56 (7 erased), groups of the key's 128 bits"
    assert rows["queries"] == "67, probes around 3 images, answers read as labels"
    assert "images read" not in rows
    one = ApiVerificationResult(**READ, **ASKED | {"n_images": 1}, stopped="proven")
    assert "around 1 image," in verification_rows(one)["queries"]


@pytest.mark.parametrize(
    ("removed", "says", "says_not"),
    [
        ((), "Nothing in it announced a mark.", "Keep"),
        (
            ("gradsigns", "callbacks.GradSigns[1]"),
            "Keep the original and the key; training can be resumed",
            "gradsigns verify",
        ),
        (("hyper_parameters.gradsigns",), "`gradsigns verify` needs the description", "training"),
    ],
)
def test_strip_says_what_the_original_is_for(removed, says, says_not):
    note = strip_note(removed)
    assert says in note
    assert says_not not in note


@pytest.mark.parametrize(("text", "sentence"), [("a", "a."), ("a.", "a."), ("a?", "a?")])
def test_a_sentence_ends_once(text, sentence):
    assert as_sentence(text) == sentence
