"""One cell of the benchmark: a scheme, an attack and a seed; kept by the content of its configuration.

A cell that is there is not done again, and a model is trained once for all cells that attack it. Files appear
whole or not at all, and processes that need the same model wait for one of them: so a benchmark that was
killed goes on where it was, in any number of processes.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from gradsigns_lightning import __version__
from gradsigns_lightning.attacks.base import Attack
from gradsigns_lightning.benchmark.measuring import Judge, attacked, best_device
from gradsigns_lightning.benchmark.records import AttackRecord
from gradsigns_lightning.benchmark.schemes.base import Owner, Scheme
from gradsigns_lightning.benchmark.thieves import thief_of
from gradsigns_lightning.core.utils.files import atomic_write
from gradsigns_lightning.runs.build import build
from gradsigns_lightning.runs.options import options
from gradsigns_lightning.runs.own import build_data, build_network

# What decides the weights; the rest of the settings says how they are attacked and read.
_OF_TRAINING = (
    *("model", "data", "optimizer", "lr_schedule", "label_smoothing", "trainer", "seed"),
    *("scheme", "key", "watermark", "recipe"),
)
_OF_ATTACK = ("attack", "share", "max_queries", "alpha")
_NO_MATTER = ("num_workers", "accelerator")  # where it ran, not what
_SAME_ANYWHERE = ("CIFAR10", "Digits", "FashionMNIST", "MNIST", "SVHN")  # wherever the files lie
_SHIPPED = tuple(f"gradsigns_lightning.data.{name}" for name in _SAME_ANYWHERE)
_VERSION = 1  # of what a cell means; raise it when schemes or attacks change


@dataclass(frozen=True)
class CellRecord:
    """What became of a cell.

    Attributes:
        cell: digest of its configuration.
        names: what was chosen: ``scheme``, ``attack``, ``seed``, ``data`` and ``model``.
        status: ``"done"``, ``"refused"`` where the attack does not apply to the network, or ``"crashed"``.
        record: what was measured, if it is done.
        error: why it was refused, or the last lines of the traceback.
        seconds: of the whole cell, training left out.
    """

    cell: str
    names: dict[str, Any]
    status: str
    record: AttackRecord | None
    error: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return {**vars(self), "record": self.record.to_dict() if self.record else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CellRecord:
        """Read what :meth:`to_dict` gave."""
        found = values["record"]
        return cls(**{**values, "record": AttackRecord.from_dict(found) if found else None})


def run_cell(
    settings: dict[str, Any], names: dict[str, Any], folder: Path, *, retry: bool = False
) -> CellRecord:
    """Return what an attack does to a scheme's model, from the folder if it is there.

    Args:
        settings: resolved configuration of ``gradsigns benchmark``.
        names: what its parts are called in tables.
        folder: where records and models are kept.
        retry: whether a cell that crashed or was refused is tried again.

    Raises:
        ValueError: a setting is out of range, or the folder cannot be written to.
        ImportError: an extra is missing. Whatever else goes wrong is the cell's record.
    """
    cell = digest(settings, (*_OF_TRAINING, *_OF_ATTACK))
    for part in ("cells", "models"):
        _make_folder(folder / part)
    file = folder / "cells" / f"{cell}.json"
    kept = _kept(file)
    if kept is not None and (kept.status == "done" or not retry):
        return kept
    parts = _parts(settings)
    begun = time.monotonic()
    status, record, error = "done", None, None
    try:
        record = _measured(settings, *parts, folder)
    except ImportError:  # an extra is missing, which a command says
        raise
    except ValueError as refusal:
        if not str(refusal).startswith("`model` must"):
            raise
        status, error = "refused", str(refusal)
    except Exception:
        status, error = "crashed", "".join(traceback.format_exc().splitlines(keepends=True)[-12:])
    found = CellRecord(cell, names, status, record, error, time.monotonic() - begun)
    text = json.dumps(found.to_dict(), allow_nan=False, indent=1)
    atomic_write(file, text.encode(), argument="folder", overwrite=True)
    return found


def _kept(file: Path) -> CellRecord | None:
    """Return the record in a file; None if there is none, or none that can be read."""
    try:
        return _read(file)
    except (OSError, ValueError):
        return None


def _read(file: Path) -> CellRecord:
    try:
        return CellRecord.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        message = f"`folder` must hold records of `gradsigns benchmark`, got {str(file)!r}: {error}."
        raise ValueError(message) from error


def _make_folder(folder: Path) -> None:
    """Make a folder in which files can be written, before the work rather than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = f"`folder` must name a folder that can be written to, got {str(folder.parent)!r}."
        raise ValueError(message) from error


def read_cells(folder: Path) -> list[CellRecord]:
    """Return all records that a folder holds, in a fixed order.

    Raises:
        ValueError: a file is no record.
    """
    return [_read(file) for file in sorted((folder / "cells").glob("*.json"))]


def digest(settings: Mapping[str, Any], parts: tuple[str, ...]) -> str:
    """Return a digest of parts of a configuration, and of this package's version."""
    content = {name: _what_matters(settings.get(name)) for name in parts}
    version = f"{__version__}, {_VERSION}"
    text = json.dumps({"version": version, **content}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _what_matters(value: Any) -> Any:
    if isinstance(value, Mapping):
        left_out = (*_NO_MATTER, "root") if value.get("_target_") in _SHIPPED else _NO_MATTER
        return {name: _what_matters(one) for name, one in value.items() if name not in left_out}
    return value


def _measured(
    settings: dict[str, Any], owner: Owner, scheme: Scheme, attack: Attack, folder: Path
) -> AttackRecord:
    model = _model(settings, owner, scheme, folder / "models")
    n_bits = settings["key"]["n_bits"]
    thief = thief_of(owner.data, owner.recipe, share=settings["share"], n_bits=n_bits)
    judge = Judge(scheme.reader(owner), owner.data.test_dataloader())
    device = best_device(settings["trainer"].get("accelerator", "auto"))
    with options({name: f"attack.{name}" for name in settings["attack"]}):
        return attacked(model.to(device), attack, thief, judge)[1]


def _parts(settings: dict[str, Any]) -> tuple[Owner, Scheme, Attack]:
    scheme: Scheme = build(settings["scheme"], option="scheme")
    attack: Attack = build(settings["attack"], option="attack")
    recipe = build(settings["recipe"], option="recipe")
    data = build_data(settings["data"]["module"])
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return Owner(settings, data, recipe, settings["alpha"], settings["max_queries"]), scheme, attack


def _model(settings: dict[str, Any], owner: Owner, scheme: Scheme, folder: Path) -> nn.Module:
    """Return the scheme's network, trained now or before."""
    name = digest(settings, _OF_TRAINING)
    file = folder / f"{name}.pt"
    with FileLock(folder / f"{name}.lock"):
        if not file.is_file():
            weights = io.BytesIO()
            torch.save(scheme.train(owner).state_dict(), weights)
            atomic_write(file, weights.getvalue(), argument="folder", overwrite=True)
    network = build_network(settings["model"])
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval()
