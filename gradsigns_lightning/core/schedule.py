"""When to embed and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

from gradsigns_lightning.core.checks import check_int, check_number


@dataclass(frozen=True)
class StrengthSchedule:
    """Embedding strength over training: constant, with a linear warm-up, from a given epoch on.

    Args:
        strength: weight of the embedding loss beside the task's loss, at least 0; 0 turns embedding off.
        warmup_steps: optimizer steps over which the strength rises linearly from 0, counted from the first embedding step.
        start_epoch: first epoch (from 0) that embeds.
    """

    strength: float = 0.4
    warmup_steps: int = 0
    start_epoch: int = 0

    def __post_init__(self) -> None:
        check_number("strength", self.strength, minimum=0)
        check_int("warmup_steps", self.warmup_steps, minimum=0)
        check_int("start_epoch", self.start_epoch, minimum=0)

    def at(self, *, epoch: int, steps_since_start: int) -> float:
        """Return the strength in ``epoch``, ``steps_since_start`` optimizer steps after the first embedding step."""
        if epoch < self.start_epoch:
            return 0.0
        if steps_since_start >= self.warmup_steps:
            return self.strength
        return self.strength * (steps_since_start + 1) / (self.warmup_steps + 1)


@dataclass(frozen=True)
class Cadence:
    """Embed every ``every_n_steps`` optimizer steps; back off while all margins hold.

    Args:
        every_n_steps: interval between embedding steps while bits are missing, at least 1.
        max_backoff: factor by which the interval may grow (it doubles each time that nothing is left to embed and falls back at
            once when a margin is lost), at least 1; 1 never backs off.
    """

    every_n_steps: int = 80
    max_backoff: int = 4

    def __post_init__(self) -> None:
        check_int("every_n_steps", self.every_n_steps, minimum=1)
        check_int("max_backoff", self.max_backoff, minimum=1)

    @classmethod
    def for_training_of(cls, n_steps: float) -> Cadence:
        """Return the default cadence for a training of ``n_steps`` optimizer steps (infinity if unknown).

        Every 80 steps costs less than two percent of time; short trainings embed more often, to have some 70 embedding steps.
        """
        return cls(every_n_steps=int(min(max(n_steps / 70, 1), 80)))

    def next_interval(self, interval: int, *, satisfied: bool) -> int:
        """Return the interval to the next embedding step."""
        return min(2 * interval, self.every_n_steps * self.max_backoff) if satisfied else self.every_n_steps
