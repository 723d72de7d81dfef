"""What configuration groups stand for where the value that is not given follows the key."""

from __future__ import annotations

from gradsigns_lightning.core.objective import MarginObjective, Objective


def margin_objective(margin: float | None = None) -> str | Objective:
    """Return the objective ``"margin"``, with a margin that the key can reach unless one is given.

    Raises:
        ValueError: the margin is out of range.
    """
    return "margin" if margin is None else MarginObjective(margin)
