"""When to embed and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

from gradsigns_lightning.core.utils.checks import check_int, check_number

DEFAULT_STRENGTH = 1.0
# Shortest interval in steps, unless the user sets 1: right after an embedding step another one adds little.
_SHORTEST = 2


@dataclass(frozen=True)
class StrengthSchedule:
    """Embedding strength over training: constant from a given epoch on, after a linear warm-up.

    Args:
        strength: length of the mark's gradient in an embedding step, in lengths of the task's gradient, at
            least 0; 0 turns embedding off.
        warmup_steps: optimizer steps over which the strength rises linearly from 0, counted from the first
            embedding step.
        start_epoch: first epoch (from 0) that embeds.
    """

    strength: float = DEFAULT_STRENGTH
    warmup_steps: int = 0
    start_epoch: int = 0

    def __post_init__(self) -> None:
        check_number("strength", self.strength, minimum=0)
        check_int("warmup_steps", self.warmup_steps, minimum=0)
        check_int("start_epoch", self.start_epoch, minimum=0)

    def at(self, *, epoch: int, steps_since_start: int) -> float:
        """Return the strength at a point of the training.

        Args:
            epoch: epoch, from 0.
            steps_since_start: optimizer steps since the first embedding step.
        """
        if epoch < self.start_epoch:
            return 0.0
        if steps_since_start >= self.warmup_steps:
            return self.strength
        return self.strength * (steps_since_start + 1) / (self.warmup_steps + 1)


@dataclass(frozen=True)
class Cadence:
    """The interval between embedding steps, and how it adapts.

    It shrinks while bits are missing, and grows while all margins hold.

    Args:
        every_n_steps: interval between embedding steps in optimizer steps, at least 1.
        max_backoff: factor by which the interval may grow (it doubles each time that all margins are ample,
            and is reset as soon as one is not), at least 1; 1 never backs off. With ``growth`` it applies
            only after ``every_n_steps / growth`` steps; until then the interval grows with the training.
        max_hurry: factor by which the interval may shrink (it is halved each time that a bit is missing), at
            least 1; 1 never hurries.
        growth: upper bound of the interval as a share of the steps since embedding began, so that a training
            may end at any time; above 0, at most 1; None for a fixed interval.
    """

    every_n_steps: int = 80
    max_backoff: int = 4
    max_hurry: int = 1
    growth: float | None = None

    def __post_init__(self) -> None:
        check_int("every_n_steps", self.every_n_steps, minimum=1)
        check_int("max_backoff", self.max_backoff, minimum=1)
        check_int("max_hurry", self.max_hurry, minimum=1)
        if self.growth is not None and not 0 < check_number("growth", self.growth) <= 1:
            raise ValueError(f"`growth` must be above 0 and at most 1, got {self.growth}.")

    @classmethod
    def following(cls) -> Cadence:
        """Return the default cadence, which follows the training.

        It embeds every 80 steps from the 1,000th on, and more often before.
        """
        return cls(max_hurry=8, growth=0.08)

    def interval(self, steps: int, factor: float) -> int:
        """Return the interval to the next embedding step.

        Args:
            steps: optimizer steps since embedding began.
            factor: how much longer than usual it is, from :meth:`next_factor`.
        """
        longest = self.every_n_steps * max(1.0, factor)
        usual = longest if self.growth is None else min(longest, self.growth * steps)
        return max(min(_SHORTEST, self.every_n_steps), int(usual * min(1.0, factor)))

    def next_factor(self, factor: float, *, missing: bool, safe: bool, satisfied: bool) -> float:
        """Return how much longer than usual the next interval is.

        Args:
            factor: factor of the last interval.
            missing: a bit was wrong, or nearly.
            safe: no bit was close to wrong.
            satisfied: nothing needed to be embedded.
        """
        if missing:
            return max(min(factor, 1.0) / 2, 1 / self.max_hurry)
        if satisfied:
            return min(2 * factor, float(self.max_backoff))
        return min(2 * factor, 1.0) if safe else min(factor, 1.0)
