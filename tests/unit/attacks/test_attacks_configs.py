import inspect
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from gradsigns_lightning import attacks
from gradsigns_lightning.attacks.base import Attack
from gradsigns_lightning.runs.build import build
from gradsigns_lightning.runs.config import config_folder

NAMES = sorted(path.stem for path in Path(config_folder(), "attack").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_each_configuration_names_an_attack_and_its_settings(name):
    with initialize_config_dir(config_folder(), version_base="1.3"):
        config = compose(overrides=[f"+attack={name}"])
    attack = build(config.attack, option="attack")
    assert isinstance(attack, Attack)
    settings = set(config.attack) - {"_target_"}
    assert settings <= set(vars(attack))


def test_a_class_has_the_settings_and_defaults_of_its_function():
    classes = [value for name in dir(attacks) if isinstance(value := getattr(attacks, name), type)]
    found = [value for value in classes if issubclass(value, Attack) and value is not Attack]
    assert found
    for kind in found:
        by_function = {
            name: parameter.default
            for name, parameter in inspect.signature(kind.function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name != "observe"
        }
        assert {entry.name: entry.default for entry in fields(kind)} == by_function, kind.__name__


@pytest.mark.parametrize("name", NAMES)
def test_each_configuration_stands_in_the_document(name):
    page = (Path(__file__).parents[3] / "docs" / "attacks.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    stem, _, variant = name.rpartition("_")
    assert any(f"`{name}`" in row or (f"`{stem}`" in row and f"`_{variant}`" in row) for row in rows)
