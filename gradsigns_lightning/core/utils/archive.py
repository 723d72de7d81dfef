"""Checks a checkpoint file of ``torch.save`` before torch reads it.

``torch.load(weights_only=True)`` runs no code, but a file can still exhaust memory or time, by entries that
are compressed or share bytes, by a pickle that makes buffers of any size, or by keys that take forever to
hash. So the only files that are read are those whose entries are uncompressed and do not overlap, and whose
pickle holds nothing but tensors and plain containers.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

from gradsigns_lightning.core.utils.pickles import Outline, PickleWalk

_PICKLE, _ORDER = "/data.pkl", "/byteorder"
_MOST_PICKLED = 2**24  # bytes, ten times what the largest network of torchvision needs
_LARGEST_DIRECTORY = 2**21  # bytes, enough for some twenty thousand entries
_MOST_SIDES, _MOST_ATTRIBUTES, _MOST_COUNTED, _LONGEST_DEVICE = 16, 16, 1024, 32
_NAMES = re.compile(
    r"collections (OrderedDict|Counter)|torch (Size|device)|torch\._utils _rebuild_(tensor_v2|parameter)|"
    r"torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
# The end of a file of torch.save: the zip64 end record, its locator, and the end record without zip64.
_END = struct.Struct("<4s20x8xQQQ4s4xQ4x4s16xH")
_LOCAL = struct.Struct("<4s22xHH")
_SIGNATURES = (b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06")


def check_archive(file: Path, *, trusted: Collection[str] = ()) -> None:
    """Check a checkpoint's file.

    Args:
        file: the file.
        trusted: names of types that the user vouches for, as ``"module name"``; what follows the first of
            them in the pickle is not checked, because only torch knows how to read it.

    Raises:
        ValueError: the file was not written by ``torch.save``, or could take more memory or time than its
            size justifies; the message is the reason alone.
        OSError: the file cannot be read.
        zipfile.BadZipFile: the file is not a valid archive.
    """
    n_entries = _check_end(file)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.orig_filename.lower() for entry in entries]
        if len(entries) != n_entries or len(set(names)) != len(names) or any("\0" in name for name in names):
            raise ValueError("two entries have one name, or some are not counted")
        if any(
            entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size
            for entry in entries
        ):
            raise ValueError("an entry is packed")
        _check_apart(file, entries, archive.start_dir)
        pickles = [entry for entry, name in zip(entries, names, strict=True) if name.endswith(_PICKLE)]
        if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLED:
            raise ValueError("its description is missing or too long")
        orders = [entry for entry, name in zip(entries, names, strict=True) if name.endswith(_ORDER)]
        # Torch would copy numbers in another byte order, entry by entry.
        if any(entry.file_size != len("little") or archive.read(entry) != b"little" for entry in orders):
            raise ValueError("its numbers are not in little-endian order")
        pickled = archive.read(pickles[0])
    try:
        _CheckpointWalk(pickled, trusted).outline()
    except _TrustedError:
        return


def _check_end(file: Path) -> int:
    """Ensure that torch and Python, which search for an archive's directory differently, find the same one.

    Returns:
        The number of entries that torch expects.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(size - _END.size, 0))
        end = stream.read()
    if len(end) == _END.size:
        first, n_entries, length, start, second, said, third, comment = _END.unpack(end)
        begin = size - _END.size
        if (
            (first, second, third) == _SIGNATURES
            and said == begin
            and start + length == begin
            and comment == 0
        ):
            if length > _LARGEST_DIRECTORY:
                raise ValueError("it has too many entries")
            return int(n_entries)
    raise ValueError("it was not written by torch.save (torch 1.6 or later)")


def _check_apart(file: Path, entries: Sequence[zipfile.ZipInfo], start: int) -> None:
    """Refuse entries that overlap each other or the directory, which begins at ``start``.

    The length of an entry's header is known only from the header itself.
    """
    spans = []
    with file.open("rb") as stream:
        for entry in entries:
            stream.seek(entry.header_offset)
            header = stream.read(_LOCAL.size)
            if len(header) != _LOCAL.size or header[:4] != b"PK\x03\x04":
                raise ValueError("an entry is not where it is said to be")
            end = entry.header_offset + _LOCAL.size + sum(_LOCAL.unpack(header)[1:]) + entry.file_size
            spans.append((entry.header_offset, end))
    if any(one[1] > other[0] for one, other in pairwise([*sorted(spans), (start, start)])):
        raise ValueError("two entries share bytes")


class _TrustedError(Exception):
    """The pickle names a type that the user vouches for."""


class _CheckpointWalk(PickleWalk):
    """Allows what Lightning's checkpoints hold: tensors, parameters, states of optimizers and schedules."""

    def __init__(self, pickled: bytes, trusted: Collection[str]) -> None:
        super().__init__(pickled)
        self._trusted = trusted

    def name(self, name: str) -> Outline:
        if name in self._trusted:
            raise _TrustedError
        if not _NAMES.fullmatch(name):
            raise ValueError(
                f"it names {name[:80]!r}, which is not part of a checkpoint of weights and plain types"
            )
        return Outline("name", name)

    def call(self, function: Outline, arguments: Sequence[Outline]) -> Outline:
        kinds = [argument.kind for argument in arguments]
        match (function.kind == "name" and function.content, kinds):
            case ("collections OrderedDict", []):
                return Outline("dict", {})
            case ("collections Counter", ["dict"]) if len(arguments[0].content) <= _MOST_COUNTED:
                self.spend(len(arguments[0].content))  # it is copied
                return Outline("counter", depth=arguments[0].depth, size=arguments[0].size)
            case ("torch Size", ["tuple"]) if _is_shape(arguments[0]):
                return Outline("shape", size=1 + _MOST_SIDES)
            case ("torch device", ["str"] | ["str", "int"]) if len(arguments[0].content) <= _LONGEST_DEVICE:
                return Outline("device")
            case ("torch._utils _rebuild_tensor_v2", ["storage", "int", "tuple", "tuple", "bool", "dict"]):
                if _is_inside(arguments) and not arguments[5].content:
                    return Outline("tensor")
            case ("torch._utils _rebuild_parameter", ["tensor", "bool", "dict"]) if not arguments[2].content:
                return Outline("tensor")
        raise ValueError(f"it calls {function.content!s:.80} with other arguments than a checkpoint does")

    def build(self, value: Outline, state: Outline) -> None:
        named = state.kind == "dict" and all(type(key) is str for key in state.content)
        if value.kind != "dict" or not named or len(state.content) > _MOST_ATTRIBUTES:
            raise ValueError(f"it changes a {value.kind}, or more of it than a checkpoint does")

    def fetch(self, reference: Outline) -> Outline:
        parts = reference.content if reference.kind == "tuple" else []
        if [part.kind for part in parts] != ["str", "name", "str", "str", "int"] or parts[
            0
        ].content != "storage":
            raise ValueError("it refers to something other than numbers of the file")
        return Outline("storage", parts[4].content)


def _is_shape(value: Outline) -> bool:
    return len(value.content) <= _MOST_SIDES and all(
        side.kind == "int" and side.content >= 0 for side in value.content
    )


def _is_inside(arguments: Sequence[Outline]) -> bool:
    """Return whether a tensor lies within its storage; torch would enlarge some storages."""
    storage, offset, shape, strides = arguments[:4]
    if not (
        _is_shape(shape)
        and _is_shape(strides)
        and len(shape.content) == len(strides.content)
        and offset.content >= 0
    ):
        return False
    sides = [side.content for side in shape.content]
    last = sum((side - 1) * stride.content for side, stride in zip(sides, strides.content, strict=True))
    return 0 in sides or bool(offset.content + last < storage.content)
