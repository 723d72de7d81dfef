"""Why a mark does not hold, and the setting that helps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from gradsigns_lightning.core.key.reach import least_bits, least_matches
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.pace import HOPELESS, cure, own_margins, pace_of
from gradsigns_lightning.integration.standing import Standing
from gradsigns_lightning.integration.undeclared import callbacks_of, is_dev_run

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_CONFIDENT = 0.7  # probability of the class below which the mark pulls less than half as hard as the task


def why_diverged(module: nn.Module) -> str | None:
    """Return a message if weights are non-finite, which looks like any other failure of a mark; else None."""
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in module.parameters()]
    finite = [part.detach().isfinite().all() for part in parts]
    # Gathered on one device, so that the host waits only once.
    if not finite or bool(torch.stack([flag.to(finite[0].device) for flag in finite]).all()):
        return None
    return (
        "the training has diverged: weights are no longer finite, so nothing can be embedded or read. Lower "
        "the learning rate, or clip the gradients (`gradient_clip_val`)."
    )


def why_idle(trainer: Trainer, marker: Watermarker, *, automatic: bool) -> str | None:
    """Return why nothing has been embedded yet; None if something has."""
    target = marker.key.target_class
    if trainer.global_step == 0:
        return "Lightning counted no optimizer step, so nothing was embedded: step `self.optimizers()`."
    if marker.state.n_embedded == 0:
        if automatic:
            return (
                "no embedding step was made: the strength was 0 throughout (`start_epoch`), or no gradient "
                "reached the optimizer's step."
            )
        return (
            "no embedding step was made: `watermark_loss` was not called, or the strength was 0 throughout "
            "(`start_epoch`)."
        )
    if not int(marker.state.n_non_finite) and own_margins(marker) is None:
        if _n_images(marker):
            return (
                f"the gradient of class {target} was zero in every embedding step, so nothing was embedded: "
                "has the training diverged (a learning rate that is too high)?"
            )
        return (
            f"the training saw no image of class {target}, so nothing was embedded: is {target} one of the "
            "labels, and in the batches that are trained on?"
        )
    return None


def _non_finite(marker: Watermarker) -> str | None:
    """Return a message if embedding steps were left out because of non-finite gradients; else None."""
    if n_non_finite := int(marker.state.n_non_finite):
        return (
            f"{n_non_finite} of {marker.state.n_embedded} embedding steps had non-finite gradients and were "
            "left out (a norm or a root at zero?)."
        )
    return None


def warn_if_not_owned(
    trainer: Trainer,
    pl_module: LightningModule,
    name: str,
    marker: Watermarker,
    standing: Standing | None,
    *,
    n_batches: int,
) -> None:
    """Warn at the end of a fit of ``n_batches`` if the model would not be ``owned``.

    The warning names likely causes and what helps.
    """
    if not marker.schedule.strength or is_dev_run(trainer):
        return
    if n_batches == 0:
        problem = (
            "this fit trained on no batch, so nothing was embedded or read: is the data loader empty, or had "
            "the checkpoint that it resumes from already reached `max_epochs`, `max_steps` or `max_time`? "
            "`verify` shows whether the model is signed."
        )
    elif diverged := why_diverged(pl_module):
        problem = diverged
    elif standing is None:
        problem = why_idle(trainer, marker, automatic=pl_module.automatic_optimization) or (
            f"no bit can be read, because the gradient of class {marker.key.target_class} is zero or "
            "non-finite at the end: has the training diverged (a learning rate that is too high)?"
        )
    elif standing.owned:
        problem = _non_finite(marker) or ""
    else:
        causes = " ".join(_causes(trainer, pl_module, marker, standing))
        problem = (
            f"the model would not be `owned` ({standing.n_matches} of {standing.n_bits} bits held). {causes}"
        )
    if problem and trainer.is_global_zero:
        warnings.warn(f"GradSigns {name!r}: {problem}", UserWarning, stacklevel=2)


def _causes(
    trainer: Trainer, pl_module: LightningModule, marker: Watermarker, standing: Standing
) -> Iterator[str]:
    if standing.n_bits < least_bits():
        yield (
            f"With a key of {standing.n_bits} bits it never is: {least_bits()} bits would do, 128 leave room "
            "for wrong bits."
        )
    if not standing.is_recognised:
        yield (
            f"It recognises only {standing.recognised:.0%} of the images of class {marker.key.target_class}, "
            "so nothing could be concluded from its bits: train until it knows the class; if it does, "
            "`GradSigns.logits` must return the logits that the loss is computed from."
        )
    if standing.n_matches == standing.n_bits:
        return
    if non_finite := _non_finite(marker):
        yield non_finite
    if _is_pruned(trainer, pl_module):
        yield (
            "Weights are pruned, which costs bits: training on with the mask in place restores them, but the "
            "fewer weights are left, the more slowly."
        )
    if left_out := _left_out(marker):
        yield left_out
    if held_back := _held_back(marker):
        yield held_back
    idle = why_idle(trainer, marker, automatic=pl_module.automatic_optimization)
    yield f"{idle[0].upper()}{idle[1:]}" if idle else _by_pace(trainer, marker, standing)


def _left_out(marker: Watermarker) -> str | None:
    """Return a message if an optimizer stepped in no batch that embeds; None if all did."""
    if not (left_out := marker.state.turns.left_out):
        return None
    return (
        f"Optimizer {left_out[0]} of `self.optimizers()` made no step in a batch that embeds, so its "
        "parameters carry nothing of the mark: call `watermark_loss` in its batches too, or choose another "
        "`cadence`."
    )


def _held_back(marker: Watermarker) -> str | None:
    """Return a message if the dose was small to the end because the network has yet to learn; else None."""
    confidence = (
        None
        if marker.state.recognised is None or marker.cadence.growth is None
        else float(marker.state.recognised)
    )
    if confidence is None or not confidence < _CONFIDENT:
        return None
    return (
        f"At the end the network gave images of class {marker.key.target_class} a probability of only "
        f"{confidence:.2f} for that class, so the mark was held back to leave it room to learn: train until "
        "it knows the class."
    )


def _by_pace(trainer: Trainer, marker: Watermarker, standing: Standing) -> str:
    own, pace = own_margins(marker), pace_of(marker)
    n_own = 0 if own is None else int((own > 0).sum())
    if n_own >= least_matches(standing.n_bits) and _has_callback(
        trainer, "WeightAveraging", "StochasticWeightAveraging"
    ):
        return (
            f"The weights in training held {n_own} bits, but their averages, which are read, have not caught "
            "up yet: train longer, or average over fewer steps (a smaller `decay`, a later start)."
        )
    if standing.held_out and n_own >= least_matches(standing.n_bits):
        return (
            f"The gradient of the training images holds {n_own} bits, but that of the held-out images "
            f"differs. {_few_images(marker)}More images of class {marker.key.target_class}, label smoothing "
            "(0.1) or a higher `strength` help."
        )
    if pace is None:
        return f"{marker.state.n_embedded} embedding steps are not enough: train longer."
    return _few_images(marker) + cure(trainer, marker, pace, min(pace.factor, HOPELESS))


def _few_images(marker: Watermarker) -> str:
    n_valid = _n_images(marker)
    if n_valid >= min(marker.buffer.capacity, 8):
        return ""
    return f"Only {n_valid} images of class {marker.key.target_class} were available (on this rank). "


def _n_images(marker: Watermarker) -> int:
    return 0 if marker.buffer.valid is None else int(marker.buffer.valid.sum())


def _is_pruned(trainer: Trainer, module: nn.Module) -> bool:
    return _has_callback(trainer, "ModelPruning") or any(
        type(hook).__module__ == "torch.nn.utils.prune"
        for child in module.modules()
        for hook in child._forward_pre_hooks.values()
    )


def _has_callback(trainer: Trainer, *names: str) -> bool:
    return any(c.__name__ in names for callback in callbacks_of(trainer) for c in type(callback).__mro__)
