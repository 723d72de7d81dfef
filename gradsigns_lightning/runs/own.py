"""The user's own code in a training: networks, data modules, optimizers and callbacks.

The user names it on the command line or in a configuration; it is importable, or in a folder that the user
names. Nothing that reads a suspect comes here: a received file cannot name code.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import OmegaConf
from torch import Tensor, nn

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.models.catalogue import described_network
from gradsigns_lightning.runs.build import build, find_target, to_plain
from gradsigns_lightning.runs.config import config_folder

_DATA = "gradsigns_lightning.data"
_SLACK = 0.02  # what half precision and interpolation add to pixels in [0, 1]


@contextmanager
def modules_of(folder: str | None) -> Iterator[None]:
    """Let Python find the modules in a folder, after the installed ones; None adds no folder.

    Raises:
        ValueError: it is not a folder.
    """
    if folder is None:
        yield
        return
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise ValueError(
            f"`code` must name a folder, got {folder!r}, which is "
            f"{'a file' if path.exists() else 'not there'}."
        )
    # `remove` would take the user's own entry, which may come first
    added = [] if str(path) in sys.path else [str(path)]
    sys.path.extend(added)
    try:
        yield
    finally:
        for name in added:
            sys.path.remove(name)


def settings_of(config: Any, choices: Mapping[str, str]) -> dict[str, Any]:
    """Return the resolved settings of a training.

    The user's own network or data module gets no argument that only the shipped one takes.

    Args:
        config: configuration of ``gradsigns train``.
        choices: the option that is chosen in each group.
    """
    shipped = {group: _shipped(group, choices.get(group)) for group in ("model", "data")}
    config.model = without_inherited(_unresolved(config.model), shipped["model"])
    config.data.module = without_inherited(_unresolved(config.data.module), shipped["data"].get("module", {}))
    settings: dict[str, Any] = to_plain(config)
    data, names = settings["data"], {file.stem for file in Path(config_folder(), "data").glob("*.yaml")}
    if data["name"] in names and not data["module"]["_target_"].startswith(f"{_DATA}."):
        data["name"] = data["module"]["_target_"]  # `verify` would read the shipped data set's images
    return settings


def _shipped(group: str, choice: str | None) -> dict[str, Any]:
    file = Path(config_folder(), group, f"{choice}.yaml")
    return _unresolved(OmegaConf.load(file)) if file.is_file() else {}


def _unresolved(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    return values


def without_inherited(part: Mapping[str, Any], shipped: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of the configuration without what only the shipped choice's target takes.

    ``model._target_=net.Net`` leaves the arguments of the shipped network in their place. A target of the
    user's own gets those that its signature names, and all that the user wrote.

    Args:
        part: ``_target_`` and arguments, with references not yet resolved.
        shipped: the same part as it is shipped.
    """
    if part["_target_"] == shipped.get("_target_") or "_target_" not in shipped:
        return dict(part)
    named = inspect.signature(find_target(part["_target_"], own_code=True)).parameters
    return {
        name: value
        for name, value in part.items()
        if name in named or name not in shipped or value != shipped[name]
    }


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """Return the network.

    Raises:
        TypeError: it is not a network, or is a LightningModule, which has a training of its own.
    """
    network = build(config, option="model", own_code=True)
    if isinstance(network, LightningModule):
        raise TypeError(
            f"`model` must name a network that is trained here, got {config['_target_']}, a LightningModule, "
            "which says itself how it is trained. Give its Trainer the callback: "
            "Trainer(callbacks=[GradSigns(key)]); see docs/own-project.md."
        )
    checked: nn.Module = _checked(network, nn.Module, "model", config)
    return checked


def build_data(config: Mapping[str, Any]) -> LightningDataModule:
    """Return the data module.

    Raises:
        TypeError: it is not a data module, or has no batches to train or to test with.
    """
    built = build(config, option="data.module", own_code=True)
    data: LightningDataModule = _checked(built, LightningDataModule, "data.module", config)
    missing = [name for name in ("train_dataloader", "test_dataloader") if not is_overridden(name, data)]
    if missing:
        raise TypeError(f"`data.module` must have {' and '.join(missing)}, got {config['_target_']} without.")
    return data


def build_callbacks(configs: Mapping[str, Any]) -> list[Callback]:
    """Return the callbacks in the order in which they are configured, without those that are null.

    Raises:
        TypeError: one is not a callback.
    """
    return [
        _checked(
            build(config, option=f"callbacks.{name}", own_code=True), Callback, f"callbacks.{name}", config
        )
        for name, config in configs.items()
        if config is not None
    ]


def _checked(built: Any, kind: type, option: str, config: Mapping[str, Any]) -> Any:
    if not isinstance(built, kind):
        raise TypeError(
            f"`{option}` must be a {kind.__name__}, got {type(built).__name__} of {config['_target_']}."
        )
    return built


def is_described(model: Mapping[str, Any]) -> bool:
    """Tell whether this network can be rebuilt from a checkpoint's description, as only shipped ones can."""
    try:
        described_network(model)
    except ValueError:
        return False
    return True


def class_images(data: LightningDataModule, key: WatermarkKey) -> Tensor:
    """Return raw test images of the key's class; from the test batches if the data module has no raw images.

    Raises:
        ValueError: the batches are not normalized as the key says.
    """
    if hasattr(data, "raw_images"):
        images: Tensor = data.raw_images("test", key.target_class)
        return images
    batches = [images[labels == key.target_class].float() for images, labels in data.test_dataloader()]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (key.input_mean, key.input_std))
    pixels = torch.cat(batches) * std + mean
    if pixels.numel() and not (pixels.min() >= -_SLACK and pixels.max() <= 1 + _SLACK):
        raise ValueError(
            "`data.mean` and `data.std` must say how `data.module` normalizes its test images; with these, "
            f"their pixels are in [{pixels.min():.3g}, {pixels.max():.3g}] and not in [0, 1]."
        )
    return pixels.clamp(0, 1)
