"""Several optimizers, which may all step in each batch, or take turns."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Turns:
    """Which optimizers step in the batches that embed; each batch and step makes a new one.

    Where they take turns, a mark's gradient moves the parameters of the one alone whose turn it is, and an
    interval that is a multiple of their number would meet the same one each time.

    Attributes:
        known: optimizers that made steps.
        met: of them, those that stepped in a batch that embeds.
        takers: those that stepped in the last batch that embedded.
        is_marked: whether the batch that is open embeds.
        batch: its first optimizer step.
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
        """Optimizers that made steps, but none in a batch that embeds."""
        return sorted(self.known - self.met)

    def opening(self, step: int) -> Turns:
        """Return the state in a batch whose first optimizer step is ``step``; accumulated ones are one."""
        if step == self.batch:
            return self
        length = self.length if self.batch is None or step < self.batch else step - self.batch
        return replace(self, batch=step, length=length, is_marked=False)

    def marking(self) -> Turns:
        """Return the state when the open batch embeds."""
        return replace(self, takers=frozenset(), is_marked=True)

    def closing(self) -> Turns:
        """Return the state when the batch is over; if no optimizer has stepped, its gradients are accumulated further."""
        return replace(self, is_marked=False) if self.takers and self.is_marked else self

    def takes(self, optimizer: int) -> bool:
        """Return whether the mark is in an optimizer's next gradient: in its first of a batch that embeds."""
        return self.is_marked and optimizer not in self.takers

    def noting(self, optimizer: int) -> Turns:
        """Return the state after a step of an optimizer."""
        if not self.takes(optimizer):
            return self if optimizer in self.known else replace(self, known=self.known | {optimizer})
        one = {optimizer}
        return replace(self, known=self.known | one, takers=self.takers | one, met=self.met | one)

    def interval(self, usual: int, n_embedded: int) -> int:
        """Return the interval after ``n_embedded`` embedding steps.

        One step longer than usual after as many as there are optimizers, where they take turns: whatever it
        is, each is met in turn then.
        """
        n = len(self.known)
        return usual + int(len(self.takers) < n and n > 1 and usual > 1 and n_embedded % n == n - 1)

    def whole_batches(self, steps: int) -> int:
        """Return ``steps``, or as many more as it takes to the beginning of a batch."""
        return -(-steps // self.length) * self.length
