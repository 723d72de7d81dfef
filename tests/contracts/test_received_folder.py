"""A command may be started in a folder that somebody sent: what lies there beside the files that it names is not looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.cli.checkpoint import describe
from gradsigns_lightning.models import MLP

ROOT = Path(__file__).parents[2]
CACHE = "cache"  # where numba would keep, and read, what it compiled


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "gradsigns_lightning", *words]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False)


@pytest.fixture
def folder(tmp_path):
    """A folder in which matplotlib waits for ever for its settings, and numba finds where to keep pickles."""
    WatermarkKey.generate("A", 128, input_shape=(1, 28, 28), target_class=0).save(tmp_path / "master.gskey")
    key = WatermarkKey.generate("A", 32, input_shape=(1, 8, 8), target_class=0, input_mean=0.305, input_std=0.376)
    key.save(tmp_path / "digits.gskey")
    model = {"_target_": "gradsigns_lightning.models.MLP", "input_shape": [1, 8, 8], "n_classes": 10, "hidden": [16]}
    data = {"name": "digits", "n_classes": 10, "input_shape": [1, 8, 8], "mean": [0.305], "std": [0.376]}
    weights = {f"net.{name}": value for name, value in MLP((1, 8, 8), 10, [16]).state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": describe(model, data, key.commitment)}, tmp_path / "digits.ckpt")
    os.mkfifo(tmp_path / "matplotlibrc")
    (tmp_path / ".numba_config.yaml").write_text(f"cache_dir: {CACHE}\n")
    return tmp_path


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("keygen", "master=master.gskey", "message=hi", "out=copy.gskey"), 0),
        (("verify", "checkpoint=none.ckpt", "key=master.gskey", "images=."), 1),
        (("trace", "onnx=none.onnx", "key=master.gskey", "images=."), 1),
        (("judge", "bundle=none.gsbundle"), 1),
        (("verify", "checkpoint=digits.ckpt", "key=digits.gskey"), 3),
        (("verify", "checkpoint=digits.ckpt", "key=digits.gskey", "data=digits"), 3),
    ],
    ids=lambda words: words[0] if isinstance(words, tuple) else "",
)
def test_no_settings_are_read_from_a_received_folder(folder, words, code):
    done = run(folder, *words)
    assert done.returncode == code, done.stderr
    assert not (folder / CACHE).exists()


def test_the_traps_hold_whoever_opens_them(folder):
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", "import matplotlib"], cwd=folder, timeout=10, check=False)
    (folder / "compiling.py").write_text("import numba\n\n\n@numba.njit(cache=True)\ndef same(x):\n    return x\n\n\nsame(1)\n")
    subprocess.run([sys.executable, "compiling.py"], cwd=folder, timeout=100, check=True)
    assert (folder / CACHE).exists()


def test_no_module_of_a_received_folder_is_run(tmp_path):
    for name in ("torch", "typing", "numpy", "hydra"):
        (tmp_path / f"{name}.py").write_text("open('done', 'w').close()\n")
    done = run(tmp_path, "keygen", "owner=A", "out=a.gskey")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.gskey").exists()
    assert not (tmp_path / "done").exists()
