"""The schema of each command's configuration, by which unknown root keys and mistyped values are refused.

The components' own arguments are checked by their constructors, not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, Optional  # noqa: UP035  (OmegaConf reads these annotations)

# The package's own; not imported, because `--help` should not wait for torch. A test compares them.
DEFAULT_ALPHA, GRINDING_BITS = 1e-9, 64.0

Group = Dict[str, Any]  # noqa: UP006


def _setting(default: Any, text: str, value: str = "") -> Any:
    """Return a dataclass field with its line of `--help`.

    Args:
        default: the default, or a callable that makes it.
        text: what the setting does.
        value: the placeholder to show where there is no default.
    """
    metadata = {"text": text, "value": value}
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


@dataclass
class CommonConfig:
    """Keys of every command."""

    paths: Group = field(default_factory=dict)
    data: Optional[Group] = _setting(None, "data set", "NAME")  # noqa: UP045
    json: Optional[str] = _setting(None, "file for the result as one JSON object", "FILE")  # noqa: UP045


@dataclass
class FitConfig(CommonConfig):
    """Keys of every command that trains."""

    model: Group = _setting(dict, "network", "NAME")
    optimizer: Group = _setting(dict, "optimizer", "NAME")
    lr_schedule: str = _setting("onecycle", "learning rate over the training: onecycle, constant or steps")
    label_smoothing: float = _setting(0.1, "share of every target that is spread over all classes")
    key: Any = _setting(dict, "key file, or the size of a new key", "FILE")
    watermark: Group = _setting(dict, "how the model is signed", "NAME")
    trainer: Group = _setting(dict, "Lightning's Trainer", "NAME")
    seed: int = _setting(0, "seed of weights and batches, not of the key")
    alpha: float = _setting(DEFAULT_ALPHA, "owned at p-values up to this")


@dataclass
class TrainConfig(FitConfig):
    """Keys of ``gradsigns train``."""

    callbacks: Group = _setting(dict, "further callbacks of the Trainer", "NAME")
    logger: Group = _setting(dict, "where figures are logged", "NAME")
    twin: bool = _setting(False, "true trains the same model without the mark as well, for comparison")
    init: Optional[str] = _setting(None, "checkpoint to start from", "FILE")  # noqa: UP045
    code: Optional[str] = _setting(None, "folder of your own modules: networks, data, callbacks", "FOLDER")  # noqa: UP045
    progress: bool = _setting(True, "false prints no progress")


@dataclass
class ApiConfig:
    """How a prediction API is queried; see ``verify_api``."""

    max_queries: int = _setting(1000, "most images that are sent")
    estimator: str = _setting("groups", "groups, rows or coordinate")
    answers: Optional[str] = _setting(None, "kind of the responses; detected by default", "KIND")  # noqa: UP045
    alignments: List[str] = _setting(  # noqa: UP006
        lambda: ["identity"], "shifts and flips that are tested; the p-value is corrected for their number"
    )
    batch_size: int = _setting(32, "most images in one request")
    journal: Optional[str] = _setting(None, "file that keeps the responses, to continue from", "FILE")  # noqa: UP045


@dataclass
class HttpConfig:
    """How requests to an endpoint are made, and how patiently; see ``HttpOracle``."""

    # OmegaConf cannot set an optional Dict from the command line.
    headers: Any = _setting(
        None, "sent with every request, as in {Authorization: Bearer ...}", "{NAME: VALUE}"
    )
    timeout: float = _setting(30.0, "seconds for one request")
    retries: int = _setting(5, "repetitions of a failed request")
    time_limit: float = _setting(86_400.0, "seconds after which no request is started")


@dataclass
class SuspectConfig(CommonConfig):
    """Keys of every command that reads a suspect: one of ``checkpoint``, ``onnx`` and ``endpoint``."""

    checkpoint: Optional[str] = _setting(None, "the suspect: a checkpoint of `gradsigns train`", "FILE")  # noqa: UP045
    onnx: Optional[str] = _setting(None, "or an ONNX file", "FILE")  # noqa: UP045
    endpoint: Optional[str] = _setting(None, "or a prediction API behind HTTP", "URL")  # noqa: UP045
    protocol: Group = _setting(dict, "protocol of the endpoint", "NAME")
    http: HttpConfig = field(default_factory=HttpConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    normalized: bool = _setting(False, "true if the ONNX file or endpoint takes normalized images")
    images: Optional[str] = _setting(None, "images of the key's class, instead of those of `data`", "FOLDER")  # noqa: UP045
    alpha: float = _setting(DEFAULT_ALPHA, "owned at p-values up to this")


@dataclass
class VerifyConfig(SuspectConfig):
    """Keys of ``gradsigns verify``."""

    key: Any = _setting(lambda: {"path": "???"}, "key file (must be given)", "FILE")
    bundle: Optional[str] = _setting(None, "file for the evidence, to be read by `gradsigns judge`", "FILE")  # noqa: UP045
    commitment: Optional[str] = _setting(None, "file that `gradsigns commit` wrote, for the bundle", "FILE")  # noqa: UP045


@dataclass
class TraceConfig(SuspectConfig):
    """Keys of ``gradsigns trace``."""

    key: Any = _setting(lambda: {"path": "???"}, "key file of the master (must be given)", "FILE")
    n_customers: int = _setting(10_000, "customers who might have had the copy")


@dataclass
class JudgeConfig(SuspectConfig):
    """Keys of ``gradsigns judge``."""

    bundle: str = _setting("???", "the claimant's evidence (must be given)", "FILE")
    controls: List[str] = _setting(list, "other models, which must not carry the mark", "[FILE,...]")  # noqa: UP006
    authority: Optional[str] = _setting(None, "certificates of the time-stamp authority, PEM", "FILE")  # noqa: UP045
    suspect_since: Optional[str] = _setting(None, "when the suspect became known", "TIME")  # noqa: UP045
    input_mean: Optional[List[float]] = _setting(None, "the suspect's own normalization: mean", "[M,...]")  # noqa: UP006, UP045
    input_std: Optional[List[float]] = _setting(None, "and standard deviation", "[S,...]")  # noqa: UP006, UP045
    grinding_bits: float = _setting(
        GRINDING_BITS, "base-2 logarithm of the number of tried keys that the p-value is adjusted for"
    )


@dataclass
class CommitConfig(CommonConfig):
    """Keys of ``gradsigns commit``."""

    key: Any = _setting(lambda: {"path": "???"}, "key file, or [FILE,...] (must be given)", "FILE")
    out: Optional[str] = _setting(None, "file for the commitment; by default beside the key", "FILE")  # noqa: UP045
    signer: Optional[str] = _setting(  # noqa: UP045
        None, "signing key of an earlier commitment; by default a new one", "FILE"
    )
    api: ApiConfig = field(default_factory=ApiConfig)
    alpha: float = _setting(DEFAULT_ALPHA, "significance level that is announced")
    attach: Optional[str] = _setting(None, "the time-stamp authority's reply to check and keep", "FILE")  # noqa: UP045
    authority: Optional[str] = _setting(None, "its certificates, PEM", "FILE")  # noqa: UP045


@dataclass
class StripConfig(CommonConfig):
    """Keys of ``gradsigns strip``."""

    checkpoint: str = _setting("???", "the signed checkpoint (must be given)", "FILE")
    out: str = _setting("???", "the copy to be released (must be given)", "FILE")
    overwrite: bool = _setting(False, "true replaces an existing file")


@dataclass
class ImportConfig(CommonConfig):
    """Keys of ``gradsigns import-2021``."""

    folder: str = _setting("???", "the authors' release (must be given)", "FOLDER")
    images: str = _setting("???", "images of the key's class (must be given)", "FOLDER")
    mean_image: Optional[str] = _setting(None, "mean image of their training set, .npy", "FILE")  # noqa: UP045
    api: ApiConfig = field(default_factory=ApiConfig)
    alpha: float = _setting(DEFAULT_ALPHA, "owned at p-values up to this")


@dataclass
class KeygenConfig(CommonConfig):
    """Keys of ``gradsigns keygen``."""

    key: Group = _setting(dict, "number of bits", "NAME")
    owner: str = _setting("???", "who owns the key (must be given, except with master=)", "NAME")
    out: str = _setting("???", "the key file to write (must be given)", "FILE")
    target_class: int = _setting(0, "class whose images carry the mark")
    scope: str = _setting("", "model or product that the key is bound to", "TEXT")
    payload: Optional[str] = _setting(None, "text that the bits carry", "TEXT")  # noqa: UP045
    master: Optional[str] = _setting(None, "make a customer's or a message's key from this key", "FILE")  # noqa: UP045
    customer: Optional[int] = _setting(None, "the customer's number", "NUMBER")  # noqa: UP045
    message: Optional[str] = _setting(None, "short text that survives bit errors", "TEXT")  # noqa: UP045


@dataclass
class AttackConfig(CommonConfig):
    """Keys of ``gradsigns attack``."""

    checkpoint: str = _setting("???", "signed checkpoint of `gradsigns train` (must be given)", "FILE")
    key: Any = _setting(lambda: {"path": "???"}, "its key file (must be given)", "FILE")
    attack: Group = _setting(dict, "removal attack", "NAME")
    recipe: Group = _setting(dict, "how the thief trains")
    share: float = _setting(1 / 3, "share of the training images that the thief has")
    max_queries: int = _setting(1000, "budget of a reading through responses")
    alpha: float = _setting(DEFAULT_ALPHA, "owned at p-values up to this")


@dataclass
class BenchmarkConfig(FitConfig):
    """Keys of ``gradsigns benchmark``."""

    key: Any = _setting(dict, "size of the owner's key", "NAME")
    scheme: Group = _setting(dict, "watermarking scheme", "NAME")
    attack: Group = _setting(dict, "removal attack", "NAME")
    recipe: Group = _setting(dict, "how the thief trains")
    share: float = _setting(1 / 3, "share of the training images that the thief has")
    max_queries: int = _setting(1000, "budget of a reading through responses")
    folder: str = _setting("outputs/benchmark", "where records and models are kept", "FOLDER")
    retry: bool = _setting(False, "true tries crashed cells again")


@dataclass
class ReportConfig(CommonConfig):
    """Keys of ``gradsigns report``."""

    folder: str = _setting("outputs/benchmark", "where the benchmark's records are", "FOLDER")
    out: str = _setting("???", "the page to write, Markdown (must be given)", "FILE")


SCHEMAS = {
    "train": TrainConfig,
    "verify": VerifyConfig,
    "keygen": KeygenConfig,
    "commit": CommitConfig,
    "judge": JudgeConfig,
    "trace": TraceConfig,
    "strip": StripConfig,
    "attack": AttackConfig,
    "benchmark": BenchmarkConfig,
    "report": ReportConfig,
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
    """Register the schemas with Hydra, under the names that the configuration files use; may be repeated."""
    from hydra.core.config_store import ConfigStore

    for command, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{command}_schema", node=schema)


def config_folder() -> str:
    """Return the absolute path of the configuration files."""
    folder = Path(__file__).resolve().parents[1] / "conf"
    if not (folder / "train.yaml").is_file():
        raise ValueError(
            f"The configuration files are not in {str(folder)!r}; install gradsigns-lightning again."
        )
    return str(folder)
