"""What each command's configuration holds, so that unknown root keys and mistyped values are refused.

The components' own arguments are checked by their constructors, not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, Optional  # noqa: UP035  (OmegaConf reads these annotations)

from gradsigns_lightning.core.engines import AUTO
from gradsigns_lightning.extraction import DEFAULT_ALPHA
from gradsigns_lightning.extraction.evidence import GRINDING_BITS

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
    engine: str = AUTO
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
class ApiConfig:
    """How a prediction API is asked; see ``verify_api``."""

    max_queries: int = 1000
    estimator: str = "blocks"
    answers: Optional[str] = None  # noqa: UP045
    alignments: List[str] = field(default_factory=lambda: ["identity"])  # noqa: UP006
    batch_size: int = 32
    journal: Optional[str] = None  # noqa: UP045


@dataclass
class HttpConfig:
    """How patiently an endpoint is asked; see ``HttpOracle``."""

    headers: Any = None  # OmegaConf cannot set an optional Dict from the command line
    timeout: float = 30.0
    retries: int = 5
    time_limit: float = 86_400.0


@dataclass
class SuspectConfig(CommonConfig):
    """Keys of every command that reads a suspect: one of ``checkpoint``, ``onnx`` and ``endpoint``."""

    checkpoint: Optional[str] = None  # noqa: UP045
    onnx: Optional[str] = None  # noqa: UP045
    endpoint: Optional[str] = None  # noqa: UP045
    protocol: Group = field(default_factory=dict)
    http: HttpConfig = field(default_factory=HttpConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    normalised: bool = False
    images: Optional[str] = None  # noqa: UP045
    alpha: float = DEFAULT_ALPHA


@dataclass
class VerifyConfig(SuspectConfig):
    """Keys of ``gradsigns verify``."""

    key: Group = field(default_factory=lambda: {"path": "???"})
    bundle: Optional[str] = None  # noqa: UP045
    commitment: Optional[str] = None  # noqa: UP045


@dataclass
class TraceConfig(SuspectConfig):
    """Keys of ``gradsigns trace``."""

    key: Group = field(default_factory=lambda: {"path": "???"})
    n_customers: int = 10_000


@dataclass
class JudgeConfig(SuspectConfig):
    """Keys of ``gradsigns judge``."""

    bundle: str = "???"
    controls: List[str] = field(default_factory=list)  # noqa: UP006
    authority: Optional[str] = None  # noqa: UP045
    suspect_since: Optional[str] = None  # noqa: UP045
    input_mean: Optional[List[float]] = None  # noqa: UP006, UP045
    input_std: Optional[List[float]] = None  # noqa: UP006, UP045
    grinding_bits: float = GRINDING_BITS


@dataclass
class CommitConfig(CommonConfig):
    """Keys of ``gradsigns commit``."""

    key: Dict[str, Any] = field(default_factory=lambda: {"path": "???"})  # noqa: UP006
    out: Optional[str] = None  # noqa: UP045
    signer: Optional[str] = None  # noqa: UP045
    api: ApiConfig = field(default_factory=ApiConfig)
    alpha: float = DEFAULT_ALPHA
    attach: Optional[str] = None  # noqa: UP045
    authority: Optional[str] = None  # noqa: UP045


@dataclass
class ImportConfig(CommonConfig):
    """Keys of ``gradsigns import-2021``."""

    folder: str = "???"
    images: str = "???"
    mean_image: Optional[str] = None  # noqa: UP045
    api: ApiConfig = field(default_factory=ApiConfig)
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
    master: Optional[str] = None  # noqa: UP045
    customer: Optional[int] = None  # noqa: UP045
    message: Optional[str] = None  # noqa: UP045


SCHEMAS = {
    "train": TrainConfig,
    "verify": VerifyConfig,
    "keygen": KeygenConfig,
    "commit": CommitConfig,
    "judge": JudgeConfig,
    "trace": TraceConfig,
    "import-2021": ImportConfig,
}


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
