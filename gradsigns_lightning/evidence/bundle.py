"""The evidence bundle: everything that a third party needs to check an owner's proof, in one signed file."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from os import PathLike
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.utils.canonical import canonical_json, parse_json
from gradsigns_lightning.core.utils.checks import check_instance
from gradsigns_lightning.core.utils.files import atomic_write, read_file
from gradsigns_lightning.evidence.commitment import Statement, is_signed, public_hex

_FORMAT = "gradsigns-bundle/1"
_MEMBERS = {"format", "software", "statement", "timestamp", "key", "images", "transcript"}
_MAX_FILE_BYTES, _MAX_VALUES = 1 << 27, 1 << 23


@dataclass(frozen=True)
class Bundle:
    """An owner's evidence for a claim to a model.

    Handing over a bundle reveals its key, so open one key for each dispute. The file is one line of canonical
    JSON with the members ``evidence`` and ``signature`` (Ed25519, over the canonical ``evidence``). It holds
    the secret but no carriers, projection or signature bits; a file with any other member is refused, so that
    values chosen by hand cannot replace what must be derived.

    Attributes:
        key: the key that is opened.
        statement: the commitment that was published.
        timestamp: the authority's reply, DER, or None.
        images: images of the transcript's reading, uint8, shape ``(n, C, H, W)``, or None.
        transcript: lines of the reading's journal, as JSON types, or None.
        software: name and version of the software that made the bundle.
    """

    key: WatermarkKey
    statement: Statement
    timestamp: bytes | None = None
    images: Tensor | None = None
    transcript: Sequence[Any] | None = None
    software: str = f"gradsigns-lightning {version('gradsigns-lightning')}"

    def __post_init__(self) -> None:
        check_instance("key", self.key, WatermarkKey)
        if not self.statement.commits_to(self.key):
            raise ValueError("`statement` must commit to the key; this key is not one that was committed to.")
        if (self.images is None) != (self.transcript is None):
            raise ValueError("`images` and `transcript` must be given both or not at all.")
        if self.images is not None and tuple(self.images.shape[1:]) != self.key.input_shape:
            found = tuple(self.images.shape[1:])
            raise ValueError(f"`images` must have the key's shape {self.key.input_shape}, got {found}.")

    def save(self, path: str | PathLike[str], signer: Ed25519PrivateKey) -> None:
        """Write the signed bundle in one atomic step, mode 0600.

        Raises:
            FileExistsError: the file exists.
            FileNotFoundError: its folder does not exist. Both errors are :class:`ValueError`, too.
            ValueError: the signer is not the one in the statement.
        """
        check_instance("signer", signer, Ed25519PrivateKey)
        if public_hex(signer.public_key()) != self.statement.signer:
            raise ValueError("`signer` must be the one in the statement.")
        content = self._content()
        signature = signer.sign(canonical_json(content)).hex()
        data = canonical_json({"evidence": content, "signature": signature}) + b"\n"
        atomic_write(path, data, argument="bundle", overwrite=False)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Bundle:
        """Read a bundle and check its form, signature and commitment.

        Raises:
            FileNotFoundError: the file is missing; this error is a :class:`ValueError`, too.
            ValueError: the file is too large, not a bundle, edited, signed by somebody else, or its key is
                not one that was committed to.
        """
        return cls.from_bytes(read_file(path, argument="bundle", kind="file", max_bytes=_MAX_FILE_BYTES))

    @classmethod
    def from_bytes(cls, data: bytes) -> Bundle:
        """Read a bundle; see :meth:`load`."""
        outer = _object(_parsed(data), {"evidence", "signature"}, "the file")
        content = _object(outer["evidence"], _MEMBERS, "the evidence")
        if content["format"] != _FORMAT:
            raise ValueError(
                f"`bundle` has format {str(content['format'])[:80]!r}, this release reads {_FORMAT!r}."
            )
        statement = Statement.from_bytes(_text(content["statement"], "statement").encode())
        if not is_signed(canonical_json(content), _hex(outer["signature"], "signature"), statement.signer):
            raise ValueError("`bundle` must be signed by the statement's signer; the signature does not fit.")
        return cls(
            key=_key(content["key"]),
            statement=statement,
            timestamp=None if content["timestamp"] is None else _base64(content["timestamp"], "timestamp"),
            images=None if content["images"] is None else _images(content["images"]),
            transcript=_transcript(content["transcript"]),
            software=_text(content["software"], "software"),
        )

    def _content(self) -> dict[str, Any]:
        images = self.images
        return {
            "format": _FORMAT,
            "software": self.software,
            "statement": self.statement.to_bytes().decode(),
            "timestamp": None if self.timestamp is None else base64.b64encode(self.timestamp).decode(),
            "key": self.key.reveal(),
            "images": None
            if images is None
            else {
                "shape": list(images.shape),
                "pixels": base64.b64encode(images.contiguous().numpy().tobytes()).decode(),
            },
            "transcript": None if self.transcript is None else list(self.transcript),
        }


def _reason(error: Exception) -> str:
    """Return the message of our own errors; Python's on bytes that are not text or not JSON help nobody."""
    return f" (it {str(error)[:120]})" if type(error) is ValueError else ""


def _parsed(data: bytes) -> Any:
    try:
        content = parse_json(data, max_bytes=_MAX_FILE_BYTES, max_values=_MAX_VALUES)
        canonical = canonical_json(content) + b"\n" == data
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`bundle` must be an evidence bundle; this file is damaged or something else{_reason(error)}."
        ) from error
    if not canonical:
        raise ValueError("`bundle` must be canonical JSON, exactly as it was written; this file was edited.")
    return content


def _object(value: Any, names: set[str], where: str) -> dict[str, Any]:
    """Return ``value`` if it is an object with exactly these members."""
    if not isinstance(value, dict) or set(value) != names:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(
            f"`bundle`: {where} must have the members {sorted(names)} and no other, got {str(found)[:200]}."
        )
    return value


def _key(value: Any) -> WatermarkKey:
    parts = _object(value, {"public", "payload", "secret"}, "the key")
    if not isinstance(parts["public"], dict):
        raise ValueError("`bundle`: the key's public parameters must be an object.")
    secrets = {name: _hex(parts[name], name) for name in ("payload", "secret")}
    return WatermarkKey.from_parts(parts["public"], **secrets)


def _transcript(value: Any) -> list[Any] | None:
    if value is not None and not isinstance(value, list):
        raise ValueError(
            f"`bundle`: the transcript must be an array of a journal's lines, got {type(value).__name__}."
        )
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`bundle`: {where} must be text.")
    return value


def _hex(value: Any, where: str) -> bytes:
    try:
        return bytes.fromhex(_text(value, where))
    except ValueError as error:
        raise ValueError(f"`bundle`: {where} must be hexadecimal digits.") from error


def _base64(value: Any, where: str) -> bytes:
    try:
        return base64.b64decode(_text(value, where), validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"`bundle`: {where} must be base64.") from error


def _images(value: Any) -> Tensor:
    parts = _object(value, {"shape", "pixels"}, "images")
    pixels, shape = _base64(parts["pixels"], "pixels"), parts["shape"]
    is_shape = (
        isinstance(shape, list) and len(shape) == 4 and all(type(size) is int and size > 0 for size in shape)
    )
    if not is_shape or math.prod(shape) != len(pixels):
        raise ValueError("`bundle`: images must have a shape (n, C, H, W) and as many pixels.")
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape)
