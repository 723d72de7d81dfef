"""What each command's configuration holds, so that unknown root keys and mistyped values are refused.

The components' own arguments are checked by their constructors, not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, Optional  # noqa: UP035  (OmegaConf reads these annotations)

from gradsigns_lightning.extraction import DEFAULT_ALPHA

Group = Dict[str, Any]  # noqa: UP006


@dataclass
class CommonConfig:
    """Keys of every command."""

    paths: Group = field(default_factory=dict)
    data: Optional[Group] = None  # noqa: UP045
    json: Optional[str] = None  # noqa: UP045


@dataclass
class TrainConfig(CommonConfig):
    """Keys of ``gradsigns train``."""

    model: Group = field(default_factory=dict)
    optimizer: Group = field(default_factory=dict)
    lr_schedule: str = "onecycle"
    label_smoothing: float = 0.1
    key: Group = field(default_factory=dict)
    objective: Group = field(default_factory=dict)
    engine: Group = field(default_factory=dict)
    schedule: Group = field(default_factory=dict)
    cadence: Group = field(default_factory=dict)
    n_images: int = 32
    momentum: float = 0.5
    n_val_images: int = 256
    trainer: Group = field(default_factory=dict)
    logger: Group = field(default_factory=dict)
    seed: int = 0
    watermark: bool = True
    twin: bool = False
    init: Optional[str] = None  # noqa: UP045
    alpha: float = DEFAULT_ALPHA
    progress: bool = True


@dataclass
class VerifyConfig(CommonConfig):
    """Keys of ``gradsigns verify``."""

    checkpoint: str = "???"
    key: Group = field(default_factory=lambda: {"path": "???"})
    images: Optional[str] = None  # noqa: UP045
    alpha: float = DEFAULT_ALPHA


@dataclass
class KeygenConfig(CommonConfig):
    """Keys of ``gradsigns keygen``."""

    key: Group = field(default_factory=dict)
    owner: str = "???"
    out: str = "???"
    target_class: int = 0
    scope: str = ""
    payload: Optional[str] = None  # noqa: UP045


SCHEMAS = {"train": TrainConfig, "verify": VerifyConfig, "keygen": KeygenConfig}


class UnknownKeyError(ValueError):
    """A key that no command reads."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def check_root_keys(command: str, config: Any) -> None:
    """Raise an :class:`UnknownKeyError` for a root key that was added by force (``+key=value``)."""
    known = {entry.name for entry in fields(SCHEMAS[command])}
    for name in config:
        if name not in known:
            raise UnknownKeyError(name)


def register_schemas() -> None:
    """Put the schemas where the configuration files find them; may be called often."""
    from hydra.core.config_store import ConfigStore

    for command, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{command}_schema", node=schema)


def config_folder() -> str:
    """Return the absolute path of the configuration files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise ValueError(f"The configuration files are not in '{package / 'conf'}'; install gradsigns-lightning again.")
