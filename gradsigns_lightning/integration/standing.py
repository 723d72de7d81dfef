"""How the mark stands at the end of a fit: a line for the console, and figures for the loggers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info

from gradsigns_lightning.core.distributed import all_ranks_agree
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.key.payload import free_bits
from gradsigns_lightning.core.key.reach import USUAL_ALPHA, for_whom, log10_charged
from gradsigns_lightning.core.result import BitCounts, count_bits, is_recognised, verdict_of
from gradsigns_lightning.core.signature import LogitsFn
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.reading import HeldOutEstimator
from gradsigns_lightning.integration.sharding import inside_forward, is_sharded
from gradsigns_lightning.integration.unlogged import unlogged
from gradsigns_lightning.integration.weights import are_weights_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

# Counts among the logged figures.
_COUNTS = ("erasures", "images", "held_out", "embedded", "steps_since", "replaced", "held_back")


@dataclass(frozen=True)
class Standing(BitCounts):
    """How a mark stands at the end of a fit; ``str`` returns it as one line.

    Attributes:
        n_bits: bits of the key.
        n_matches: bits that are held.
        n_erasures: bits that the gradient does not decide.
        margin: smallest ``(2 b_j - 1) z_j``, in standard deviations of an unmarked model's z.
        n_images: images that were read, on all ranks.
        recognised: share of those images that the model recognises as the target class.
        held_out: whether they are validation images; if not, they are the last training images of the class.
        n_embedded: embedding steps of the fit.
        n_steps_since: optimizer steps from the reading to the end of the fit.
        replaced: whether the weights were replaced after the reading by others that could not be read.
        n_held_back: embedding steps at a lower dose than the missing bits called for, because the network did
            not know the class.
        free_bits: bits of choice that the key's payload and purpose left to its maker, for whom p-value and
            ``owned`` hold; others charge them, see :class:`~gradsigns_lightning.VerificationResult`.
    """

    margin: float
    n_images: int
    recognised: float
    held_out: bool
    n_embedded: int
    n_steps_since: int = 0
    replaced: bool = False
    n_held_back: int = 0
    free_bits: float = 0.0

    @property
    def log10_charged_p_value(self) -> float:
        """Base-10 logarithm of the p-value times ``2 ** free_bits``, at most 0."""
        return log10_charged(self.log10_p_value, free_bits=self.free_bits)

    @property
    def owned(self) -> bool:
        """Whether ``verify`` would find the model ``owned`` at its default alpha if it read the same bits."""
        return verdict_of(self.p_value, USUAL_ALPHA, self.recognised) == "owned"

    @property
    def is_recognised(self) -> bool:
        """Whether the model recognises enough of the images; if not, ``verify`` concludes nothing."""
        return is_recognised(self.recognised)

    def __str__(self) -> str:
        """Return the standing as one line."""
        where = f"on {self.n_images} {'held-out' if self.held_out else 'training'} images"
        where += "" if self.is_recognised else f" (only {self.recognised:.0%} of which the model recognises)"
        since = f", {self.n_steps_since} steps before the end" if self.n_steps_since else ""
        since += ", before the weights were replaced" if self.replaced else ""
        whose = for_whom(self.log10_p_value, free_bits=self.free_bits, alpha=USUAL_ALPHA)
        verdict = (
            f"owned at alpha {USUAL_ALPHA:g}{whose}" if self.owned else f"not owned at alpha {USUAL_ALPHA:g}"
        )
        held_back = (
            f", {self.n_held_back} at a lower dose while the class was not known yet"
            if self.n_held_back
            else ""
        )
        erased = f" ({self.n_erasures} of {self.n_bits} undecided)" if self.n_erasures else ""
        return (
            f"{self.n_matches} of {self.n_decided} bits held{erased}, p = {self.p_value:.2g} (log10 "
            f"{self.log10_p_value:.1f}), smallest margin {self.margin:+.3f}: {verdict}; read {where}{since}, "
            f"{self.n_embedded} embedding steps{held_back}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain types."""
        derived = ("p_value", "log10_p_value", "log10_charged_p_value", "owned")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any], name: str, key: WatermarkKey) -> Standing | None:
        """Return the standing that :func:`report` left in a Trainer's metrics; None if there is none.

        The metrics are all that comes back from spawned processes.
        """
        if f"{name}/final_ber" not in metrics:
            return None
        figures = ("ber", "margin", "recognised", *_COUNTS)
        ber, margin, recognised, *counts = (float(metrics[f"{name}/final_{figure}"]) for figure in figures)
        n_erasures, n_images, held_out, n_embedded, n_steps_since, replaced, n_held_back = map(int, counts)
        n_matches = round((1 - ber) * (key.n_bits - n_erasures))
        counted = cls(
            key.n_bits, n_matches, n_erasures, margin, n_images, recognised, bool(held_out), n_embedded
        )
        return replace(
            counted,
            n_steps_since=n_steps_since,
            replaced=bool(replaced),
            n_held_back=n_held_back,
            free_bits=free_bits(key),
        )


def final_standing(
    trainer: Trainer,
    pl_module: LightningModule,
    logits_fn: LogitsFn,
    reader: HeldOutEstimator,
    marker: Watermarker,
) -> Standing | None:
    """Return how the mark stands in the final weights; all ranks must call.

    Args:
        trainer: the Trainer, after its last step.
        pl_module: the module.
        logits_fn: maps inputs to logits.
        reader: holds the last reading on held-out images, if there was one.
        marker: holds the last training images of the class.
    """
    images, valid = marker.buffer.images, marker.buffer.valid
    known = reader.margins is not None and reader.read_at == trainer.global_step
    current = known and _is_current(trainer, pl_module, reader)
    if images is None or valid is None or current:
        return last_reading(trainer, reader, marker, replaced=known and not current)
    images, valid = images.to(pl_module.device), valid.to(pl_module.device)
    own = HeldOutEstimator(marker.key, marker.projector, len(images), marker.settings.carrier_layer)
    own.start(pl_module.device)
    labels = torch.where(valid, marker.key.target_class, -1)
    with unlogged(pl_module):
        together = is_sharded(trainer)
        inside_forward(
            trainer, pl_module, lambda: own.read(pl_module, logits_fn, images, labels, always=together)
        )
    own.finish(step=trainer.global_step)
    return _standing_of(trainer, own, marker, held_out=False) or last_reading(
        trainer, reader, marker, replaced=known and not current
    )


def last_reading(
    trainer: Trainer, reader: HeldOutEstimator, marker: Watermarker, *, replaced: bool = False
) -> Standing | None:
    """Return how the mark stood when held-out images were last read; None if none were."""
    return _standing_of(trainer, reader, marker, held_out=True, replaced=replaced)


def _is_current(trainer: Trainer, pl_module: LightningModule, reader: HeldOutEstimator) -> bool:
    same = reader.lengths is None or are_weights_of(reader.lengths, pl_module)
    return all_ranks_agree(same, device=pl_module.device, world_size=trainer.world_size)


def _standing_of(
    trainer: Trainer, reader: HeldOutEstimator, marker: Watermarker, *, held_out: bool, replaced: bool = False
) -> Standing | None:
    if reader.margins is None:
        return None
    return Standing(
        **asdict(count_bits(np.array(reader.margins))),
        margin=min(reader.margins),
        n_images=reader.n_found,
        recognised=reader.recognised,
        held_out=held_out,
        n_embedded=marker.state.n_embedded,
        n_steps_since=trainer.global_step - reader.read_at,
        replaced=replaced,
        n_held_back=int(marker.state.n_held_back),
        free_bits=free_bits(marker.key),
    )


def _close_rich_bar(trainer: Trainer) -> None:
    """Close Lightning's Rich progress bar.

    On a terminal its own teardown would later wipe out what was logged below it.
    """
    bar = trainer.progress_bar_callback
    # Matched by name, because the bar may come from either of Lightning's packages.
    if bar is not None and any(kind.__name__ == "RichProgressBar" for kind in type(bar).__mro__):
        bar.teardown(trainer, trainer.lightning_module, "fit")


def report(trainer: Trainer, name: str, standing: Standing | None) -> None:
    """Write the line to rank zero's console, and the figures to the loggers and ``callback_metrics``."""
    if standing is None:
        return
    figures = {
        "ber": standing.bit_error_rate,
        "log10_p_value": standing.log10_p_value,
        "margin": standing.margin,
        "owned": float(standing.owned),
        "erasures": float(standing.n_erasures),
        "images": float(standing.n_images),
        "recognised": standing.recognised,
        "held_out": float(standing.held_out),
        "embedded": float(standing.n_embedded),
        "steps_since": float(standing.n_steps_since),
        "replaced": float(standing.replaced),
        "held_back": float(standing.n_held_back),
    }
    named = {f"{name}/final_{key}": value for key, value in figures.items()}
    # `self.log` can no longer be called here.
    trainer.callback_metrics.update(
        {key: torch.tensor(value, dtype=torch.float64) for key, value in named.items()}
    )
    if trainer.is_global_zero:
        _close_rich_bar(trainer)
        rank_zero_info(f"GradSigns {name!r}: {standing}.")
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)
