"""The settings of embedding, with their defaults: the only list of them.

Callback, mixin, Fabric and watermarker take them from here; the group `watermark` of ``gradsigns train``
repeats them, and a test compares. Nothing here imports torch.
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
            gradient in a step that embeds, in lengths of the task's gradient. While bits are missing and the
            cadence hurries, it grows with the hurry: by default up to 4.8 times. The default cadence also
            holds it back: while the network does not know the target class, to a fifth of the task's pull,
            averaged over all steps, and towards the margin, to nothing (docs/dose.md).
        objective: ``"margin"``, ``"paper"`` or an object of that protocol.
        engine: ``"auto"``, ``"double_backward"``, ``"forward_over_reverse"``, ``"finite_difference"``, or an
            object of that protocol.
        cadence: interval between embedding steps, or a number of optimizer steps; None for
            :meth:`Cadence.following`.
        n_images: images of the target class in one embedding step, on each rank; at least 1.
        momentum: share of the previous embedding steps' mean gradient in the one that is held to the bits, 0
            up to 1 (exclusive); what counts is the class's mean, of which one small batch is a noisy sample.
        carrier_layer: name of the submodule whose output carries the mark, for networks whose input is not
            differentiable (the embedding of a text classifier); None for the input itself.

    Raises:
        ValueError: a number is out of range. What depends on key or network is checked by the
            :class:`Watermarker`.
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
