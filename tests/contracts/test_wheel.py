"""A wheel built from the tree works outside the repository and ships the configuration."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gradsigns_lightning import WatermarkKey

ROOT = Path(__file__).parents[2]
pytest.importorskip("build")
pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl"))


def test_the_wheel_ships_types_configuration_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    configuration = {
        str(p.relative_to(ROOT)) for p in (ROOT / "gradsigns_lightning" / "conf").rglob("*.yaml")
    }
    assert len(configuration) > 40
    assert configuration <= set(names)
    assert "gradsigns_lightning/py.typed" in names
    assert {n.split("/")[0] for n in names} == {"gradsigns_lightning", "gradsigns_lightning-0.1.0.dist-info"}


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory):
    """The folder in which the wheel is installed."""
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    return target


PROJECT = """
import hydra
from hydra.utils import instantiate
import gradsigns_lightning

@hydra.main(version_base="1.3", config_path=".", config_name="main")
def main(config):
    callback = instantiate(config.callbacks.gradsigns)
    print(gradsigns_lightning.__file__, callback.key.n_bits, instantiate(config.model).__class__.__name__)

main()
"""


def test_a_project_of_ones_own_finds_the_groups_in_the_wheel(target, tmp_path):
    WatermarkKey.generate("A", 32, input_shape=(1, 8, 8), target_class=0).save(tmp_path / "a.gskey")
    (tmp_path / "project.py").write_text(PROJECT)
    groups = "defaults: [{data: digits}, {model: mlp}, {callbacks: gradsigns}, _self_]"
    (tmp_path / "main.yaml").write_text(
        f"{groups}\nhydra: {{searchpath: ['pkg://gradsigns_lightning.conf']}}\n"
    )
    done = subprocess.run(
        [sys.executable, "project.py", f"callbacks.gradsigns.key={tmp_path / 'a.gskey'}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [str(target / "gradsigns_lightning" / "__init__.py"), "32", "MLP"]


def test_the_wheel_works_outside_the_repository(target, tmp_path):
    code = (
        "import gradsigns_lightning as g; from gradsigns_lightning.cli import main; print(g.__file__); main()"
    )
    words = ["keygen", "owner=Acme", "data=digits", "key=b32", "out=acme.gskey"]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(target) in done.stdout
    assert WatermarkKey.load(tmp_path / "acme.gskey").n_bits == 32
