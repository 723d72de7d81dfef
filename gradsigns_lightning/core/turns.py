"""Several optimizers, which may all step in each batch, or take turns."""

from __future__ import annotations


class Turns:
    """Which optimizers step in the batches that embed.

    Where they take turns, a mark's gradient moves the parameters of the one alone whose turn it is, and an interval that is a
    multiple of their number would meet the same one each time.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all steps."""
        self._known: set[int] = set()
        self._met: set[int] = set()
        self._takers: set[int] = set()  # those that stepped in the last batch that embedded
        self._is_marked = False  # the batch that is open embeds
        self._batch: int | None = None  # its first optimizer step
        self._length = 1  # optimizer steps of the batch before

    @property
    def left_out(self) -> list[int]:
        """Optimizers that made steps, but none in a batch that embeds."""
        return sorted(self._known - self._met)

    def open_batch(self, step: int) -> None:
        """Note a batch whose first optimizer step is ``step``; accumulated ones are one."""
        if step == self._batch:
            return
        if self._batch is not None and step > self._batch:
            self._length = step - self._batch
        self._batch, self._is_marked = step, False

    def mark(self) -> None:
        """Note that the open batch embeds."""
        self._takers, self._is_marked = set(), True

    def close_batch(self) -> None:
        """Note that the batch is over, unless no optimizer has stepped: then its gradients are accumulated further."""
        if self._takers:
            self._is_marked = False

    def take_back(self) -> None:
        """Note that the open batch does not embed after all."""
        self._is_marked = False

    def note(self, optimizer: int) -> bool:
        """Note a step of an optimizer, and return whether the mark is in its gradient: in its first of a batch that embeds."""
        self._known.add(optimizer)
        if not self._is_marked or optimizer in self._takers:
            return False
        self._takers.add(optimizer)
        self._met.add(optimizer)
        return True

    def interval(self, usual: int, n_embedded: int) -> int:
        """Return the interval after ``n_embedded`` embedding steps.

        One step longer than usual after as many as there are optimizers, where they take turns: whatever it is, each is met in
        turn then.
        """
        n = len(self._known)
        return usual + int(len(self._takers) < n and n > 1 and usual > 1 and n_embedded % n == n - 1)

    def whole_batches(self, steps: int) -> int:
        """Return ``steps``, or as many more as it takes to the beginning of a batch."""
        return -(-steps // self._length) * self._length
