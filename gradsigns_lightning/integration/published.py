"""What loggers and checkpoints may hold about a signed model: settings and commitment, never the secret."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from gradsigns_lightning.core.utils.text import printable
from gradsigns_lightning.core.watermarker import Watermarker


def published(marker: Watermarker) -> dict[str, Any]:
    """Return the public settings of a watermarker, as plain types."""
    engine = marker.settings.engine
    return {
        "commitment": marker.key.commitment,
        "n_bits": marker.key.n_bits,
        "target_class": marker.key.target_class,
        "strength": str(marker.schedule),
        "objective": str(marker.objective),
        "engine": engine if isinstance(engine, str) else engine.name,
        "cadence": str(marker.cadence),
        "n_images": marker.settings.n_images,
        "momentum": marker.settings.momentum,
    }


def warn_of_changes(name: str, marker: Watermarker, saved: Mapping[str, Any] | None) -> None:
    """Warn of settings that differ from those in the checkpoint from which a training resumes.

    Args:
        name: the callback's.
        marker: the watermarker.
        saved: what :func:`published` returned when the checkpoint was written; None if it holds no mark.
    """
    if not saved:
        return
    now = published(marker)
    changed = [
        f"{k}: {printable(str(saved.get(k)), limit=80)} -> {now[k]}" for k in now if saved.get(k) != now[k]
    ]
    if changed:
        warnings.warn(
            f"GradSigns {name!r} differs from the checkpoint: {'; '.join(changed)}.",
            UserWarning,
            stacklevel=2,
        )
