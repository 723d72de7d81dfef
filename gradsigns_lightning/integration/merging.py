"""Prevents Lightning from silently replacing a Trainer's callback by a module's of the same type.

A replaced callback gets no hook and the Trainer keeps no trace of it, so the merging itself is watched.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from gradsigns_lightning.integration.published import published

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_MODULE, _CLASS, _METHOD = (
    "trainer.connectors.callback_connector",
    "_CallbackConnector",
    "_attach_model_callbacks",
)


def watch_merging(kind: type) -> None:
    """From now on raise a ``ValueError`` if a callback is replaced by one of another key or other settings.

    Args:
        kind: type of the callback: :class:`GradSigns`, whose module imports this one.
    """
    for package in _PACKAGES:
        connector: Any = getattr(sys.modules.get(f"{package}.{_MODULE}"), _CLASS, None)
        attach = getattr(connector, _METHOD, None)
        if attach is not None and not hasattr(attach, "_gradsigns"):
            setattr(connector, _METHOD, _watched(attach, kind))


def _watched(attach: Callable[[Any], None], kind: type) -> Callable[[Any], None]:
    @functools.wraps(attach)
    def attach_and_compare(connector: Any) -> None:
        trainer = connector.trainer
        before = list(trainer.callbacks)
        attach(connector)
        given = [callback for callback in before if isinstance(callback, kind)]
        brought = [
            callback for callback in trainer.callbacks if isinstance(callback, kind) and callback not in given
        ]
        # brought by the module that this Trainer fitted last, which may be another
        earlier = vars(connector).setdefault("_gradsigns_brought", [])
        try:
            _refuse_dropped([c for c in given if c not in trainer.callbacks and c not in earlier], brought)
        except ValueError:
            trainer.callbacks = before
            raise
        earlier.extend(brought)

    vars(attach_and_compare)["_gradsigns"] = True
    return attach_and_compare


def _refuse_dropped(dropped: list[Any], brought: list[Any]) -> None:
    """Raise a ``ValueError`` if no brought callback has the key and settings of a dropped one."""
    for callback in dropped:
        if any(_settings(callback) == _settings(other) for other in brought):
            continue
        same = next((other for other in brought if other.key.commitment == callback.key.commitment), None)
        by = "the module's own" if same is None else "the module's own with the same key and other settings"
        keys = ", ".join(other.key.commitment for other in brought)
        raise ValueError(
            f"The Trainer's GradSigns callback of the key {callback.key.commitment} would be dropped, "
            f"because Lightning replaces it by {by} ({_differences(callback, same) if same else keys}): let "
            "the module bring both, each with a `name` of its own (`sign_with(key, name=...)` or "
            "`configure_callbacks`), or leave one of them out."
        )


def _settings(callback: Any) -> dict[str, Any]:
    private = {
        "name": callback.name,
        "n_val_images": callback.reader.n_images,
        "carrier_layer": callback.reader.carrier_layer,
    }
    return {**private, **published(callback.watermarker)}


def _differences(callback: Any, other: Any) -> str:
    before, after = _settings(callback), _settings(other)
    return "; ".join(
        f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]
    )
