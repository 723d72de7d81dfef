"""The callback: signs a model while a Lightning ``Trainer`` fits it."""

from __future__ import annotations

import warnings
import weakref
from contextlib import nullcontext
from functools import partial
from os import PathLike
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from gradsigns_lightning.core.checks import check_int
from gradsigns_lightning.core.dose import parameters_of
from gradsigns_lightning.core.engines import Engine
from gradsigns_lightning.core.key import WatermarkKey, key_of
from gradsigns_lightning.core.objective import Objective
from gradsigns_lightning.core.schedule import Cadence, StrengthSchedule
from gradsigns_lightning.core.settings import DEFAULTS, EmbeddingSettings
from gradsigns_lightning.core.text import printable
from gradsigns_lightning.core.trained import only_trained
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.advice import warn_if_not_owned
from gradsigns_lightning.integration.batches import cure, images_and_labels
from gradsigns_lightning.integration.compat import check_compatible
from gradsigns_lightning.integration.copies import LeavesNoKeyBehind
from gradsigns_lightning.integration.early import EarlyWarnings
from gradsigns_lightning.integration.end import LastWord
from gradsigns_lightning.integration.hints import check_logits_hook
from gradsigns_lightning.integration.input_watch import InputWatch
from gradsigns_lightning.integration.logging import log_margins, prepare_loggers
from gradsigns_lightning.integration.merging import watch_merging
from gradsigns_lightning.integration.reading import HeldOutReader
from gradsigns_lightning.integration.release import CHECKPOINT_ENTRY, STATE_PREFIX
from gradsigns_lightning.integration.sharding import inside_forward, is_sharded
from gradsigns_lightning.integration.standing import Standing
from gradsigns_lightning.integration.step_patch import StepPatch
from gradsigns_lightning.integration.unlogged import unlogged
from gradsigns_lightning.integration.weights import lengths_of


class GradSigns(LeavesNoKeyBehind, Callback):
    """Signs the input gradients of the key's target class during ``Trainer.fit``.

    Wraps the module's ``training_step`` while fitting and adds the embedding loss to what it returns, every few optimizer steps.
    The images come from the batches as they stream by. During validation the mark is read on held-out images and logged as
    ``wm/ber``, ``wm/log10_p_value``, ``wm/p_value`` and ``wm/margin``; p-values are those for the key's maker, who knows that its
    payload was not fitted to the model (``free_bits`` of :class:`VerificationResult`). A model that is already trained is signed
    by a short fit with the same callback.

    Override :meth:`images_and_labels` for batches of another form and :meth:`logits` for modules that do not return logits.

    Args:
        key: the owner's key, or its file; batches hold inputs normalised as its ``input_mean`` and ``input_std`` say.
        strength: length of the mark's gradient in an embedding step, in lengths of the task's gradient, or a schedule; by default
            up to 4.8 times as much while bits are wrong, and less while the network does not know the class or hardly anything
            is missing; 0 trains exactly as without the callback.
        objective: ``"margin"``, ``"paper"``, or an objective.
        engine: ``"auto"`` (the first that works on this model and strategy), ``"double_backward"``, ``"forward_over_reverse"``,
            ``"finite_difference"``, or an engine.
        cadence: optimizer steps from one embedding step to the next, or a cadence; by default every 80 steps, in the first 1,000
            and while bits are missing more often (:meth:`Cadence.following`).
        n_images: images of the target class in one embedding step, on each rank.
        momentum: share of earlier embedding steps in the mean gradient that is held to the bits, 0 up to 1 (exclusive).
        n_val_images: held-out images of the target class that the mark is read on in each validation, on each rank; 0 turns
            reading off.
        name: prefix of the logged names; give every callback in a Trainer its own.
        carrier_layer: name of the submodule whose output carries the mark instead of the network's input: the embedding of a text
            classifier, whose batches are token ids.

    Raises:
        ValueError: a value is out of range or the key cannot carry the objective; at fit start, one message that lists all that
            keeps this model and Trainer from being signed; at the first batch, that no engine works on this model, and why.

    Example:
        >>> key = WatermarkKey.generate("Acme Vision", 32, input_shape=(1, 28, 28), target_class=0)
        >>> callback = GradSigns(key)  # Trainer(callbacks=[callback]).fit(model, datamodule)
    """

    def __init__(
        self,
        key: WatermarkKey | str | PathLike[str],
        *,
        strength: float | StrengthSchedule = DEFAULTS.strength,
        objective: str | Objective = DEFAULTS.objective,
        engine: str | Engine = DEFAULTS.engine,
        cadence: int | Cadence | None = DEFAULTS.cadence,
        n_images: int = DEFAULTS.n_images,
        momentum: float = DEFAULTS.momentum,
        n_val_images: int = 256,
        name: str = "wm",
        carrier_layer: str | None = DEFAULTS.carrier_layer,
    ) -> None:
        watch_merging(GradSigns)
        key = key_of(key)
        settings = EmbeddingSettings(
            strength=strength,
            objective=objective,
            engine=engine,
            cadence=cadence,
            n_images=n_images,
            momentum=momentum,
            carrier_layer=carrier_layer,
        )
        self.watermarker = Watermarker(key, settings)
        self.key = key
        self.name = name
        self.reader = HeldOutReader(
            key, self.watermarker.projector, check_int("n_val_images", n_val_images, minimum=0), carrier_layer
        )
        self.brought = False  # by a module, which copies of it shall do too
        self._patch: StepPatch | None = None
        self._watch = InputWatch(torch.nn.Module())
        self._prepared = False
        self._tried = False
        self._last_seen: tuple[int, weakref.ref[Tensor]] | None = None
        self._awaited: int | None = None  # step that embedded and whose gradient no optimizer has taken yet
        self._warned = False
        self._unreadable = False
        self._early = EarlyWarnings(self.watermarker, name)
        self._end = LastWord(name, self.reader, self.watermarker)

    @property
    def standing(self) -> Standing | None:
        """How the mark stands at the end of the last fit; None before, or if the fit read nothing.

        ``print`` shows one line: bits held, p-value, smallest margin, whether the model would be ``owned`` at the default alpha,
        and where it was read: on the held-out images of the last validation, or, if steps were made since, on the last training
        images of the class.
        """
        return self._end.standing

    def images_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return normalised inputs ``(n, C, H, W)`` and class indices ``(n,)`` of a batch.

        Takes ``(x, y)`` sequences, and mappings with exactly one of the names ``x``, ``image``, ``images``, ``pixel_values``,
        ``input_ids`` and one of ``y``, ``label``, ``labels``, ``target``, ``targets``.

        Raises:
            TypeError: a batch of another form.
        """
        return images_and_labels(batch, self.key.input_shape)

    def logits(self, pl_module: Any, images: Tensor) -> Tensor:
        """Return the logits ``(n, n_classes)`` of inputs ``(n, C, H, W)``: by default ``pl_module(images)``.

        An object with an attribute ``logits`` (the answer of Hugging Face's models) is taken as well.
        """
        return pl_module(images)  # type: ignore[no-any-return]

    def embedding_loss(self, trainer: Any, pl_module: Any, batch: Any) -> Tensor | None:
        """Return the embedding loss if this batch opens an optimizer step that embeds, else None.

        The step's first batch carries the whole term, times the number of accumulated batches by which Lightning divides, so that
        gradient accumulation changes nothing.
        """
        marker, step, epoch = self.watermarker, trainer.global_step, trainer.current_epoch
        if marker.schedule.strength == 0:
            return None
        sharded = is_sharded(trainer)
        if self._awaited is not None and step > self._awaited:
            # Lightning counted a step that the module's own `optimizer_step` left out.
            self._take_back()
        images, labels = self._taken_from(batch)
        if pl_module.automatic_optimization and trainer.accumulate_grad_batches == 1:
            self._refuse_second_evaluation(images, step)
        marker.observe(images, labels, step=step)
        if not self._prepared:
            self._watch = InputWatch(pl_module)
            with self._watch.recording():
                self._try_logits(pl_module, images, batch)
            with unlogged(pl_module):
                marker.prepare(
                    pl_module, lambda x: self.logits(pl_module, x), images, world_size=trainer.world_size, sharded=sharded
                )
            self._prepared = True
        if not marker.is_due(step=step, epoch=epoch):
            return None
        with unlogged(pl_module), nullcontext() if sharded else only_trained(pl_module, trainer.optimizers):
            loss = marker.loss(
                pl_module,
                lambda x: self.logits(pl_module, x),
                step=step,
                epoch=epoch,
                world_size=trainer.world_size,
                sharded=sharded,
            )
        self._awaited = step
        pl_module.log(f"{self.name}/loss", marker.state.value, on_step=True, on_epoch=False)
        return loss * trainer.accumulate_grad_batches if pl_module.automatic_optimization else loss

    def _embedding_loss_before_step(self, trainer: Any, pl_module: Any, batch: Any) -> Tensor | None:
        if not trainer.training:
            return None  # a validation step that calls the training step
        first = not self._prepared
        loss = self.embedding_loss(trainer, pl_module, batch)
        if first:
            self._watch.watch_the_step()
        return loss

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint; two keys have two states."""
        return f"{STATE_PREFIX}{self.key.commitment}]"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"watermarker": self.watermarker.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.watermarker.load_state_dict(state_dict["watermarker"])

    @override
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault(CHECKPOINT_ENTRY, {})[self.name] = self._public_settings()

    @override
    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(CHECKPOINT_ENTRY, {}).get(self.name)
        now = self._public_settings()
        changed = (
            [f"{k}: {printable(str(saved.get(k)), limit=80)} -> {now[k]}" for k in now if saved.get(k) != now[k]] if saved else []
        )
        if changed:
            warnings.warn(
                f"GradSigns {self.name!r} differs from the checkpoint: {'; '.join(changed)}.", UserWarning, stacklevel=2
            )

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:
            # Maybe another model than last time. Here, because a checkpoint's state is loaded next; a Trainer that goes on
            # counting steps goes on with the state.
            self._reset()
        marks = [callback for callback in trainer.callbacks if isinstance(callback, GradSigns)]
        if (names := [mark.name for mark in marks]).count(self.name) > 1:
            raise ValueError(
                f"`name` must be different for every GradSigns callback of a Trainer, got {names}: give the second one its "
                "own, as in GradSigns(key, name='wm2')."
            )
        if (keys := [mark.key.commitment for mark in marks]).count(self.key.commitment) > 1:
            raise ValueError(f"`key` must be different for every GradSigns callback of a Trainer, got {keys}.")

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Not in `setup`: there the module is not on its device, not wrapped for its strategy and not restored yet.
        self._prepared = self._tried = False
        self._last_seen = self._awaited = None
        self._unreadable = False
        self._end.start()
        self._early.start()
        self._unpatch()  # of a fit that ended without telling
        if self.watermarker.schedule.strength == 0:
            return
        check_compatible(trainer, pl_module, self.watermarker)
        if pl_module.automatic_optimization:
            self._wrap_step(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        prepare_loggers(trainer, self.name, self._public_settings())

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._watch.stop()
        self._early.after_batch(trainer, pl_module)
        if self._patch is not None and not self._patch.called:
            # The module has put another step in the place of the wrapped one, as trainings in phases do.
            self._patch.remove()
            self._wrap_step(trainer, pl_module)
        elif self._patch is not None:
            self._patch.called = False

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._early.after_epoch(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._awaited = None
        # Here gradients are whole, unscaled and not clipped yet.
        if self._prepared:
            which = next((i for i, known in enumerate(trainer.optimizers) if known is optimizer), 0)
            self.watermarker.observe_gradients(
                which, parameters_of(optimizer), step=trainer.global_step, sharded=is_sharded(trainer)
            )

    @override
    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.reader.start(pl_module.device)

    @override
    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.reader.start(pl_module.device)

    @override
    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # Within the batches, because weight averaging swaps the weights that will be saved in just for them. Before the step,
        # which may take the batch apart.
        self._read(trainer, pl_module, batch)

    @override
    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._read(trainer, pl_module, batch)

    @override
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._log_reading(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._log_reading(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.reader.margins is not None:
            log_margins(trainer, self.name, self.reader.margins)
        if self._early.n_batches:
            self._end.read_after_other_callbacks(trainer, partial(self.logits, pl_module))

    @override
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        # Loggers are still open here.
        self._end.tell(trainer, pl_module, partial(self.logits, pl_module))
        if self.watermarker.schedule.strength and not trainer.fast_dev_run:
            warn_if_not_owned(trainer, pl_module, self.name, self.watermarker, self.standing, n_batches=self._early.n_batches)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._unpatch()

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        # After an exception Lightning calls this and no teardown hook.
        self._unpatch()
        self._end.stop(trainer)
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            self._end.tell_last_reading(trainer)

    @override
    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_patch": None, "_watch": InputWatch(torch.nn.Module()), "_last_seen": None}

    def _wrap_step(self, trainer: Any, pl_module: Any) -> None:
        self._patch = StepPatch(
            pl_module,
            lambda batch: self._embedding_loss_before_step(trainer, pl_module, batch),
            self._take_back,
        )

    def _take_back(self) -> None:
        self._awaited = None
        self.watermarker.take_back()

    def _unpatch(self) -> None:
        self._last_seen = None
        self._watch.stop()
        if self._patch is not None:
            self._patch.remove()
            self._patch = None

    def _reset(self) -> None:
        self.watermarker.reset()
        self.reader.margins = None
        self._warned = False

    def _read(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        together = is_sharded(trainer) and self.reader.n_images > 0
        if not (self.reader.wants_more or together) or self._unreadable:
            return
        try:
            self._read_batch(trainer, pl_module, batch, together=together)
        except Exception as error:
            if self.watermarker.schedule.strength:
                raise
            self._unreadable = True
            warnings.warn(
                f"GradSigns {self.name!r} has strength 0 and does not read this fit either: {error} (Override "
                "`GradSigns.images_and_labels` or `GradSigns.logits`, or set `n_val_images=0`.)",
                UserWarning,
                stacklevel=2,
            )

    def _read_batch(self, trainer: Any, pl_module: Any, batch: Any, *, together: bool) -> None:
        images, labels = self._taken_from(batch)
        if trainer.sanity_checking:
            return  # it shall find batches of another form, but nothing is logged

        if self.reader.lengths is None and not is_sharded(trainer):
            self.reader.lengths = lengths_of(pl_module)

        def read() -> None:
            if not self._tried:
                self._try_logits(pl_module, images, batch)
            self.reader.read(pl_module, lambda x: self.logits(pl_module, x), images, labels, always=together)

        with unlogged(pl_module):
            inside_forward(trainer, pl_module, read)

    def _taken_from(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = self.images_and_labels(batch)
        try:
            self.watermarker.check_batch(images, labels)
        except ValueError as error:
            any_input = self.watermarker.settings.carrier_layer is not None
            raise ValueError(f"{error}{cure(images, labels, self.key.input_shape, any_input=any_input)}") from error
        return images, labels

    def _try_logits(self, pl_module: Any, images: Tensor, batch: Any) -> None:
        carrier_layer = self.watermarker.settings.carrier_layer
        with unlogged(pl_module):
            check_logits_hook(
                pl_module,
                lambda x: self.logits(pl_module, x),
                images,
                batch,
                self.key,
                carrier_layer=carrier_layer,
                sharded=is_sharded(pl_module.trainer),
            )
        self._tried = True

    def _log_reading(self, trainer: Any, pl_module: Any) -> None:
        if self.reader.n_images == 0:
            return
        values = None if self._unreadable else self.reader.finish(step=trainer.global_step)
        if values is None and not self._unreadable:
            self._warn_once_unread()
        self._early.after_reading(trainer, self.reader.margins)
        for name, value in (values or self.reader.missing()).items():
            pl_module.log(f"{self.name}/{name}", value, sync_dist=trainer.world_size > 1)

    def _refuse_second_evaluation(self, images: Tensor, step: int) -> None:
        if self._last_seen is not None and self._last_seen[0] == step and self._last_seen[1]() is images:
            raise ValueError(
                "The optimizer evaluates the loss more than once a step (as SAM and LBFGS do), and the embedding loss is in the "
                "first evaluation only: use another optimizer, or manual optimization with GradSignsMixin, which adds "
                "`watermark_loss` where the gradient is kept."
            )
        self._last_seen = (step, weakref.ref(images))

    def _warn_once_unread(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"GradSigns {self.name!r}: no usable gradient of class {self.key.target_class} in the validation images (none of "
                "that class, or gradients all zero or not finite), so nan is logged.",
                UserWarning,
                stacklevel=2,
            )

    def _public_settings(self) -> dict[str, Any]:
        marker = self.watermarker
        return {
            "commitment": self.key.commitment,
            "n_bits": self.key.n_bits,
            "target_class": self.key.target_class,
            "strength": str(marker.schedule),
            "objective": str(marker.objective),
            "engine": marker.settings.engine if isinstance(marker.settings.engine, str) else marker.settings.engine.name,
            "cadence": str(marker.cadence),
            "n_images": marker.buffer.capacity,
            "momentum": marker.settings.momentum,
        }
