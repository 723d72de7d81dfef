from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradsigns_lightning
from gradsigns_lightning.cli import main


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


@pytest.mark.parametrize(("command", "word"), [("train", "schedule"), ("verify", "checkpoint"), ("keygen", "owner")])
def test_every_command_has_help(command, word, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"gradsigns {command} ")
    assert f"{word}:" in out


def test_the_module_runs_and_the_package_does_not_import_hydra():
    code = (
        "import sys, runpy, gradsigns_lightning\n"
        "assert not {'hydra', 'omegaconf', 'wandb'} & set(sys.modules)\n"
        "sys.argv = ['gradsigns', '--version']\n"
        "runpy.run_module('gradsigns_lightning', run_name='__main__')"
    )
    root = str(Path(gradsigns_lightning.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
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
