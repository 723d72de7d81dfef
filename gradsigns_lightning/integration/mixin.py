"""The mixin: a LightningModule that brings its own watermark."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsigns_lightning.core.key import WatermarkKey
from gradsigns_lightning.core.watermarker import Watermarker
from gradsigns_lightning.integration.callback import GradSigns
from gradsigns_lightning.integration.undeclared import callbacks_of

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object  # a mixin, which may come before any LightningModule of either of Lightning's packages


class GradSignsMixin(_Base):
    """Lets a LightningModule bring its own watermark.

    Put it before ``LightningModule`` in the bases and call :meth:`sign_with` in the constructor. With
    automatic optimization nothing else is needed. With manual optimization add :meth:`watermark_loss` to
    the loss before ``manual_backward``.

    Example:
        >>> import lightning
        >>> class Net(GradSignsMixin, lightning.LightningModule):
        ...     def __init__(self, key):
        ...         super().__init__()
        ...         self.sign_with(key, strength=1.0)
    """

    _gradsigns: tuple[GradSigns | None, ...] = ()  # None for each that a pickled module left behind

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse bases in which LightningModule's hooks would hide this class's: nothing would be signed."""
        super().__init_subclass__(**kwargs)
        names = [base.__name__ for base in cls.__mro__]
        if "LightningModule" in names[: names.index("GradSignsMixin")]:
            raise TypeError(
                f"`GradSignsMixin` must come before the LightningModule in the bases of {cls.__name__}, got "
                f"{', '.join(base.__name__ for base in cls.__bases__)}."
            )

    def sign_with(self, key: WatermarkKey | Watermarker | str | PathLike[str], **settings: Any) -> GradSigns:
        """Sign this module with ``key`` whenever it is fitted; may be called for several keys.

        Deep copies of the module sign too. A pickled module (``torch.save(module)``) leaves keys and
        callbacks behind.

        Args:
            key: the owner's key, or its file, or a :class:`Watermarker`.
            settings: arguments of :class:`GradSigns`.

        Returns:
            The callback.
        """
        callback = GradSigns(key, **settings)
        callback.brought = True
        self._gradsigns = (*self._marks(), callback)
        return callback

    def _marks(self) -> list[GradSigns]:
        return [mark for mark in self._gradsigns if mark is not None]

    def configure_callbacks(self) -> list[Callback]:
        """Return the watermark's callbacks along with the module's own."""
        own = super().configure_callbacks()
        return [*(own if isinstance(own, (list, tuple)) else [own]), *self._marks()]

    def on_fit_start(self) -> None:
        """Refuse to train unsigned.

        Raises:
            ValueError: no key was given, or the module's own ``configure_callbacks`` dropped the watermark's
                callbacks.
        """
        super().on_fit_start()
        self._signing()

    def _signing(self) -> list[GradSigns]:
        if None in self._gradsigns:
            raise ValueError(
                f"This {type(self).__name__} was pickled without the key that signed it: call "
                "`self.sign_with(key)` again before it is fitted."
            )
        callbacks = [c for c in callbacks_of(self.trainer) if isinstance(c, GradSigns)]
        if dropped := [mark for mark in self._marks() if mark not in callbacks]:
            raise ValueError(
                "`configure_callbacks` must return the watermark's callbacks too, or the key "
                f"{dropped[0].key.commitment} is not signed: add `*super().configure_callbacks()`."
            )
        if not callbacks:
            raise ValueError(
                f"{type(self).__name__} derives from GradSignsMixin and has no key, so it would be trained "
                "unsigned: call `self.sign_with(key)` in the constructor, or pass a GradSigns callback to "
                "the Trainer (with strength=0 it only reads)."
            )
        return callbacks

    def _is_tuned(self) -> bool:
        """Return whether a Tuner runs a trial, for which it removes all callbacks of the Trainer."""
        there, marks = callbacks_of(self.trainer), self._marks()
        if not marks or any(mark in there for mark in marks):
            return False
        brought = self.configure_callbacks()
        return all(mark in brought for mark in marks)

    def watermark_loss(self, batch: Any) -> Tensor:
        """Return the embedding loss of this batch, for manual optimization.

        It is a scalar, 0 on steps that do not embed.

        Optimizers must be those of ``self.optimizers()``, by which Lightning counts steps. When gradients are
        accumulated over k batches, divide the task's loss only: one of the k carries the whole term.

        Raises:
            ValueError: optimization is automatic, where the callback adds the loss; or the module has no key.
        """
        if self.automatic_optimization:
            raise ValueError(
                "`watermark_loss` is for automatic_optimization=False; otherwise the callback adds the loss."
            )
        zero = torch.zeros((), device=self.device)
        if self._is_tuned():
            return zero
        # Those of `sign_with`, and those that were passed to the Trainer.
        losses = [callback.embedding_loss(self.trainer, self, batch) for callback in self._signing()]
        return sum((loss for loss in losses if loss is not None), start=zero)
