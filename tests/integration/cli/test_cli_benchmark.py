import json
import random
import signal
import subprocess
import sys
import time

import pytest

from gradsigns_lightning.benchmark import cells
from gradsigns_lightning.cli import main

SWEEP = ["-m", "experiment=demo", "trainer.max_epochs=4", "attack=ftal,rtll", "seed=0,1"]


def records(folder):
    """Return what was measured by what was chosen, without times."""
    found = {}
    for cell in cells.read_cells(folder):
        text = cell.to_dict()
        del text["seconds"], text["record"]["seconds"]
        found[tuple(sorted(cell.names.items()))] = text
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(["benchmark", *SWEEP, f"folder={folder}"]) == 0
    return folder


def test_each_cell_is_recorded_and_each_model_trained_once(undisturbed):
    found = records(undisturbed)
    assert {(dict(names)["attack"], dict(names)["seed"]) for names in found} == {
        (attack, seed) for attack in ("ftal", "rtll") for seed in (0, 1)
    }
    assert all(cell["status"] == "done" for cell in found.values())
    assert len(list((undisturbed / "models").glob("*.pt"))) == 2
    one = next(cell["record"] for cell in found.values() if cell["names"]["attack"] == "rtll")
    assert [point["dose"] for point in one["curve"]] == list(range(1, 11))


def test_what_is_there_is_not_done_again(undisturbed, monkeypatch, capsys):
    def fail(*_):
        raise AssertionError("it is there")

    monkeypatch.setattr(cells, "_measured", fail)
    before = {file: file.stat().st_mtime_ns for file in undisturbed.rglob("*.json")}
    assert main(["benchmark", *SWEEP, f"folder={undisturbed}"]) == 0
    assert {file: file.stat().st_mtime_ns for file in undisturbed.rglob("*.json")} == before
    assert "attack=rtll" in capsys.readouterr().out.partition("all runs")[2]


def test_a_benchmark_that_is_killed_ends_with_the_same_records(undisturbed, tmp_path):
    words = [sys.executable, "-m", "gradsigns_lightning", "benchmark", *SWEEP, f"folder={tmp_path}"]
    draw, n_killed = random.Random(0), 0
    while True:
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path, start_new_session=True
        )
        if n_killed == 2:
            assert process.wait(300) == 0
            break
        seen = len(list(tmp_path.glob("*/*.*")))
        while process.poll() is None and len(list(tmp_path.glob("*/*.*"))) == seen:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        n_killed += 1
    assert records(tmp_path) == records(undisturbed)
    assert not list(tmp_path.glob("cells/.*"))


def test_the_records_become_a_page(undisturbed, tmp_path, capsys):
    assert main(["report", f"folder={undisturbed}", f"out={tmp_path}/page.md"]) == 0
    assert "4" in capsys.readouterr().out
    page = (tmp_path / "page.md").read_text()
    assert "## digits, mlp, experiment=demo trainer.max_epochs=4" in page
    assert "| ftal |" in page
    assert "| attack (2 seeds) | gradsigns |" in page
    assert (tmp_path / "survival-curves.svg").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folder={}", "out={}/page.md"], "`folder` must hold records"),
        (["folder={}", "out={}/page.html"], "`out` must name a file .md in an existing folder"),
        (["folder={}", "out={}/missing/page.md"], "`out` must name a file .md in an existing folder"),
        (["folder={}"], "`out` must be given"),
    ],
)
def test_a_page_that_cannot_be_made_is_refused(tmp_path, capsys, words, message):
    assert main(["report", *(word.format(tmp_path) for word in words)]) != 0
    assert message in capsys.readouterr().err


def test_a_cell_that_crashes_says_so_and_can_be_tried_again(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("out of memory")

    words = ["benchmark", "experiment=demo", "trainer.max_epochs=1", f"folder={tmp_path}"]
    with monkeypatch.context() as broken:
        broken.setattr(cells, "attacked", fail)
        assert main(words) == 3
    assert "out of memory" in capsys.readouterr().out
    assert [cell.status for cell in cells.read_cells(tmp_path)] == ["crashed"]
    assert main(words) == 3
    assert [cell.status for cell in cells.read_cells(tmp_path)] == ["crashed"]
    assert main([*words, "retry=true"]) == 0
    assert [cell.status for cell in cells.read_cells(tmp_path)] == ["done"]


def test_an_attack_that_does_not_apply_is_refused_not_won(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("`model` must have batch normalization, got none.")

    monkeypatch.setattr(cells, "attacked", refuse)
    assert main(["benchmark", "experiment=demo", "trainer.max_epochs=1", f"folder={tmp_path}"]) == 3
    (cell,) = cells.read_cells(tmp_path)
    assert (cell.status, cell.record) == ("refused", None)
    assert "batch normalization" in cell.error
    assert json.loads(next(tmp_path.glob("cells/*.json")).read_text())["record"] is None


SCHEMES = {
    "gradsigns": ["scheme=gradsigns"],
    "uchida": ["scheme=uchida", "scheme.n_bits=64"],
    "adi": ["scheme=adi", "scheme.n_triggers=60"],
    "eaaw": ["scheme=eaaw"],
    "unmarked": ["scheme=unmarked"],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_is_proven_before_the_attack_and_no_mark_is_not(tmp_path, scheme):
    words = ["attack=ftal", "attack.epochs=1", "attack.rate_factor=0.1", *SCHEMES[scheme]]
    assert main(["benchmark", "experiment=demo", *words, f"folder={tmp_path}"]) == 0
    (cell,) = cells.read_cells(tmp_path)
    assert cell.status == "done", cell.error
    before, after = cell.record.before, cell.record.after
    assert before.accuracy > 0.95
    proven = scheme != "unmarked"
    assert (before.reading.proven, after.reading.proven) == (proven, proven)
    assert not cell.record.wins


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scheme=uchida", "scheme.n_bits=300"], "`n_bits` must be at most"),
        (["attack.epochs=0"], "`attack.epochs` must be an integer >= 1, got 0"),
        (["share=0"], "`share` must leave the thief an image"),
    ],
)
def test_a_wrong_setting_is_an_error_and_no_record(tmp_path, capsys, words, message):
    assert main(["benchmark", "experiment=demo", "trainer.max_epochs=1", *words, f"folder={tmp_path}"]) == 1
    assert message in capsys.readouterr().err
    assert cells.read_cells(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["benchmark", "experiment=demo", f"folder={tmp_path}/file"]) == 1
    assert "`folder` must name a folder that can be written to" in capsys.readouterr().err


def test_a_damaged_record_is_named_by_the_report_and_made_anew(tmp_path, capsys):
    words = ["benchmark", "experiment=demo", "trainer.max_epochs=1", "attack.epochs=1", f"folder={tmp_path}"]
    assert main(words) == 0
    (file,) = tmp_path.glob("cells/*.json")
    file.write_text(file.read_text()[:50])
    assert main(["report", f"folder={tmp_path}", f"out={tmp_path}/page.md"]) == 1
    assert file.name in capsys.readouterr().err
    assert main(words) == 0
    assert [cell.status for cell in cells.read_cells(tmp_path)] == ["done"]


def test_cells_of_other_settings_are_no_seeds_of_one_row(tmp_path):
    words = ["-m", "experiment=demo", "trainer.max_epochs=1", "attack.epochs=1,2", f"folder={tmp_path}"]
    assert main(["benchmark", *words]) == 0
    assert main(["report", f"folder={tmp_path}", f"out={tmp_path}/page.md"]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "attack.epochs=1 experiment=demo" in page
    assert "attack.epochs=2 experiment=demo" in page
    assert "2 seeds" not in page


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["attack.epochs=4"], False),
        (["seed=1"], False),
        (["watermark.strength=2"], False),
        (["data.module.num_workers=1"], True),
        (["trainer.accelerator=cpu"], True),
        (["recipe.rate=0.1"], False),
    ],
)
def test_the_content_of_the_configuration_names_the_cell(words, same):
    from hydra import compose, initialize_config_dir

    from gradsigns_lightning.runs.config import config_folder, register_schemas

    register_schemas()
    with initialize_config_dir(config_folder(), version_base="1.3"):
        names = [
            cells.digest(
                {part: config[part] for part in config if part in (*cells._OF_TRAINING, *cells._OF_ATTACK)},
                (*cells._OF_TRAINING, *cells._OF_ATTACK),
            )
            for config in (plain(compose("benchmark", overrides=given)) for given in ([], words))
        ]
    assert (names[0] == names[1]) is same


def plain(config):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(
        OmegaConf.masked_copy(config, [*cells._OF_TRAINING, *cells._OF_ATTACK, "paths"]), resolve=False
    )
