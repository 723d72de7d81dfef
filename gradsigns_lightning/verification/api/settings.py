"""How a prediction API is read: what must be fixed in advance for a reading to count."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from reprlib import repr as short
from typing import Any, Literal, get_args

from gradsigns_lightning.core.result import DEFAULT_ALPHA, check_alpha
from gradsigns_lightning.core.utils.checks import check_choice, check_int

Estimator = Literal["groups", "rows", "coordinate"]
Kind = Literal["probabilities", "log_probabilities", "logits", "labels"]  # of responses
_IN_FILES: dict[Estimator, str] = {"groups": "blocks", "rows": "rows", "coordinate": "coordinate"}
_MOST_QUERIES = 10**12  # a number in a foreign journal may have any length
_MOST_ALIGNMENTS = 256
_NAMED_ALIGNMENTS = ("identity", "hflip")
_SHIFT = re.compile(r"shift\(([+-]?[0-9]{1,2}),([+-]?[0-9]{1,2})\)")


@dataclass(frozen=True)
class ApiSettings:
    """The settings of :func:`verify_api` on which a reading's evidence depends.

    A claimant who could choose them afterwards would have as many tries as there are choices, so the public
    commitment states them.

    Attributes:
        estimator: ``"groups"``, ``"rows"`` or ``"coordinate"``.
        answers: kind of the answers, or None to find it from them.
        alignments: alignments that are tested; the p-value is corrected for their number.
        batch_size: most images in one call.
        max_queries: most images that may be sent to the model, at most 10^12.
        alpha: significance level at which reading stops.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has the wrong type.
    """

    estimator: Estimator = "groups"
    answers: Kind | None = None
    alignments: tuple[str, ...] = ("identity",)
    batch_size: int = 32
    max_queries: int = 1000
    alpha: float = DEFAULT_ALPHA

    def __post_init__(self) -> None:
        check_choice("estimator", self.estimator, get_args(Estimator))
        if self.answers is not None:
            check_choice("answers", self.answers, get_args(Kind))
        check_int("batch_size", self.batch_size, minimum=1)
        check_int("max_queries", self.max_queries, minimum=1, maximum=_MOST_QUERIES)
        check_alpha(self.alpha)
        object.__setattr__(self, "alignments", _checked_alignments(self.alignments))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ApiSettings:
        """Read what :meth:`to_dict` returned.

        Raises:
            ValueError: a value is missing, unknown or out of range.
        """
        names = {entry.name for entry in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise ValueError(f"`reading` must have the members {sorted(names)} and no other.")
        check_choice("estimator", values["estimator"], _IN_FILES.values())
        estimator = next(name for name, in_files in _IN_FILES.items() if in_files == values["estimator"])
        try:
            return cls(**{**values, "estimator": estimator})
        except TypeError as error:
            raise ValueError(f"`reading` holds a value of the wrong type: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types, under the names that statements and journals use."""
        return {**asdict(self), "estimator": _IN_FILES[self.estimator], "alignments": list(self.alignments)}


def _checked_alignments(alignments: Any) -> tuple[str, ...]:
    if (
        isinstance(alignments, str)
        or not isinstance(alignments, Sequence)
        or not 0 < len(alignments) <= _MOST_ALIGNMENTS
    ):
        allowed = f"a non-empty sequence of at most {_MOST_ALIGNMENTS} names"
        raise ValueError(f"`alignments` must be {allowed}, got {short(alignments)}.")
    for name in alignments:
        if name not in _NAMED_ALIGNMENTS:
            shift_of(name)
    return tuple(dict.fromkeys(alignments))


def shift_of(alignment: Any) -> tuple[int, int]:
    """Return by how many pixels the alignment ``"shift(dy,dx)"`` moves images down and to the right.

    Raises:
        ValueError: ``alignment`` does not name an alignment.
    """
    match = _SHIFT.fullmatch(alignment.replace(" ", "")) if isinstance(alignment, str) else None
    if match is None:
        raise ValueError(
            f"`alignments` must be 'identity', 'hflip' or 'shift(dy,dx)', got {short(alignment)}."
        )
    return int(match[1]), int(match[2])
