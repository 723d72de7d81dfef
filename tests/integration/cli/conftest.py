"""Fixtures that the tests of the command line share."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gradsigns_lightning.cli import main

# A perceptron on the digits: an epoch takes a fraction of a second.
QUICK = [
    "data=digits",
    "model=mlp",
    "key=b32",
    "data.module.batch_size=32",
    "trainer.accelerator=cpu",
    "progress=false",
]


class Run(NamedTuple):
    folder: Path
    key: Path
    content: dict[str, Any]
    printed: str


@pytest.fixture(autouse=True)
def clean_process(monkeypatch, tmp_path):
    """Each test in its own folder; offline W&B runs change the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.fixture(scope="session")
def signed(tmp_path_factory):
    """A key made by `keygen`, a model signed with it, and its twin."""
    folder = tmp_path_factory.mktemp("signed")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert (
            main(
                [
                    "keygen",
                    "owner=Acme Vision",
                    "data=digits",
                    "key=b32",
                    "target_class=3",
                    "out=acme.gskey",
                    "payload=hi",
                ]
            )
            == 0
        )
        words = [
            "train",
            *QUICK,
            "key=acme.gskey",
            "trainer.max_epochs=3",
            "twin=true",
            "seed=5",
            "json=train.json",
        ]
        words += ["hydra.run.dir=run"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(words) == 0
    finally:
        os.chdir(before)
    return Run(
        folder / "run",
        folder / "acme.gskey",
        json.loads((folder / "train.json").read_text()),
        printed.getvalue(),
    )
