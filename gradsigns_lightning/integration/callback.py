"""The callback: signs a model while a Lightning ``Trainer`` fits it."""

from __future__ import annotations

from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from gradsigns_lightning.core.engines import Engine
from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.objective import Objective
from gradsigns_lightning.core.opening import watermarker_of
from gradsigns_lightning.core.schedule import Cadence, StrengthSchedule
from gradsigns_lightning.core.settings import DEFAULTS, EmbeddingSettings
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.advice import warn_if_not_owned
from gradsigns_lightning.integration.batches import images_and_labels
from gradsigns_lightning.integration.compat import check_compatible, check_distinct
from gradsigns_lightning.integration.copies import LeavesNoKeyBehind
from gradsigns_lightning.integration.early import EarlyWarnings
from gradsigns_lightning.integration.end import FinalReading
from gradsigns_lightning.integration.hooks import Hooks
from gradsigns_lightning.integration.logging import log_margins, prepare_loggers
from gradsigns_lightning.integration.merging import watch_merging
from gradsigns_lightning.integration.published import published, warn_of_changes
from gradsigns_lightning.integration.release import CHECKPOINT_ENTRY, STATE_PREFIX
from gradsigns_lightning.integration.signed_step import SignedStep
from gradsigns_lightning.integration.standing import Standing
from gradsigns_lightning.integration.undeclared import callbacks_of
from gradsigns_lightning.integration.validation import ValidationMonitor

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class GradSigns(LeavesNoKeyBehind, Callback):
    """Signs the input gradients of the key's target class during ``Trainer.fit``.

    Wraps the module's ``training_step`` while fitting and adds the embedding loss to what it returns, every
    few optimizer steps. The images come from the batches as they stream by. During validation the mark is
    read on held-out images and logged as ``wm/ber``, ``wm/log10_p_value``, ``wm/p_value`` and ``wm/margin``;
    p-values are those for the key's maker, who knows that its payload was not fitted to the model
    (``free_bits`` of :class:`VerificationResult`). A model that is already trained is signed by a short fit
    with the same callback.

    Override :meth:`images_and_labels` for batches of another form and :meth:`logits` for modules that do not
    return logits.

    Args:
        key: the owner's key, or its file; batches hold inputs normalized as its ``input_mean`` and
            ``input_std`` say. Or a :class:`Watermarker`, which already holds the settings up to ``momentum``,
            and ``carrier_layer``.
        strength: length of the mark's gradient in an embedding step, in lengths of the task's gradient, or a
            schedule; by default up to 4.8 times as much while bits are wrong, and less while the network does
            not know the class or hardly anything is missing; 0 trains exactly as without the callback.
        objective: ``"margin"``, ``"paper"``, or an objective.
        engine: ``"auto"`` (the first that works on this model and strategy), ``"double_backward"``,
            ``"forward_over_reverse"``, ``"finite_difference"``, or an engine.
        cadence: optimizer steps from one embedding step to the next, or a cadence; by default every 80 steps,
            and more often in the first 1,000 and while bits are missing (:meth:`Cadence.following`).
        n_images: images of the target class in one embedding step, on each rank.
        momentum: share of earlier embedding steps in the mean gradient that is held to the bits, 0 up to 1
            (exclusive).
        n_val_images: held-out images of the target class that the mark is read on in each validation, on each
            rank; 0 turns reading off.
        name: prefix of the logged names; give every callback in a Trainer its own.
        carrier_layer: name of the submodule whose output carries the mark instead of the network's input: the
            embedding of a text classifier, whose batches are token ids.

    Raises:
        ValueError: a value is out of range or the key cannot carry the objective; at fit start, one message
            that lists everything that keeps this model from being signed in this Trainer; at the first batch,
            no engine works on this model, and the message says why.

    Example:
        >>> key = WatermarkKey.generate("Acme Vision", 32, input_shape=(1, 28, 28), target_class=0)
        >>> callback = GradSigns(key)  # Trainer(callbacks=[callback]).fit(model, datamodule)
    """

    def __init__(
        self,
        key: WatermarkKey | Watermarker | str | PathLike[str],
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
        settings = EmbeddingSettings(strength, objective, engine, cadence, n_images, momentum, carrier_layer)
        self.watermarker = watermarker_of(key, settings)
        self.key = self.watermarker.key
        self.name = name
        self.brought = False  # whether a module brings it; copies of the module bring theirs
        self._monitor = ValidationMonitor(name, self.watermarker, n_val_images)
        self.reader = self._monitor.reader
        self._signed_step = SignedStep(self.watermarker)
        self._early = EarlyWarnings(self.watermarker, name)
        self._end = FinalReading(name, self.reader, self.watermarker)

    @property
    def standing(self) -> Standing | None:
        """How the mark stands at the end of the last fit; None before, or if the fit read nothing.

        ``print`` shows one line: bits held, p-value, smallest margin, whether the model would be ``owned`` at
        the default alpha, and where it was read: on the held-out images of the last validation, or, if steps
        were made since, on the last training images of the class.
        """
        return self._end.standing

    def images_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return normalized inputs ``(n, C, H, W)`` and class indices ``(n,)`` of a batch.

        Takes ``(x, y)`` sequences, and mappings with exactly one of the names ``x``, ``image``, ``images``,
        ``pixel_values``, ``input_ids`` and one of ``y``, ``label``, ``labels``, ``target``, ``targets``.

        Raises:
            TypeError: the batch has another form.
        """
        return images_and_labels(batch, self.key.input_shape)

    def logits(self, pl_module: LightningModule, images: Tensor) -> Tensor:
        """Return the logits ``(n, n_classes)`` of inputs ``(n, C, H, W)``: by default ``pl_module(images)``.

        An object with an attribute ``logits`` (the output of Hugging Face models) is accepted as well.
        """
        return pl_module(images)  # type: ignore[no-any-return]

    def embedding_loss(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Tensor | None:
        """Return the embedding loss if this batch opens an optimizer step that embeds, else None.

        The step's first batch carries the whole term, times the number of accumulated batches by which
        Lightning divides, so that gradient accumulation changes nothing.
        """
        return self._signed_step.loss(trainer, self._hooks(pl_module), batch, name=self.name)

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
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint.setdefault(CHECKPOINT_ENTRY, {})[self.name] = published(self.watermarker)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        warn_of_changes(self.name, self.watermarker, checkpoint.get(CHECKPOINT_ENTRY, {}).get(self.name))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:
            # The model may be another one than last time. Reset here, because a checkpoint's state is loaded
            # next. A Trainer that continues to count steps keeps the state.
            self.watermarker.reset()
            self._monitor.reset()
        check_distinct(
            [(mark.name, mark.key) for mark in callbacks_of(trainer) if isinstance(mark, GradSigns)]
        )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in `setup`, where the module is not yet on its device, wrapped for its strategy or restored.
        self._signed_step.stop()  # the last fit may have ended without a teardown
        self.watermarker.is_prepared = False
        self._monitor.start_fit()
        self._signed_step.start()
        self._end.start()
        self._early.start()
        if self.watermarker.schedule.strength == 0:
            return
        check_compatible(trainer, pl_module, self.watermarker)
        if pl_module.automatic_optimization:
            self._signed_step.wrap(trainer, pl_module, self.embedding_loss)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        prepare_loggers(trainer, self.name, published(self.watermarker))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._signed_step.close_batch()
        self._early.after_batch(trainer, pl_module)
        self._signed_step.renew()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._early.after_epoch(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._signed_step.before_optimizer_step(trainer, optimizer)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reader.start(pl_module.device)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # In a batch hook, because weight averaging swaps in the weights that will be saved for the batches
        # only. Before the step, which may take the batch apart.
        self._monitor.read(trainer, batch, self._hooks(pl_module))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._monitor.log(trainer, pl_module)
            self._early.after_reading(trainer, self.reader.margins)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start
    on_test_epoch_end = on_validation_epoch_end

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_margins(trainer, self.name, self.reader.margins)
        if self._early.n_batches:
            self._end.read_after_other_callbacks(trainer, partial(self.logits, pl_module))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Loggers are still open here.
        self._end.report(trainer, pl_module, partial(self.logits, pl_module))
        warn_if_not_owned(
            trainer, pl_module, self.name, self.watermarker, self.standing, n_batches=self._early.n_batches
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._signed_step.stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # After an exception Lightning calls this and no teardown hook.
        self._signed_step.stop()
        self._end.stop(trainer, exception)

    @override
    def _outside_a_fit(self) -> dict[str, Any]:
        return {"_signed_step": SignedStep(self.watermarker)}

    def _hooks(self, pl_module: LightningModule) -> Hooks:
        return Hooks(pl_module, self.images_and_labels, partial(self.logits, pl_module), self.watermarker)
