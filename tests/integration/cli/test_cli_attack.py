import json

import pytest

from gradsigns_lightning.cli import main


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signed")
    assert main(["train", "experiment=demo", "progress=false", f"hydra.run.dir={folder}"]) == 0
    return [f"checkpoint={folder}/model.ckpt", f"key={folder}/key.gskey", "recipe.batch_size=32"]


def attack(signed, tmp_path, *words):
    file = tmp_path / "attack.json"
    assert main(["attack", *signed, *words, f"json={file}"]) == 0
    return json.loads(file.read_text())


def test_an_attack_is_measured_before_on_the_way_and_after(signed, tmp_path, capsys):
    record = attack(signed, tmp_path, "attack=ftal")
    assert record["before"]["accuracy"] > 0.9
    assert record["before"]["reading"]["verdict"] == "owned"
    assert [point["dose"] for point in record["curve"]] == [1, 2, 3, 4, 5]
    assert record["curve"][-1] == record["after"]
    assert record["after"]["accuracy"] > 0.9
    assert record["n_images"] == 377
    assert record["settings"]["rate_factor"] == 1.0
    printed = capsys.readouterr().out
    assert "before" in printed
    assert "at dose 4" in printed
    assert ("the thief wins" in printed) is record["wins"]


def test_a_larger_dose_leaves_less_of_the_mark(signed, tmp_path):
    small, large = (
        attack(signed, tmp_path, f"attack.rate_factor={factor}")["after"]["reading"]["w"]
        for factor in (0.03, 15)
    )
    assert small > large + 1


def test_the_sweep_ends_with_a_table(signed, capsys):
    assert main(["attack", "-m", *signed, "attack=ftll,rtll", "attack.epochs=1"]) == 0
    table = capsys.readouterr().out.partition("all runs")[2]
    assert "attack=ftll" in table
    assert "attack=rtll" in table
    assert "thief" in table


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("attack=ftla", "`attack` must be one of"),
        ("attack.epochs=0", "`attack.epochs` must be an integer >= 1, got 0"),
        ("share=0", "`share` must leave the thief an image of 1132, got 0.0"),
        ("recipe.optimizer=lion", "`recipe.optimizer` must be one of"),
        ("recipe.rate=-1", "`recipe.rate` must be"),
    ],
)
def test_wrong_settings_are_refused_by_the_name_that_was_typed(signed, capsys, word, message):
    assert main(["attack", *signed, word]) != 0
    assert message in capsys.readouterr().err
