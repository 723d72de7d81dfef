"""The settings of embedding and their defaults, in one place.

Callback, mixin, Fabric and watermarker take them from here; the group `watermark` of ``gradsigns train``
repeats them, and a test compares the two. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradsigns_lightning.core.schedule import DEFAULT_STRENGTH, Cadence, StrengthSchedule
from gradsigns_lightning.core.utils.checks import check_int, check_number

if TYPE_CHECKING:
    from gradsigns_lightning.core.engines import Engine
    from gradsigns_lightning.core.objective import Objective

AUTO = "auto"


@dataclass(frozen=True)
class EmbeddingSettings:
    """How a mark is embedded.

    Args:
        strength: schedule of the embedding strength, or a number for a constant one: the length of the mark's
            gradient in an embedding step, in lengths of the task's gradient. It grows while bits are missing
            and the cadence hurries, by default up to 4.8 times. The default cadence also holds it back: to a
            fifth of the task's gradient, averaged over all steps, while the network does not know the target
            class; and down to zero as the margins are reached (docs/dose.md).
        objective: ``"margin"``, ``"paper"`` or an :class:`~gradsigns_lightning.core.objective.Objective`.
        engine: ``"auto"``, ``"double_backward"``, ``"forward_over_reverse"``, ``"finite_difference"``, or an
            :class:`~gradsigns_lightning.core.engines.base.Engine`.
        cadence: interval between embedding steps, or a number of optimizer steps; None for
            :meth:`Cadence.following`.
        n_images: images of the target class in one embedding step, on each rank; at least 1.
        momentum: weight of the previous embedding steps in the mean gradient to which the objective is
            applied, in [0, 1); what counts is the class's mean, of which one small batch is a noisy sample.
        carrier_layer: name of the submodule whose output carries the mark, for networks whose input is not
            differentiable (the embedding of a text classifier); None for the input itself.

    Raises:
        ValueError: a number is out of range. The :class:`Watermarker` checks what depends on key or network.
    """

    strength: float | StrengthSchedule = DEFAULT_STRENGTH
    objective: str | Objective = "margin"
    engine: str | Engine = AUTO
    cadence: int | Cadence | None = None
    n_images: int = 32
    momentum: float = 0.5
    carrier_layer: str | None = None

    def __post_init__(self) -> None:
        self.make_schedule()
        self.make_cadence()
        check_int("n_images", self.n_images, minimum=1)
        if check_number("momentum", self.momentum, minimum=0) >= 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {self.momentum}.")

    def make_schedule(self) -> StrengthSchedule:
        """Return the schedule of the strength."""
        return (
            self.strength if isinstance(self.strength, StrengthSchedule) else StrengthSchedule(self.strength)
        )

    def make_cadence(self) -> Cadence:
        """Return the interval between embedding steps."""
        if self.cadence is None:
            return Cadence.following()
        return self.cadence if isinstance(self.cadence, Cadence) else Cadence(self.cadence)


DEFAULTS = EmbeddingSettings()
