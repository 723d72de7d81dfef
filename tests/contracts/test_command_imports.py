"""Which libraries commands load: none if nothing is computed, and no Lightning if no Trainer is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from gradsigns_lightning import WatermarkKey
from gradsigns_lightning.cli.dispatch import COMMANDS
from gradsigns_lightning.models import MLP
from gradsigns_lightning.runs.checkpoint import describe

ROOT = Path(__file__).parents[2]
SLOW = {
    *(
        "torch",
        "numpy",
        "cryptography",
        "hydra",
        "omegaconf",
        "rich",
        "lightning",
        "pytorch_lightning",
        "torchmetrics",
    ),
    *(
        "torchvision",
        "transformers",
        "scipy",
        "sklearn",
        "wandb",
        "requests",
        "onnxruntime",
        "PIL",
        "rfc3161_client",
    ),
}
OF_A_TRAINER = {
    "lightning",
    "pytorch_lightning",
    "torchmetrics",
    "torchvision",
    "transformers",
    "scipy",
    "sklearn",
    "wandb",
}
PROBE = """
import json, sys
from gradsigns_lightning.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def loaded(folder: Path, *words: str, probe: str = PROBE) -> tuple[int, set[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", probe, *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    code, names = json.loads(done.stdout.splitlines()[-1])
    return code, set(names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A key, a model that is not signed with it, and images."""
    folder = tmp_path_factory.mktemp("imports")
    key = WatermarkKey.generate("A", 48, input_shape=(1, 8, 8), target_class=0)
    key.save(folder / "a.gskey")
    model = {
        "_target_": "gradsigns_lightning.models.MLP",
        "input_shape": [1, 8, 8],
        "n_classes": 10,
        "hidden": [16],
    }
    data = {"name": "mine", "n_classes": 10, "input_shape": [1, 8, 8], "mean": [0.0], "std": [1.0]}
    net = MLP((1, 8, 8), 10, [16])
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save(
        {"state_dict": weights, "hyper_parameters": describe(model, data, key.commitment)}, folder / "a.ckpt"
    )
    (folder / "images").mkdir()
    for number in range(4):
        pixels = torch.randint(0, 255, (8, 8), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    return folder


QUICK = [["--version"], ["--help"], ["help"], ["trian"], [], *([command, "--help"] for command in COMMANDS)]


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_what_computes_nothing_loads_nothing_slow(words, tmp_path):
    code, names = loaded(tmp_path, *words)
    assert code == (2 if words in (["trian"], []) else 0)
    assert names & SLOW == set()


WRONG = [
    *(
        ["train", word]
        for word in ("dat=3", "lr=0.1", "+foo=1", "data=digit", "key=b33", "data=image_folder", "trainer.x=1")
    ),
    *(
        ["keygen"],
        ["keygen", "owner=A"],
        ["keygen", "out=a.gskey"],
        ["commit"],
        ["trace"],
        ["judge"],
        ["strip"],
        ["import-2021"],
    ),
    *(
        ["verify"],
        ["verify", "model.ckpt"],
        ["verify", "--key", "a.gskey"],
        ["verify", "checkpont=x", "key=a.gskey"],
    ),
]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_command_line_waits_for_no_torch(words, tmp_path):
    code, names = loaded(tmp_path, *words)
    assert code == 2
    assert names & (SLOW - {"hydra", "omegaconf"}) == set()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["keygen", "owner=A", "out=new.gskey"], 0),
        (["keygen", "owner=A", "out=a.gskey"], 1),
        (["commit", "key=a.gskey"], 0),
        (["verify", "checkpoint=a.ckpt", "key=a.gskey", "images=images"], 3),
        (["trace", "checkpoint=nowhere.ckpt", "key=a.gskey", "images=images"], 1),
        (["judge", "bundle=nowhere.gsbundle", "images=images"], 1),
        (["import-2021", "folder=nowhere", "images=images"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_lightning_where_no_trainer_is_needed(words, expected, folder):
    code, names = loaded(folder, *words)
    assert code == expected
    assert names & OF_A_TRAINER == set()


@pytest.mark.parametrize(
    "words",
    [
        ["keygen", "owner=A", "out=quick.gskey"],
        ["keygen", "master=a.gskey", "customer=7", "out=customer.gskey"],
        ["commit", "key=a.gskey", "out=quick.commitment.json"],
        [
            "commit",
            "key=a.gskey",
            "out=aligned.commitment.json",
            "api.alignments=[hflip]",
            "api.answers=labels",
        ],
    ],
    ids=" ".join,
)
def test_a_key_is_made_and_committed_to_without_torch(words, folder):
    code, names = loaded(folder, *words)
    assert code == 0
    assert names & (SLOW - {"numpy", "cryptography", "hydra", "omegaconf", "rich", "rfc3161_client"}) == set()


def test_the_check_can_fail(tmp_path, folder):
    (tmp_path / "lightning.py").write_text("")
    probe = "import sys; sys.path.insert(0, '.'); import lightning\n" + PROBE
    assert "lightning" in loaded(tmp_path, "--version", probe=probe)[1]
    assert {"hydra", "rich", "numpy"} <= loaded(tmp_path, "keygen", "owner=A", "out=a.gskey")[1]
    assert "torch" in loaded(folder, "verify", "checkpoint=a.ckpt", "key=a.gskey", "images=images")[1]


def test_names_are_imported_when_they_are_asked_for(tmp_path):
    probe = """
import json, sys
import gradsigns_lightning
assert set(gradsigns_lightning.__all__) <= set(dir(gradsigns_lightning))
from gradsigns_lightning import WatermarkKey
assert "torch" not in sys.modules
from gradsigns_lightning import verify
print(json.dumps([0, sorted({name.partition(".")[0] for name in sys.modules})]))
from gradsigns_lightning import *
assert GradSigns is gradsigns_lightning.integration.callback.GradSigns
assert "lightning" in sys.modules
try:
    gradsigns_lightning.no_such_name
except AttributeError as error:
    assert str(error) == "module 'gradsigns_lightning' has no attribute 'no_such_name'"
else:
    raise SystemExit("no error")
"""
    code, names = loaded(tmp_path, probe=probe)
    assert code == 0
    assert "torch" in names
    assert names & OF_A_TRAINER == set()
