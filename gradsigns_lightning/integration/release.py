"""Strips a checkpoint that is to be given away of what announces that it is signed."""

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
_MOST_MARKS = 64  # every string is searched for the name of each mark


def strip(
    checkpoint: str | PathLike[str], out: str | PathLike[str], *, overwrite: bool = False
) -> tuple[str, ...]:
    """Write a copy of a Lightning checkpoint in which nothing says that the model is signed.

    Left out are the callback's settings and state, and with them the commitment and the target class; what
    ``gradsigns train`` recorded about the model; and the state of callbacks that monitor one of the mark's
    figures (a ``ModelCheckpoint`` of ``wm/ber``) or name this package in a path (that of W&B's project).
    Everything else is kept, the weights too, so Lightning loads the copy. ``gradsigns verify`` does not: keep
    the original, or verify in Python.

    Args:
        checkpoint: the checkpoint; it is read with ``weights_only=True``, so no code in it runs. Reading
            takes at most the memory of a few copies of the file, and time in proportion to its length. Types
            that you registered with ``torch.serialization.add_safe_globals`` are read as torch reads them.
        out: the copy; written in one atomic step.
        overwrite: whether ``out`` may be replaced.

    Returns:
        Names of what was left out, as ``callbacks.GradSigns[...]``; empty if nothing announced a mark.

    Raises:
        ValueError: ``checkpoint`` is not a Lightning checkpoint of weights and plain types; ``out`` exists
            and must not be replaced, or cannot be written.

    Example:
        >>> removed = strip("signed.ckpt", "release.ckpt")  # doctest: +SKIP
    """
    check_target(out, argument="out", overwrite=overwrite)
    content = _read(Path(checkpoint).expanduser())
    removed = [*_strip_settings(content), *_strip_states(content)]
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
    # an attribute hides a method, or a trusted type holds values that are nested too deep
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
    except Exception as error:  # torch's errors about a damaged file have no common base class
        raise ValueError(f"`checkpoint`: {str(file)!r} {_why_unread(error)}") from error
    content = dict(dict.items(content)) if isinstance(content, dict) else {}  # an attribute may hide a method
    if "state_dict" not in content:
        raise ValueError(
            f"`checkpoint`: {str(file)!r} has no `state_dict`; it is not a Lightning checkpoint."
        )
    return content


def _why_unread(error: Exception) -> str:
    reason = f": {str(error)[:200]}" if type(error) is ValueError else ""
    # The advice is only about types; for any other fault it would be misleading.
    is_of_types = reason.startswith(": it names") or isinstance(error, pickle.UnpicklingError)
    advice = (
        " Register the types in it that you trust with torch.serialization.add_safe_globals, in Python."
        if is_of_types
        else ""
    )
    return f"is damaged, or not a checkpoint of weights and plain types{reason}.{advice}"


def _trusted() -> set[str]:
    """Return the types that the user has registered with torch, without torch's own."""
    types = [
        entry if isinstance(entry, tuple) else (entry, "") for entry in torch.serialization.get_safe_globals()
    ]
    names = {
        name.rpartition(".")[::2] if name else (kind.__module__, kind.__qualname__) for kind, name in types
    }
    return {f"{module} {name}" for module, name in names if module.partition(".")[0] != "torch"}


def _strip_settings(content: dict[str, Any]) -> list[str]:
    """Remove the description of model and key from the hyperparameters."""
    parameters = content.get("hyper_parameters")
    if not isinstance(parameters, dict) or CHECKPOINT_ENTRY not in parameters:
        return []
    del parameters[CHECKPOINT_ENTRY]
    return [f"hyper_parameters.{CHECKPOINT_ENTRY}"]


def _strip_states(content: dict[str, Any]) -> list[str]:
    """Remove the callbacks' entry and states, and the states that mention their figures or this package."""
    marks = content.pop(CHECKPOINT_ENTRY, None)
    removed = [] if marks is None else [CHECKPOINT_ENTRY]
    names = [f"{name}/".lower() for name in (marks if isinstance(marks, dict) else ())]
    if len(names) > _MOST_MARKS:
        raise ValueError(
            f"`checkpoint` must have at most {_MOST_MARKS} marks in `{CHECKPOINT_ENTRY}`, got {len(names)}."
        )
    words = (CHECKPOINT_ENTRY, *names)  # of this package too, which W&B's default project has in its path
    states = content.get("callbacks")
    states = states if isinstance(states, dict) else {}
    holders = _holders(dict.values(states), words)
    for key in list(states):
        name = str(key)
        if name.startswith(STATE_PREFIX) or _mentions(name, words) or id(states[key]) in holders:
            del states[key]
            removed.append(f"callbacks.{name}")
    return removed


def _holders(values: Iterable[Any], words: Sequence[str]) -> set[int]:
    """Return the ids of values that hold one of the words, at any depth.

    Each value is visited once, however many others hold it. It may hold itself.
    """
    pending, parents, found = list(values), dict[int, list[int]](), list[int]()
    seen = set[int]()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if _mentions(value, words):
            found.append(id(value))
        for part in _parts(value):
            parents.setdefault(id(part), []).append(id(value))
            pending.append(part)
    holders = set[int]()
    while found:
        value_id = found.pop()
        if value_id not in holders:
            holders.add(value_id)
            found += parents.get(value_id, ())
    return holders


def _mentions(value: Any, words: Sequence[str]) -> bool:
    lower = value.lower() if isinstance(value, str) else ""
    return any(word in lower for word in words)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]  # an attribute may hide a method
    return list(value) if isinstance(value, (list, tuple)) else []
