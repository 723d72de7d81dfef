"""What is wrong with a command line is said before Hydra reads it."""

import pytest

from gradsigns_lightning.cli.mistakes import no_choice, one_file_for_all_runs, with_dashes


def test_a_former_name_written_with_dashes_is_answered_with_the_new_one():
    assert "`normalized=true`" in with_dashes("verify", ["--normalised=true"])


@pytest.mark.parametrize("word", ["-m", "--multirun", "--cfg", "--hydra-help", "key=--a.gskey"])
def test_options_of_hydra_are_no_settings(word):
    assert with_dashes("verify", [word, "job"]) == ""


@pytest.mark.parametrize(
    ("words", "is_wrong"),
    [
        (["-m", "seed=0,1", "json=out.json"], True),
        (["seed=0,1", "--multirun", "json=out.json"], True),
        (["seed=0", "json=out.json"], False),
        (["-m", "seed=0,1", "json=out_${seed}.json"], False),
        (["-m", "seed=0,1", "json=a.json,b.json"], False),
        (["-m", "seed=0,1"], False),
    ],
)
def test_the_runs_of_a_sweep_write_to_files_of_their_own(words, is_wrong):
    assert bool(one_file_for_all_runs(words)) == is_wrong


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "watermark=false",
            "`watermark` must be one of default, none, paper, strong, got false. Did you mean "
            "`watermark=none`?",
        ),
        ("watermark=3", "`watermark` must be one of default, none, paper, strong, got 3."),
        ("watermark=none", ""),
        ("seed=3", ""),
        ("twin=true", ""),
    ],
)
def test_a_value_that_names_no_option_is_answered_with_the_options(word, message):
    assert no_choice([word]) == message
