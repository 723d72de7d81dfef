"""A fit that will leave the model unsigned says so early, and each thing once."""

from dataclasses import replace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import timer
from signed_digits import (
    TARGET,
    Net,
    Trained,
    make_key,
    make_mark,
    make_trainer,
    train_loader,
    train_set,
    val_loader,
    warned,
)
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gradsigns_lightning import Cadence, GradSigns, GradSignsMixin, StrengthSchedule
from gradsigns_lightning.core import EmbeddingState
from gradsigns_lightning.integration import length
from gradsigns_lightning.integration.early import EarlyWarnings

pytestmark = pytest.mark.usefixtures("seeded")


class When(L.Callback):
    """Records after how many batches a message first appears."""

    def __init__(self, recwarn, words):
        self.recwarn, self.words, self.batch = recwarn, words, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.batch is None and any(self.words in message for message in warned(self.recwarn)):
            self.batch = trainer.fit_loop.epoch_loop.total_batch_idx


class Clock(L.Callback):
    """Lets every batch take one second."""

    now = 0.0

    def monotonic(self):
        return self.now

    def on_train_batch_start(self, *args):
        self.now += 1


@pytest.fixture
def a_second_a_batch(monkeypatch):
    clock = Clock()
    for module in (timer, length):
        monkeypatch.setattr(module, "time", clock)
    return clock


def others():
    x, y = train_set(400).tensors
    return TensorDataset(x[y != TARGET], y[y != TARGET])


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from others()


@pytest.mark.parametrize(
    ("loader", "settings", "batch"),
    [
        (lambda: DataLoader(others(), 20), {"max_epochs": 3}, 18),
        (lambda: DataLoader(others(), 60), {"max_epochs": 4}, 12),  # an epoch of six batches says too little
        (lambda: DataLoader(Endless(), 5), {"max_epochs": -1, "max_steps": 500}, 200),
        (lambda: DataLoader(Endless(), 5), {"max_epochs": -1, "max_steps": 60}, 30),  # half of the steps
        (lambda: DataLoader(Endless(), 5), {"max_epochs": -1, "max_time": {"seconds": 60}}, 30),
    ],
    ids=["first epoch", "second epoch", "endless", "endless, few steps", "endless, little time"],
)
def test_a_class_that_is_never_seen(recwarn, a_second_a_batch, loader, settings, batch):
    when = When(recwarn, f"the training saw no image of class {TARGET}")
    make_trainer(GradSigns(make_key()), when, a_second_a_batch, **settings).fit(Net(), loader())
    assert when.batch == batch
    assert sum(f"after {batch} batches" in message for message in warned(recwarn)) == 1


class Forgetful(GradSignsMixin, Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization_that_forgets_the_loss(recwarn):
    when = When(recwarn, "`watermark_loss` was not called")
    make_trainer(make_mark(), when, max_epochs=3).fit(Forgetful(), train_loader())
    assert when.batch == 30


def test_nothing_is_said_before_the_schedule_starts(recwarn):
    mark = GradSigns(make_key(), strength=StrengthSchedule(1.0, start_epoch=3))
    make_trainer(mark, max_epochs=3).fit(Net(), train_loader())
    (end,) = warned(recwarn)
    assert "No embedding step was made: the strength was 0 throughout" in end


def test_accumulation_over_more_batches_than_between_checks(recwarn):
    make_trainer(GradSigns(make_key()), max_epochs=2, accumulate_grad_batches=240).fit(
        Net(), train_loader(batch_size=5)
    )
    assert not [message for message in warned(recwarn) if "after" in message and "batches" in message]


@pytest.mark.parametrize("rate", [1e-4, 1e-5])
def test_a_short_fit_of_a_trained_model_at_a_rate_that_is_too_low(recwarn, rate):
    when = When(recwarn, "the fit will be over")
    mark = GradSigns(make_key())
    make_trainer(mark, when, max_epochs=4).fit(Trained(rate), train_loader())
    assert not mark.standing.owned
    assert when.batch <= 60  # as soon as 16 steps have embedded
    early = [message for message in warned(recwarn) if "the fit will be over" in message]
    assert len(early) == 1
    assert "use a learning rate that is at least" in early[0] or "train that long" in early[0]
    assert len(warned(recwarn)) == 2


class Diverging(Trained):
    """Its loss is NaN from the 40th step on."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (torch.nan if self.global_step >= 40 else 1)


def test_a_training_that_diverges_is_warned_of_that_alone(recwarn):
    mark = GradSigns(make_key())
    make_trainer(mark, max_epochs=4).fit(Diverging(1e-5), train_loader())
    early, end = warned(recwarn)
    assert "after 60 batches: the training has diverged" in early
    assert "the training has diverged" in end


class Stream(IterableDataset):
    """Has no length."""

    def __init__(self, n_rounds):
        self.n_rounds = n_rounds

    def __iter__(self):
        for _ in range(self.n_rounds):
            yield from train_set()


class ManuallyTrained(GradSignsMixin, Trained):
    """Two optimizers, both of which Lightning counts."""

    def __init__(self, rate):
        super().__init__(rate)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx) + self.watermark_loss(batch))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[i].parameters(), lr=self.rate) for i in (1, 4)]


FITS = {
    "epochs": (Trained, train_loader, lambda n: {"max_epochs": n}),
    "manual": (ManuallyTrained, train_loader, lambda n: {"max_epochs": n}),
    "manual, steps": (ManuallyTrained, train_loader, lambda n: {"max_epochs": -1, "max_steps": 60 * n}),
    "time": (Trained, train_loader, lambda n: {"max_epochs": -1, "max_time": {"seconds": 30 * n}}),
    "time, endless": (
        Trained,
        lambda: DataLoader(Stream(99), 40),
        lambda n: {"max_epochs": 1, "max_time": {"seconds": 30 * n}},
    ),
    "manual, time": (
        ManuallyTrained,
        train_loader,
        lambda n: {"max_epochs": -1, "max_time": {"seconds": 30 * n}},
    ),
    "steps, endless": (
        Trained,
        lambda: DataLoader(Stream(99), 40),
        lambda n: {"max_epochs": -1, "max_steps": 30 * n},
    ),
    "epochs of unknown length": (Trained, lambda: DataLoader(Stream(1), 40), lambda n: {"max_epochs": n}),
}


@pytest.mark.parametrize("fit", FITS)
def test_a_pace_that_is_too_slow_is_warned_of_however_the_fit_is_limited(recwarn, a_second_a_batch, fit):
    kind, loader, limit = FITS[fit]
    when, mark = When(recwarn, "the fit will be over"), GradSigns(make_key())
    make_trainer(mark, when, a_second_a_batch, **limit(4)).fit(kind(1e-5), loader())
    assert not mark.standing.owned
    assert when.batch <= 60
    assert sum("the fit will be over" in message for message in warned(recwarn)) == 1


@pytest.mark.parametrize("fit", FITS)
def test_a_fit_that_is_long_enough_is_not_warned(recwarn, a_second_a_batch, fit):
    kind, loader, limit = FITS[fit]
    mark = GradSigns(make_key())
    make_trainer(mark, a_second_a_batch, **limit(12)).fit(kind(1e-3), loader())
    assert mark.standing.owned
    assert not warned(recwarn)


def test_a_rare_embedding_step_in_an_endless_epoch(recwarn):
    when, mark = (
        When(recwarn, "the fit will be over"),
        GradSigns(make_key(), cadence=Cadence(20, max_backoff=1)),
    )
    loader = DataLoader(Stream(99), 5)
    make_trainer(mark, when, max_epochs=-1, max_steps=1000).fit(Trained(1e-5), loader)
    assert when.batch == 400  # the first check after 16 steps have embedded


def test_an_endless_fit_without_a_limit_has_no_end_to_miss(recwarn):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 240

    make_trainer(GradSigns(make_key()), Stop(), max_epochs=-1).fit(Trained(1e-5), DataLoader(Stream(99), 40))
    assert not [message for message in warned(recwarn) if "the fit will be over" in message]


class TestGettingWorse:
    def readings(self, recwarn, wrong, *, schedule=1.0, fn="fit"):
        mark = make_mark(strength=schedule)
        mark.watermarker.state = EmbeddingState(n_embedded=5)
        early, trainer = EarlyWarnings(mark.watermarker, "wm"), make_trainer()
        trainer.state.fn = fn
        for n in wrong:
            early.after_reading(trainer, [-1.0] * n + [1.0] * (32 - n))
        return [message for message in warned(recwarn) if "getting worse" in message]

    def test_three_in_a_row_are_warned_of_once(self, recwarn):
        (found,) = self.readings(recwarn, [0, 1, 3, 6, 7, 9])
        assert "0, 1, 3, 6 of 32 were wrong" in found

    @pytest.mark.parametrize("validate", [True, False], ids=["validation", "no_validation"])
    def test_without_validation_the_training_images_tell(self, recwarn, validate):
        mark = make_mark()

        class Worsen(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                wrong = torch.arange(32) < trainer.current_epoch
                mark.watermarker.state = replace(
                    mark.watermarker.state, margins=torch.where(wrong, -1.0, 1.0)
                )

        make_trainer(Worsen(), mark, max_epochs=6).fit(
            Net(), train_loader(), val_loader() if validate else None
        )
        found = [message for message in warned(recwarn) if "getting worse" in message]
        assert len(found) == (0 if validate else 1)
        if found:
            assert "1, 2, 3, 4 of 32 were wrong in the last checks on the training images" in found[0]

    @pytest.mark.parametrize("wrong", [[0, 1, 3], [0, 1, 1, 3, 4], [9, 6, 7, 8, 3]])
    def test_less_is_not(self, recwarn, wrong):
        assert not self.readings(recwarn, wrong)

    def test_nor_with_another_strength_or_outside_of_a_fit(self, recwarn):
        assert not self.readings(recwarn, [0, 1, 3, 6], schedule=StrengthSchedule(1.0, start_epoch=1))
        assert not self.readings(recwarn, [0, 1, 3, 6], fn="test")
        assert self.readings(recwarn, [0, 1, 3, 6])
