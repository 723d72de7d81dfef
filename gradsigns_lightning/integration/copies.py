"""What becomes of a callback when the module that brings it is copied or pickled, also in the middle of a fit."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from multiprocessing.context import get_spawning_popen
from typing import Any

from typing_extensions import Self


class LeavesNoKeyBehind(ABC):
    """Goes along to deep copies, and to processes that this one starts, but not into files.

    A class that derives from it has ``brought``, whether a module brings the callback, and
    :meth:`_outside_a_fit`.
    """

    brought: bool

    @abstractmethod
    def _outside_a_fit(self) -> dict[str, Any]:
        """Return the attributes that are other ones, or None, when nothing is fitted."""

    def __copy__(self) -> Self:
        return self._with(vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = self._with({})
        vars(copied).update(copy.deepcopy(vars(self) | self._outside_a_fit(), memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.brought and get_spawning_popen() is None:
            return type(None), ()  # a saved module has None in its place, and says so if it is fitted
        return super().__reduce_ex__(protocol)

    def _with(self, attributes: dict[str, Any]) -> Self:
        new = type(self).__new__(type(self))
        vars(new).update(attributes)
        return new
