"""Messages about a command line use the content of other libraries' errors, not their wording."""

import re

import pytest

from gradsigns_lightning.cli.explain import explain
from gradsigns_lightning.runs.config import config_folder, register_schemas

MESSAGES = [
    ("train", "seed=abc", "`seed` must be an integer, got 'abc'."),
    ("train", "++seed=[1]", r"`seed` must be an integer, got '\[1\]'."),
    ("verify", "alpha=abc", "`alpha` must be a number, got 'abc'."),
    ("train", "twin=maybe", "`twin` must be true or false, got 'maybe'."),
    ("train", "watermark.strenth=1", "there is no `watermark.strenth` .* Did you mean `watermark.strength`"),
    ("train", "lambda=1", "there is no `lambda` .* Did you mean `watermark.strength`"),
    *(
        (command, "normalised=true", r"there is no `normalised` .* Did you mean `normalized`\?")
        for command in ("verify", "trace", "judge")
    ),
    ("train", "schedule.strength=1", "there is no `schedule` .* Did you mean `watermark.strength`"),
    (
        "train",
        "watermark.cadence.every_n_steps=3",
        r"there is no `watermark.cadence.\w+` .* Did you mean "
        r"`watermark.cadence`\?",
    ),
    ("train", "key.n_bits.x=1", "there is no `key.n_bits.x` .* Did you mean `key.n_bits`"),
    ("train", "hydra.runn=1", "there is no `hydra.runn` in the configuration"),
    ("train", "watermark=nope", "`watermark` must be one of default, none, paper, strong, got 'nope'."),
    ("train", "seed", "settings are written as name=value, got 'seed'."),
    ("train", "see d", "settings are written as name=value, got 'see d'."),
    ("train", "seed=[1", r"`seed` cannot be read, got '\[1'."),
]


def composed(command, *overrides):
    from hydra import compose, initialize_config_dir

    register_schemas()
    with initialize_config_dir(config_folder(), version_base="1.3"):
        return compose(command, overrides=list(overrides))


def in_other_words(error):
    while error is not None:
        error.args = ("In other words.",)
        error = error.__cause__


@pytest.mark.parametrize(("command", "word", "message"), MESSAGES)
def test_a_message_does_not_depend_on_the_wording_of_hydra(command, word, message):
    with pytest.raises(Exception) as caught:  # noqa: PT011  (each library has its own)
        composed(command, word)
    in_other_words(caught.value)
    said, code = explain(command, [word], caught.value)
    assert code == 2
    assert re.match(message, said), said


def test_what_must_be_given_does_not_depend_on_the_wording_of_omegaconf():
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    open_config = OmegaConf.create({"owner": "???", "name": "${owner}"})
    for key in ("owner", "name"):
        with pytest.raises(OmegaConfBaseException) as caught:
            open_config[key]
        in_other_words(caught.value)
        assert explain("keygen", [], caught.value)[0].startswith(f"`{key}` must be given")


def test_what_is_not_understood_is_passed_on():
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException) as caught:
        composed("train", "+seed=3")
    in_other_words(caught.value)
    assert explain("train", ["+seed=3"], caught.value) == ("In other words.", 2)
