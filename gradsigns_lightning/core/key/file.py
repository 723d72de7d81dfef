"""The key file: safetensors with a versioned header, written atomically and readable by its owner only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from gradsigns_lightning.core.key.derivation import Secret
from gradsigns_lightning.core.utils.canonical import json_of
from gradsigns_lightning.core.utils.checks import check_instance
from gradsigns_lightning.core.utils.files import ExistingFileError, atomic_write, check_target, read_file

FORMAT = "gradsigns-key"
VERSIONS = ("1", "2")  # versions of the key's derivation
_MAX_FILE_BYTES = 1 << 20
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header


@dataclass(frozen=True)
class KeyFileContent:
    """The content of a key file, not yet checked against its commitment."""

    secret: Secret
    payload: bytes = field(repr=False)
    public: dict[str, Any]
    commitment: str


def write(
    path: str | PathLike[str],
    *,
    secret: Secret,
    payload: bytes,
    public: dict[str, Any],
    commitment: str,
    overwrite: bool,
) -> None:
    """Write a key file with mode 0600; a reader sees the old file or the whole new one, never a part.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is false.
        FileNotFoundError: its folder does not exist. Both are :class:`ValueError` too.
    """
    check_instance("path", path, (str, PathLike))
    if Path(path).expanduser().exists() and not overwrite:
        raise ExistingFileError(
            f"`path` must not name an existing key file unless overwrite=True, got {str(path)!r}. "
            f"WatermarkKey.load reads it."
        )
    version = str(public.get("version", 1))
    metadata = {
        "format": FORMAT,
        "version": version,
        "commitment": commitment,
        "key": json.dumps(public, sort_keys=True),
    }
    # Before the secret is revealed, because tracebacks may show variables.
    check_target(path, argument="path", overwrite=overwrite)
    tensors = {
        name: np.frombuffer(data, dtype=np.uint8)
        for name, data in (("secret", secret.reveal()), ("payload", payload))
    }
    atomic_write(path, save(tensors, metadata), argument="path", overwrite=overwrite)


def read(path: str | PathLike[str]) -> KeyFileContent:
    """Read and parse a key file; see :meth:`WatermarkKey.load` for the errors."""
    data = read_file(path, argument="path", kind="key file", max_bytes=_MAX_FILE_BYTES)
    foreign = f"`path` must name a gradsigns key file; {str(path)!r} is damaged, truncated or something else."
    try:
        tensors = load(data)
        header = json_of(data[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")])
        metadata = dict(header["__metadata__"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(foreign) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(foreign)
    version = metadata.get("version")
    if version not in VERSIONS:
        raise ValueError(
            f"`path`: key file {str(path)!r} has version {repr(version)[:80]}, this release reads "
            f"{', '.join(VERSIONS)}."
        )
    try:
        public = json.loads(metadata["key"])
        if str(public.get("version", 1)) != version:
            raise ValueError(foreign)
        secret, payload = (_as_bytes(tensors[name]) for name in ("secret", "payload"))
        return KeyFileContent(
            secret=Secret(secret), payload=payload, public=dict(public), commitment=metadata["commitment"]
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(foreign) from error


def _as_bytes(tensor: np.ndarray[Any, Any]) -> bytes:
    if tensor.dtype != np.uint8 or tensor.ndim != 1:
        raise ValueError("key material must be stored as a vector of bytes")
    return tensor.tobytes()
