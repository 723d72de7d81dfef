"""The two projects of docs/own-project.md run as printed.

Every group of ours can be used in a project of one's own.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf

from gradsigns_lightning import GradSigns, WatermarkKey
from gradsigns_lightning.data import Digits
from gradsigns_lightning.runs.config import config_folder

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "own-project.md"
BLOCK = re.compile(r"<!-- (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=CSVLogger",
]


@pytest.fixture
def project(tmp_path):
    """A folder with the document's files and a key."""
    blocks = dict(BLOCK.findall(DOCUMENT.read_text()))
    assert {"net.py", "main.py", "signed.yaml", "train.py", "configs/train.yaml"} <= blocks.keys()
    for name, text in blocks.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    data = Digits()
    mean, std = data.mean, data.std
    WatermarkKey.generate(
        "A", 32, input_shape=(1, 8, 8), target_class=0, input_mean=mean, input_std=std
    ).save(tmp_path / "acme.gskey")
    return tmp_path


def python(project: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def figures(folder: Path) -> str:
    (file,) = folder.glob("**/metrics.csv")
    text = file.read_text()
    assert "wm/ber" in text
    return text


def test_the_lightning_cli_project(project):
    pytest.importorskip("jsonargparse")
    log = f"--trainer.logger.save_dir={project / 'one'}"
    normalized = ["--data.mean=[0.305]", "--data.std=[0.376]"]
    words = [
        "--trainer.callbacks+=GradSigns",
        "--trainer.callbacks.key=acme.gskey",
        "--trainer.callbacks.strength=1.0",
    ]
    python(project, "main.py", "fit", *QUICK, log, *normalized, *words)
    (saved,) = (project / "one").glob("**/config.yaml")
    written = saved.read_text()
    (callback,) = yaml.safe_load(written)["trainer"]["callbacks"]
    assert callback["init_args"]["key"] == "acme.gskey"
    assert "secret" not in written
    python(
        project,
        "main.py",
        "fit",
        "--config",
        str(saved),
        f"--trainer.logger.init_args.save_dir={project / 'two'}",
    )
    assert figures(project / "two") == figures(project / "one")
    python(
        project,
        "main.py",
        "fit",
        "--config",
        "signed.yaml",
        *QUICK,
        f"--trainer.logger.save_dir={project / 'three'}",
    )
    assert figures(project / "three") == figures(project / "one")


def test_the_help_of_the_callback_shows_no_private_field(project):
    pytest.importorskip("jsonargparse")
    shown = python(project, "main.py", "fit", "--trainer.callbacks.help=GradSigns")
    assert "--trainer.callbacks.key KEY" in shown
    assert not re.search(r"_secret|_payload|callbacks\._", shown)


def test_the_hydra_project(project):
    words = [
        "trainer.accelerator=cpu",
        "trainer.max_epochs=2",
        "+trainer.enable_progress_bar=false",
        "hydra.run.dir=run",
    ]
    python(project, "train.py", "callbacks.gradsigns.key=acme.gskey", *words)
    text = (project / "run" / ".hydra" / "config.yaml").read_text()
    assert yaml.safe_load(text)["callbacks"]["gradsigns"]["strength"] == 1.0
    assert "early_stopping" in text
    assert (project / "signed.ckpt").is_file()


def test_the_callbacks_group_is_the_callbacks_own_defaults():
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_folder(), version_base="1.3"):
        group = OmegaConf.to_container(compose("callbacks/gradsigns"))["callbacks"]["gradsigns"]
    own = {name: parameter.default for name, parameter in inspect.signature(GradSigns).parameters.items()}
    assert group == {"_target_": "gradsigns_lightning.GradSigns", **own, "key": "???"}


def test_a_project_chooses_how_the_callback_signs(project):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(project / "configs"), version_base="1.3"):
        config = compose(
            "train", overrides=["watermark@callbacks.gradsigns=strong", "callbacks.gradsigns.key=acme.gskey"]
        )
    # the project's file sets 1.0
    assert (config.callbacks.gradsigns.strength, config.callbacks.gradsigns.key) == (1.0, "acme.gskey")
    with initialize_config_dir(str(project / "configs"), version_base="1.3"):
        config = compose(
            "train", overrides=["watermark@callbacks.gradsigns=paper", "callbacks.gradsigns.key=acme.gskey"]
        )
    assert config.callbacks.gradsigns.objective == "paper"


def test_every_group_is_built_without_our_schemas(tmp_path):
    """No option holds a null that only our own command fills."""
    folder = Path(config_folder())
    key = tmp_path / "a.gskey"
    WatermarkKey.generate("A", 32, input_shape=(1, 8, 8), target_class=0).save(key)
    files = {
        "defaults": [{"paths": "default"}, {"data": "digits"}, "_self_"],
        "hydra": {"searchpath": ["pkg://gradsigns_lightning.conf"]},
    }
    (tmp_path / "main.yaml").write_text(yaml.safe_dump(files))
    given = {
        "callbacks": f"callbacks.gradsigns.key={key}",
        "protocol": "protocol.request={x: $images}",
        "watermark": f"+watermark.key={key}",
        "key": f"key.path={key}",
    }
    needy = ("gradsigns", "json", "default", "paper", "strong", "file")
    n_built = 0
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        for file in sorted(folder.glob("*/*.yaml")):
            group, option = file.parent.name, file.stem
            # `recipe=owner` follows the settings of `gradsigns benchmark`.
            if group in ("experiment", "debug", "paths", "data", "recipe") or option in (
                "gpu",
                "torchvision",
                "wandb",
                "none",
                "own",
            ):
                continue
            more = [given[group]] if group in given and option in needy else []
            big = ["data=cifar10"] if group == "key" else []
            config = compose("main", overrides=["paths.output_dir=.", *big, f"+{group}={option}", *more])
            built = instantiate(config[group], _convert_="all")
            assert built is not None, (group, option)
            n_built += 1
    assert n_built > 20
