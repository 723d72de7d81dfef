"""A checkpoint to be given away, without what announces that it is signed."""

from __future__ import annotations

import io
import pickle  # for its errors
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from gradsigns_lightning.core.utils.archive import check_archive
from gradsigns_lightning.core.utils.files import atomic_write, check_target, error_about

CHECKPOINT_ENTRY = "gradsigns"
STATE_PREFIX = "GradSigns["
_MOST_MARKS = 64  # each name of a mark is looked for in every text


def strip(
    checkpoint: str | PathLike[str], out: str | PathLike[str], *, overwrite: bool = False
) -> tuple[str, ...]:
    """Write a copy of a Lightning checkpoint in which nothing says that the model is signed; the weights stay as they are.

    Left out are the callback's settings and state, with them the commitment and the target class, what
    ``gradsigns train`` noted of the model, and the state of callbacks that watch one of the mark's figures (a
    ``ModelCheckpoint`` of ``wm/ber``) or name this package in a path (that of W&B's project). All else is
    kept, so Lightning loads the copy. ``gradsigns verify`` does not: keep the original, or verify in Python.

    Args:
        checkpoint: the checkpoint; it is read with ``weights_only=True``, so nothing in it is run, and takes
            the memory of a few copies of the file at most, and time in proportion to its length. Types that
            you named with ``torch.serialization.add_safe_globals`` are read as torch reads them.
        out: the copy; written in one atomic step.
        overwrite: whether ``out`` may be replaced.

    Returns:
        What was left out, as ``callbacks.GradSigns[...]``; empty if nothing announced a mark.

    Raises:
        ValueError: ``checkpoint`` is no Lightning checkpoint of weights and plain types; ``out`` exists and
            must not be replaced, or cannot be written.

    Example:
        >>> removed = strip("signed.ckpt", "release.ckpt")  # doctest: +SKIP
    """
    check_target(out, argument="out", overwrite=overwrite)
    content = _read(Path(checkpoint).expanduser())
    removed = [*_strip_settings(content), *_strip_states(content)]
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
    # an attribute hides a method, or what a trusted type lets through is nested too deep
    except Exception as error:
        raise ValueError(
            f"`checkpoint`: the values of {str(checkpoint)!r} cannot be written again."
        ) from error
    atomic_write(out, buffer.getvalue(), argument="out", overwrite=overwrite, mode=0o644)
    return tuple(removed)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        found = "a folder" if file.is_dir() else "not there"
        raise error_about(file)(
            f"`checkpoint` must name a checkpoint file, got {str(file)!r}, which is {found}."
        )
    try:
        check_archive(file, trusted=_trusted())
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what damage makes torch raise has no base class in common
        raise ValueError(f"`checkpoint`: {str(file)!r} {_why_unread(error)}") from error
    content = dict(dict.items(content)) if isinstance(content, dict) else {}  # an attribute may hide a method
    if "state_dict" not in content:
        raise ValueError(
            f"`checkpoint`: {str(file)!r} has no `state_dict`; it is not a Lightning checkpoint."
        )
    return content


def _why_unread(error: Exception) -> str:
    told = f": {str(error)[:200]}" if type(error) is ValueError else ""
    # A type is what torch can be told of; of any other file that advice would lead astray.
    is_of_types = told.startswith(": it names") or isinstance(error, pickle.UnpicklingError)
    advice = (
        " Name the types in it that you trust by torch.serialization.add_safe_globals, in Python."
        if is_of_types
        else ""
    )
    return f"is damaged, or no checkpoint of weights and plain types{told}.{advice}"


def _trusted() -> set[str]:
    """Return the types that the user has named to torch; torch's own names are not the user's."""
    types = [
        entry if isinstance(entry, tuple) else (entry, "") for entry in torch.serialization.get_safe_globals()
    ]
    names = {
        name.rpartition(".")[::2] if name else (kind.__module__, kind.__qualname__) for kind, name in types
    }
    return {f"{module} {name}" for module, name in names if module.partition(".")[0] != "torch"}


def _strip_settings(content: dict[str, Any]) -> list[str]:
    """Take out the description of model and key; the names of the marks are needed before, see :func:`_strip_states`."""
    parameters = content.get("hyper_parameters")
    if not isinstance(parameters, dict) or CHECKPOINT_ENTRY not in parameters:
        return []
    del parameters[CHECKPOINT_ENTRY]
    return [f"hyper_parameters.{CHECKPOINT_ENTRY}"]


def _strip_states(content: dict[str, Any]) -> list[str]:
    """Take out the callbacks' entry and state, and what others keep of figures such as ``wm/ber``, or of this package."""
    marks = content.pop(CHECKPOINT_ENTRY, None)
    removed = [] if marks is None else [CHECKPOINT_ENTRY]
    names = [f"{name}/".lower() for name in (marks if isinstance(marks, dict) else ())]
    if len(names) > _MOST_MARKS:
        raise ValueError(
            f"`checkpoint` must have at most {_MOST_MARKS} marks in `{CHECKPOINT_ENTRY}`, got {len(names)}."
        )
    telling = (CHECKPOINT_ENTRY, *names)  # a path may tell as well: that of W&B's default project
    states = content.get("callbacks")
    states = states if isinstance(states, dict) else {}
    found = _telling(dict.values(states), telling)
    for key in list(states):
        told = str(key)
        if told.startswith(STATE_PREFIX) or _tells(told, telling) or id(states[key]) in found:
            del states[key]
            removed.append(f"callbacks.{told}")
    return removed


def _telling(values: Iterable[Any], words: Sequence[str]) -> set[int]:
    """Return the ids of values that hold one of the words, at any depth.

    Each value is looked at once, however many others hold it, and may hold itself.
    """
    pending, holders, found = list(values), dict[int, list[int]](), list[int]()
    seen = set[int]()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if _tells(value, words):
            found.append(id(value))
        for part in _parts(value):
            holders.setdefault(id(part), []).append(id(value))
            pending.append(part)
    telling = set[int]()
    while found:
        value_id = found.pop()
        if value_id not in telling:
            telling.add(value_id)
            found += holders.get(value_id, ())
    return telling


def _tells(value: Any, words: Sequence[str]) -> bool:
    lower = value.lower() if isinstance(value, str) else ""
    return any(word in lower for word in words)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]  # an attribute may hide a method
    return list(value) if isinstance(value, (list, tuple)) else []
