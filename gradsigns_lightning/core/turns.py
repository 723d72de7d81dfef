"""Which optimizers step in which batches: all of them in each, or in turns."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Turns:
    """Which optimizers step in the batches that embed; immutable, each batch and step makes a new one.

    Where optimizers take turns, the mark's gradient moves only the parameters of the one whose turn it is,
    and with an interval that is a multiple of their number it would be the same one each time.

    Attributes:
        known: optimizers that have made steps.
        met: those of them that have stepped in a batch that embeds.
        takers: those that stepped in the last batch that embedded.
        is_marked: whether the open batch embeds.
        batch: first optimizer step of the open batch.
        length: optimizer steps of the batch before.
    """

    known: frozenset[int] = frozenset()
    met: frozenset[int] = frozenset()
    takers: frozenset[int] = frozenset()
    is_marked: bool = False
    batch: int | None = None
    length: int = 1

    @property
    def left_out(self) -> list[int]:
        """Optimizers that have made steps, but none in a batch that embeds."""
        return sorted(self.known - self.met)

    def opening(self, step: int) -> Turns:
        """Return the state in a batch that begins with optimizer step ``step``; accumulated ones are one."""
        if step == self.batch:
            return self
        length = self.length if self.batch is None or step < self.batch else step - self.batch
        return replace(self, batch=step, length=length, is_marked=False)

    def marking(self) -> Turns:
        """Return the state after marking the open batch as one that embeds."""
        return replace(self, takers=frozenset(), is_marked=True)

    def closing(self) -> Turns:
        """Return the state after the batch, which goes on if no optimizer stepped: gradients accumulate."""
        return replace(self, is_marked=False) if self.takers and self.is_marked else self

    def takes(self, optimizer: int) -> bool:
        """Return whether an optimizer's next step contains the mark: its first in a batch that embeds."""
        return self.is_marked and optimizer not in self.takers

    def noting(self, optimizer: int) -> Turns:
        """Return the state after a step of an optimizer."""
        if not self.takes(optimizer):
            return self if optimizer in self.known else replace(self, known=self.known | {optimizer})
        one = {optimizer}
        return replace(self, known=self.known | one, takers=self.takers | one, met=self.met | one)

    def interval(self, usual: int, n_embedded: int) -> int:
        """Return the interval after ``n_embedded`` embedding steps.

        Where n optimizers take turns, every n-th interval is one step longer than usual, so that each of them
        is met in turn whatever the interval is.
        """
        n = len(self.known)
        return usual + int(len(self.takers) < n and n > 1 and usual > 1 and n_embedded % n == n - 1)

    def whole_batches(self, steps: int) -> int:
        """Return ``steps``, rounded up to whole batches."""
        return -(-steps // self.length) * self.length
