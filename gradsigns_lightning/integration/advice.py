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

_UNSURE = 0.7  # probability of the class, up to which the mark pulls less than half as hard as the task


def why_diverged(module: nn.Module) -> str | None:
    """Return that weights are not finite, which looks like any other failure of a mark; None if they are."""
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in module.parameters()]
    finite = [part.detach().isfinite().all() for part in parts]
    # On one device, so that it is waited for once.
    if not finite or bool(torch.stack([flag.to(finite[0].device) for flag in finite]).all()):
        return None
    return (
        "the training has diverged: weights are no longer finite, so nothing can be embedded or read. Take a "
        "lower learning "
        "rate, or clip the gradients (`gradient_clip_val`)."
    )


def why_idle(trainer: Trainer, marker: Watermarker, *, automatic: bool) -> str | None:
    """Return why nothing has been embedded yet; None if something has."""
    target = marker.key.target_class
    if trainer.global_step == 0:
        return "Lightning counted no optimizer step, so nothing was embedded: step by `self.optimizers()`."
    if marker.state.n_embedded == 0:
        if automatic:
            return "no step embedded: the strength was 0 all along (`start_epoch`), or no gradient reached the optimizer's step."
        return "no step embedded: `watermark_loss` was not called, or the strength was 0 all along (`start_epoch`)."
    if not int(marker.state.n_non_finite) and own_margins(marker) is None:
        if _n_images(marker):
            return (
                f"the gradient of class {target} was zero in every embedding step, so nothing was embedded: "
                f"has the training "
                "diverged (a learning rate that is too high)?"
            )
        return (
            f"no image of class {target} came by in training, so nothing was embedded: is {target} one of "
            f"the labels, and in the "
            "batches that are trained on?"
        )
    return None


def _why_spoilt(marker: Watermarker) -> str | None:
    """Return that embedding steps were left out; None if none was."""
    if n_non_finite := int(marker.state.n_non_finite):
        return (
            f"{n_non_finite} of {marker.state.n_embedded} embedding steps had gradients that are not finite "
            f"and were left out (a "
            "norm or a root at zero?)."
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
    """Warn at the end of a fit of ``n_batches`` that the model would not be ``owned``, of likely causes and of what helps."""
    if not marker.schedule.strength or is_dev_run(trainer):
        return
    if n_batches == 0:
        problem = (
            "this fit trained on no batch, so it embedded and read nothing: are there any, and are "
            "`max_epochs`, `max_steps` or "
            "`max_time` over, where a checkpoint goes on? `verify` tells whether the model is signed."
        )
    elif diverged := why_diverged(pl_module):
        problem = diverged
    elif standing is None:
        problem = why_idle(trainer, marker, automatic=pl_module.automatic_optimization) or (
            f"no bit can be read, because the gradient of class {marker.key.target_class} is zero or not "
            f"finite at the end: has "
            "the training diverged (a learning rate that is too high)?"
        )
    elif standing.owned:
        problem = _why_spoilt(marker) or ""
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
        yield f"A key of {standing.n_bits} bits never is: {least_bits()} bits would do, 128 leave room for wrong bits."
    if not standing.is_recognised:
        yield (
            f"It takes only {standing.recognised:.0%} of the images of class {marker.key.target_class} for "
            f"it, so nothing could "
            "be concluded from its bits: train until it knows the class; if it does, `GradSigns.logits` must "
            "return the logits "
            "that the loss is computed from."
        )
    if standing.n_matches == standing.n_bits:
        return
    if spoilt := _why_spoilt(marker):
        yield spoilt
    if _is_pruned(trainer, pl_module):
        yield (
            "Weights are pruned, which takes bits away: train on with the mask in place, which brings them "
            "back, the more slowly "
            "the fewer weights are left."
        )
    if left_out := _left_out(marker):
        yield left_out
    if held_back := _held_back(marker):
        yield held_back
    idle = why_idle(trainer, marker, automatic=pl_module.automatic_optimization)
    yield f"{idle[0].upper()}{idle[1:]}" if idle else _by_pace(trainer, marker, standing)


def _left_out(marker: Watermarker) -> str | None:
    """Return that an optimizer stepped in no batch that embeds; None if all did."""
    if not (left_out := marker.state.turns.left_out):
        return None
    return (
        f"Optimizer {left_out[0]} of `self.optimizers()` made no step in a batch that embeds, so its "
        f"parameters carry nothing of "
        "the mark: call `watermark_loss` in its batches too, or take another `cadence`."
    )


def _held_back(marker: Watermarker) -> str | None:
    """Return that the dose was small to the end, because the network has yet to learn; None if it was not."""
    sure = (
        None
        if marker.state.recognised is None or marker.cadence.growth is None
        else float(marker.state.recognised)
    )
    if sure is None or not sure < _UNSURE:
        return None
    return (
        f"The network gave images of class {marker.key.target_class} a probability of only {sure:.2f} for it "
        f"at the end, so the "
        "mark was held back to leave it room to learn: train until it knows the class."
    )


def _by_pace(trainer: Trainer, marker: Watermarker, standing: Standing) -> str:
    own, pace = own_margins(marker), pace_of(marker)
    n_own = 0 if own is None else int((own > 0).sum())
    if n_own >= least_matches(standing.n_bits) and _has_callback(
        trainer, "WeightAveraging", "StochasticWeightAveraging"
    ):
        return (
            f"The weights in training held {n_own} bits, their averages, which are read, have not followed "
            f"yet: train longer, or "
            "average over fewer steps (a smaller `decay`, a later start)."
        )
    if standing.held_out and n_own >= least_matches(standing.n_bits):
        return (
            f"The training images' own gradient holds {n_own} bits: the held-out images' differs. "
            f"{_few_images(marker)}More images of class {marker.key.target_class}, label smoothing (0.1) or "
            f"a higher `strength` "
            "help."
        )
    if pace is None:
        return f"{marker.state.n_embedded} embedding steps are too few: train longer."
    return _few_images(marker) + cure(trainer, marker, pace, min(pace.factor, HOPELESS))


def _few_images(marker: Watermarker) -> str:
    n_valid = _n_images(marker)
    if n_valid >= min(marker.buffer.capacity, 8):
        return ""
    return f"Only {n_valid} images of class {marker.key.target_class} were at hand (on this rank). "


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
