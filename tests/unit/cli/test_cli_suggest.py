"""A name that the configuration does not have is answered with the one that was meant."""

import pytest

from gradsigns_lightning.cli.suggest import ALIASES, suggestion
from gradsigns_lightning.runs.config import register_schemas


@pytest.mark.parametrize(
    ("command", "words", "key", "meant"),
    [
        ("train", [], "watermark.strenth", "watermark.strength"),
        ("train", [], "strenght", "watermark.strength"),
        ("train", [], "experimnt", "experiment"),
        ("train", ["model=vit"], "model.dept", "model.depth"),
        ("train", ["model=vit", "nonsense=1"], "optimizer.l", "optimizer.lr"),
        ("verify", [], "max_querys", "api.max_queries"),
    ],
)
def test_the_nearest_name_is_suggested(command, words, key, meant):
    register_schemas()
    assert suggestion(command, words, key) == f" Did you mean `{meant}`?"


@pytest.mark.parametrize("alias", ["lr", "lambda", "bits", "cadence.growth", "schedule"])
def test_a_former_name_or_one_of_the_field_is_understood(alias):
    register_schemas()
    assert suggestion("train", [], alias) == f" Did you mean `{ALIASES[alias]}`?"


def test_where_nothing_is_near_the_help_is_named():
    register_schemas()
    assert suggestion("verify", [], "zzz") == " `gradsigns verify --help` lists the settings."
