"""A checkpoint file as ``torch.save`` writes it, checked before torch reads it.

``torch.load(weights_only=True)`` runs nothing, but a file may still ask for memory: entries that are packed, or buffers of any
size that a pickle has made. So only files are read whose entries lie unpacked in the file and whose pickle names nothing but
tensors and plain containers.
"""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

_PICKLE = "/data.pkl"
_MOST_PICKLED, _MOST_STEPS = 2**24, 2**20  # ten times what the largest network of torchvision needs
_NAMES = re.compile(
    r"collections (OrderedDict|Counter)|torch (Size|device)|torch\._utils _rebuild_(tensor_v2|parameter)|"
    r"torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
# The end of a file of torch.save: where the directory is, where that is said, and what programs without zip64 read.
_END = struct.Struct("<4s20x8x8xQQ4s4xQ4x4s16xH")
_SIGNATURES = (b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06")


def check_archive(file: Path) -> None:
    """Check a checkpoint's file.

    Raises:
        ValueError: it is none of ``torch.save``, or asks for more than it holds; the message is the reason alone.
        OSError, zipfile.BadZipFile: it cannot be read.
    """
    _check_end(file)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.orig_filename.lower() for entry in entries]
        if len(set(names)) != len(names) or any("\0" in name for name in names):
            raise ValueError("two entries have one name")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
            raise ValueError("an entry is packed")
        pickles = [entry for entry in entries if entry.orig_filename.lower().endswith(_PICKLE)]
        if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLED:
            raise ValueError("its description is missing or too long")
        foreign = next((name for name in _names(archive.read(pickles[0])) if not _NAMES.fullmatch(name)), None)
    if foreign is not None:
        raise ValueError(f"it names {foreign[:80]!r}, which is no part of a checkpoint of weights and plain types")


def _check_end(file: Path) -> None:
    """Torch and Python look for an archive's directory in different ways; here both can only find one."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(size - _END.size, 0))
        end = stream.read()
    if len(end) == _END.size:
        first, length, start, second, said, third, comment = _END.unpack(end)
        begin = size - _END.size
        if (first, second, third) == _SIGNATURES and said == begin and start + length == begin and comment == 0:
            return
    raise ValueError("it is no file of torch.save (since torch 1.6)")


def _names(pickled: bytes) -> Iterator[str]:
    """Yield what a pickle names; a name that is put together from strings on the stack counts as one without a name."""
    for step, (code, argument, _) in enumerate(pickletools.genops(pickled)):
        if step >= _MOST_STEPS:
            raise ValueError("its description is too long")
        if code.name in ("GLOBAL", "INST"):
            yield str(argument)
        elif code.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield code.name
