"""What configuration groups stand for where the value that is not given follows the training or the key."""

from __future__ import annotations

from gradsigns_lightning.core import Cadence, MarginObjective
from gradsigns_lightning.core.objective import Objective


def cadence(every_n_steps: int | None = None, max_backoff: int = 4) -> Cadence | None:
    """Return a cadence, or None, which lets :class:`~gradsigns_lightning.GradSigns` follow the training's length.

    Args:
        every_n_steps: see :class:`Cadence`; None for the training's.
        max_backoff: likewise; without ``every_n_steps`` it is not used.

    Raises:
        ValueError: a value is out of range.
    """
    return None if every_n_steps is None else Cadence(every_n_steps, max_backoff=max_backoff)


def margin_objective(margin: float | None = None) -> str | Objective:
    """Return the objective ``"margin"``, with a margin that the key can reach unless one is given.

    Raises:
        ValueError: the margin is out of range.
    """
    return "margin" if margin is None else MarginObjective(margin)
