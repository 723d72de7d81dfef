"""Overwriting: the thief embeds marks of their own over the owner's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

from torch import Tensor, nn

from gradsigns_lightning.attacks.base import Attack, AttackData, Observe, copied
from gradsigns_lightning.attacks.class_gradients import views_of
from gradsigns_lightning.attacks.own_marks import OwnMark
from gradsigns_lightning.attacks.rotation import Dose, turn_away
from gradsigns_lightning.attacks.training import cross_entropy, train
from gradsigns_lightning.core.utils.checks import check_choice, check_int, check_number

CLASSES = ("target", "all")


def overwrite(
    model: nn.Module,
    data: AttackData,
    *,
    classes: str = "target",
    target_class: int = 0,
    n_marks: int = 1,
    epochs: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Embed marks with keys of the thief's own: overwriting (Wang and Kerschbaum, ICASSP 2019).

    The marks take turns, so that a step embeds one at most; how strongly is up to who makes them.

    Args:
        model: the stolen model.
        data: what the thief has; its ``make_mark`` makes the marks.
        classes: ``"target"`` for marks in one class, or ``"all"`` for marks in every class.
        target_class: the class of ``"target"``.
        n_marks: marks in each of these classes, each with a key of its own, >= 1.
        epochs: epochs, >= 1.
        rate_factor: learning rate, in units of the one of a training from scratch, > 0.
        seed: of batches.
        observe: is shown the model after each epoch.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range, or ``data`` has no ``make_mark``.
    """
    check_choice("classes", classes, CLASSES)
    check_int("target_class", target_class, minimum=0, maximum=data.n_classes - 1)
    check_int("n_marks", n_marks, minimum=1)
    if data.make_mark is None:
        raise ValueError("`data` must have a `make_mark`, which makes the thief's own marks; got None.")
    chosen = range(data.n_classes) if classes == "all" else [target_class]
    marks = [data.make_mark(class_index, number) for class_index in chosen for number in range(n_marks)]
    recipe = replace(
        data.recipe,
        epochs=epochs,
        rate=data.recipe.rate * check_number("rate_factor", rate_factor, minimum=0),
    )
    attacked = copied(model)
    embedding = _Embedding(attacked, marks, recipe.label_smoothing)
    return train(
        attacked,
        data,
        recipe,
        loss=embedding.loss,
        before_step=embedding.before_step,
        observe=observe,
        seed=seed,
    )


@dataclass(frozen=True)
class Overwriting(Attack):
    """Overwriting; see :func:`overwrite`."""

    function = staticmethod(overwrite)

    classes: str = "target"
    target_class: int = 0
    n_marks: int = 1
    epochs: int = 5
    rate_factor: float = 1.0
    seed: int = 0


def flush(
    model: nn.Module,
    data: AttackData,
    *,
    classes: str = "target",
    target_class: int = 0,
    n_marks: int = 1,
    epochs: int = 3,
    unlearning_epochs: int = 2,
    strength: float = 3.0,
    every_n_steps: int = 5,
    rate_factor: float = 1.0,
    seed: int = 0,
    observe: Observe | None = None,
) -> nn.Module:
    """Embed marks of the thief's own, then unlearn them and what was there before (adaptive; this project).

    :func:`overwrite`, then turn the gradients away both from what they were in the stolen model and from what
    the own marks have made of them. From the latter alone, they turn back to the owner's mark (measured).

    Args:
        model: the stolen model.
        data: what the thief has; its ``make_mark`` makes the marks.
        classes: as in :func:`overwrite`.
        target_class: the class of ``"target"``.
        n_marks: marks in each of these classes, >= 1.
        epochs: epochs of embedding, >= 1.
        unlearning_epochs: epochs of unlearning, >= 1.
        strength: of unlearning, as in :func:`rotate`.
        every_n_steps: of unlearning, as in :func:`rotate`.
        rate_factor: learning rate, in units of the one of a training from scratch, > 0.
        seed: of batches.
        observe: is shown the model after each epoch of either kind.

    Returns:
        The trained copy.

    Raises:
        ValueError: a setting is out of range, or ``data`` has no ``make_mark``.
    """
    check_int("unlearning_epochs", unlearning_epochs, minimum=1)
    marked = overwrite(
        model,
        data,
        classes=classes,
        target_class=target_class,
        n_marks=n_marks,
        epochs=epochs,
        rate_factor=rate_factor,
        seed=seed,
        observe=observe,
    )
    return turn_away(
        marked,
        data,
        [model, marked],
        views_of("classes" if classes == "all" else "class", target_class, data.n_classes),
        Dose(strength, every_n_steps),
        replace(data.recipe, epochs=unlearning_epochs, rate=data.recipe.rate * rate_factor),
        observe=None if observe is None else lambda dose, turned: observe(epochs + dose, turned),
        seed=seed,
    )


@dataclass(frozen=True)
class Flushing(Attack):
    """Own marks, embedded and unlearned; see :func:`flush`."""

    function = staticmethod(flush)

    classes: str = "target"
    target_class: int = 0
    n_marks: int = 1
    epochs: int = 3
    unlearning_epochs: int = 2
    strength: float = 3.0
    every_n_steps: int = 5
    rate_factor: float = 1.0
    seed: int = 0


class _Embedding:
    """Embeds marks in the network that is trained; they take turns, so that a step embeds one at most."""

    def __init__(self, model: nn.Module, marks: Sequence[OwnMark], label_smoothing: float) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._marks, self._task, self._steps = marks, cross_entropy(label_smoothing), count()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        task = self._task(model, x, y)
        turn, number = divmod(next(self._steps), len(self._marks))
        own = self._marks[number].loss(model, x, y, turn)
        return task if own is None else task + own

    def before_step(self, step: int) -> None:
        turn, number = divmod(step, len(self._marks))
        self._marks[number].before_step(self._parameters, turn)
