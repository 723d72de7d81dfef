"""Dating: when a key was committed to, and whether that was before the suspect existed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone

from gradsigns_lightning.core.utils.checks import check_instance
from gradsigns_lightning.evidence.commitment import Statement
from gradsigns_lightning.evidence.timestamp import check_timestamp


@dataclass(frozen=True)
class Dating:
    """What the judge knows of the time of a commitment.

    Attributes:
        committed_at: when the time-stamp authority saw the commitment, in UTC; None without a time-stamp, or
            without the authority's certificates.
        precedes_suspect: whether that was before the suspect existed; None if the judge did not say since
            when it is known.
    """

    committed_at: datetime | None
    precedes_suspect: bool | None


def date_statement(
    statement: Statement, timestamp: bytes | None, *, authority: bytes | None, suspect_since: datetime | None
) -> Dating:
    """Date a published statement by its time-stamp, and compare the date with the suspect's.

    Args:
        statement: what was published.
        timestamp: the authority's reply, DER, or None.
        authority: certificates that the judge trusts, PEM; without them a time-stamp counts for nothing.
        suspect_since: when the suspect is first known to have existed, with time zone.

    Raises:
        ValueError: the time-stamp is not genuine, or ``suspect_since`` has no time zone.
        TypeError: ``suspect_since`` is not a :class:`datetime.datetime`.
    """
    since = _aware(suspect_since) if suspect_since is not None else None
    committed_at = check_timestamp(timestamp, statement, authority) if timestamp and authority else None
    return Dating(committed_at, None if since is None else committed_at is not None and committed_at < since)


def _aware(time: datetime) -> datetime:
    check_instance("suspect_since", time, datetime)
    if time.tzinfo is None:
        raise ValueError(f"`suspect_since` must have a time zone, got {time.isoformat()}.")
    return time.astimezone(timezone.utc)
