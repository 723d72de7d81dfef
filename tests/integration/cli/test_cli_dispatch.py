from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import gradsigns_lightning
from gradsigns_lightning.cli import main
from gradsigns_lightning.cli.dispatch import COMMANDS
from gradsigns_lightning.core.result import DEFAULT_ALPHA
from gradsigns_lightning.evidence import GRINDING_BITS
from gradsigns_lightning.runs import config as schema
from gradsigns_lightning.runs.config import SCHEMAS, config_folder, register_schemas


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("keygen", "train", "verify"))


def test_no_command_is_an_error(capsys):
    assert main([]) == 2
    assert "Usage" in capsys.readouterr().out


def test_an_unknown_command_gets_a_close_match(capsys):
    assert main(["trian"]) == 2
    assert "Did you mean `train`?" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """No line is broken."""
    monkeypatch.setenv("COLUMNS", "200")


def lines_of(text: str, head: str) -> list[str]:
    return text.partition(f"\n{head}:\n")[2].partition("\n\n")[0].splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_of_its_own(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: gradsigns {command} ")
    assert not {"???", "_target_", "None", "VALUE"} & set(re.split(r"[\s=]", out))
    assert "???" not in out
    assert "_target_" not in out
    settings = lines_of(out, "Settings")
    shown = {line.split("=")[0].strip() for line in settings}
    own = {entry.name for entry in fields(SCHEMAS[command])} - {"paths", "http", "api"}
    assert own - {"data"} <= shown
    assert ("data" in shown) == (command not in ("commit", "strip", "import-2021", "report"))
    without_api = ("train", "keygen", "strip", "attack", "benchmark", "report")
    assert ("api.journal" in shown) == (command not in (*without_api, "commit"))
    assert ("api.max_queries" in shown) == (command not in without_api)
    assert all(re.fullmatch(r"  \S+=(\{[^}]*\}|\S+) +\S.*", line) for line in settings), settings
    examples = lines_of(out, "Examples")
    assert len(examples) == 3
    assert all(line.startswith(f"  gradsigns {command} ") for line in examples)
    assert main(["help", command]) == 0
    assert capsys.readouterr().out == out


def test_a_settings_default_in_the_help_is_the_configurations(capsys):
    assert main(["train", "--help"]) == 0
    settings = lines_of(capsys.readouterr().out, "Settings")
    default = OmegaConf.to_container(composed_configuration("train"))
    n_checked = 0
    for line in settings:
        name, value = line.split()[0].split("=")
        found = default
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if not (found is None or isinstance(found, dict) or name == "paths.data"):
            assert yaml.safe_load(value) == found or float(value) == found
            n_checked += 1
    assert n_checked > 15


def composed_configuration(command: str, *words: str):
    register_schemas()
    GlobalHydra.instance().clear()
    words = [word + "]" if "[" in word and not word.endswith("]") else word for word in words]
    quoted = [
        f"{name}='{value}'" if " " in value else word
        for word in words
        for name, _, value in [word.partition("=")]
    ]
    with initialize_config_dir(config_folder(), version_base="1.3"):
        return compose(command, overrides=[*quoted, *(["paths.output_dir=."])])


def test_constants_of_the_help_are_the_packages():
    assert (schema.DEFAULT_ALPHA, schema.GRINDING_BITS) == (DEFAULT_ALPHA, GRINDING_BITS)


def test_the_module_runs_and_the_package_does_not_import_hydra():
    code = (
        "import sys, runpy, gradsigns_lightning\n"
        "assert not {'hydra', 'omegaconf', 'wandb'} & set(sys.modules)\n"
        "sys.argv = ['gradsigns', '--version']\n"
        "runpy.run_module('gradsigns_lightning', run_name='__main__')"
    )
    root = str(Path(gradsigns_lightning.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gradsigns-lightning ")


def test_a_received_folder_brings_no_plugins(tmp_path):
    """Hydra imports every module of a package `hydra_plugins` that it finds."""
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "evil.py").write_text("open('done', 'w').close()\n")
    root = str(Path(gradsigns_lightning.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "gradsigns_lightning", "keygen", "owner=A", "out=a.gskey"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.gskey").exists()
    assert not (tmp_path / "done").exists()
