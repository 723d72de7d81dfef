"""The mixin, manual optimization, and the mirror package."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from signed_digits import (
    SECRET,
    TARGET,
    Net,
    held_out_target_images,
    make_key,
    make_mark,
    make_trainer,
    train_loader,
    val_loader,
    warned,
)
from torch import nn
from torch.nn import functional as F

from gradsigns_lightning import GradSigns, GradSignsMixin, verify
from gradsigns_lightning.integration import advice

pytestmark = pytest.mark.usefixtures("seeded")

FAST = {"cadence": 2, "momentum": 0.0}


class Mixed(GradSignsMixin, Net):
    pass


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.added = []

    def extra(self, batch):
        return 0.0

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1]) + self.extra(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class ManualMixed(GradSignsMixin, Manual):
    def extra(self, batch):
        loss = self.watermark_loss(batch)
        self.added.append(float(loss))
        return loss


def errors(model, key=None):
    return verify(model, key or make_key(), held_out_target_images()).bit_error_rate


def test_manual_optimization_is_signed_through_the_mixin():
    model = ManualMixed()
    mark = model.sign_with(make_key(), **FAST)
    assert isinstance(mark, GradSigns)
    trainer = make_trainer(max_epochs=5)
    trainer.fit(model, train_loader(), val_loader())
    assert errors(model) == float(trainer.callback_metrics["wm/ber"]) == 0
    assert model.added[0] == 0  # the task's own gradient is not known yet
    assert model.added[1] > 0
    assert model.added[2] == 0
    assert "training_step" not in vars(model)


class Alternating(GradSignsMixin, Net):
    """Has several optimizers, each of one layer or more, that take turns."""

    def __init__(self, turns):
        super().__init__(
            nn.Sequential(
                nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 10)
            )
        )
        self.turns = turns
        self.automatic_optimization = False

    def configure_optimizers(self):
        parts = [[1], [3], [5]] if self.turns == "three" else [[1], [3, 5]]
        return [
            torch.optim.Adam([p for i in part for p in self.net[i].parameters()], lr=5e-3) for part in parts
        ]

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        optimizer = optimizers[
            (self.current_epoch if self.turns == "epochs" else batch_idx) % len(optimizers)
        ]
        if self.turns == "toggled":
            self.toggle_optimizer(optimizer)
        loss = super().training_step(batch, batch_idx) + self.watermark_loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.turns == "toggled":
            self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("turns", ["batches", "three", "epochs", "toggled"])
def test_optimizers_that_take_turns_all_carry_the_mark(turns, recwarn):
    model = Alternating(turns)
    mark = model.sign_with(make_key())
    make_trainer(max_epochs=16).fit(model, train_loader())
    assert errors(model) == 0
    assert mark.watermarker.state.turns.left_out == []
    assert not warned(recwarn)


def test_an_optimizer_whose_batches_are_without_the_loss_is_named():
    class OneSided(Alternating):
        def watermark_loss(self, batch):
            return super().watermark_loss(batch) if self.global_step % 2 == 0 else 0.0

    model = OneSided("batches")
    mark = model.sign_with(make_key())
    make_trainer(max_epochs=2).fit(model, train_loader())
    assert mark.watermarker.state.turns.left_out == [1]
    assert "Optimizer 1 of `self.optimizers()` made no step in a batch that embeds" in advice._left_out(
        mark.watermarker
    )


def test_a_callback_given_to_the_trainer_feeds_watermark_loss_too():
    model = ManualMixed()
    make_trainer(make_mark(), max_epochs=5).fit(model, train_loader())
    assert errors(model) == 0


def test_the_callback_alone_is_refused_under_manual_optimization():
    with pytest.raises(
        ValueError,
        match=r"automatic_optimization is False: .* GradSignsMixin "
        r".*self.watermark_loss\(batch\)",
    ):
        make_trainer(make_mark()).fit(Manual(), train_loader())


def test_automatic_optimization_is_signed_through_the_mixin():
    model = Mixed()
    model.sign_with(make_key(), **FAST)
    trainer = make_trainer(max_epochs=5)
    trainer.fit(model, train_loader(), val_loader())
    assert errors(model) == float(trainer.callback_metrics["wm/ber"]) == 0
    trainer.fit_loop.max_epochs = 6
    trainer.fit(model, train_loader())
    assert sum(isinstance(c, GradSigns) for c in trainer.callbacks) == 1


@pytest.mark.parametrize("kind", [Mixed, ManualMixed])
def test_a_mixin_without_a_key_is_refused(kind):
    model = kind()
    with pytest.raises(
        ValueError,
        match=r"Mixed derives from GradSignsMixin and has no "
        r"key.*`self.sign_with\(key\)`",
    ):
        make_trainer(max_epochs=1).fit(model, train_loader(200))


def test_watermark_loss_without_a_callback_is_refused():
    class Hidden(ManualMixed):
        def on_fit_start(self):
            pass  # hides the check at the start

    with pytest.raises(ValueError, match="has no key, so it would be trained unsigned"):
        make_trainer(max_epochs=1).fit(Hidden(), train_loader(200))


@pytest.mark.parametrize("kind", [Mixed, ManualMixed])
def test_a_callback_that_would_be_replaced_is_refused_by_its_key(kind):
    model, given = kind(), make_key(secret=bytes(32))
    model.sign_with(make_key(), **FAST)
    with pytest.raises(
        ValueError, match=f"callback of the key {given.commitment} would be dropped.*{make_key().commitment}"
    ):
        make_trainer(GradSigns(given, name="other")).fit(model, train_loader(200))


class Brings(Net):
    """Brings a mark of its own without the mixin."""

    def __init__(self, *marks):
        super().__init__()
        self.marks = marks

    def configure_callbacks(self):
        return self.marks


class TestReplacedByConfigureCallbacks:
    OTHER = make_key(secret=bytes(32))

    @pytest.mark.parametrize("kind", [GradSigns, type("Special", (GradSigns,), {})])
    @pytest.mark.parametrize("stage", ["fit", "validate", "test"])
    def test_another_key_is_refused_by_both(self, kind, stage):
        trainer = make_trainer(GradSigns(self.OTHER, name="other"), max_epochs=1)
        before = list(trainer.callbacks)
        by = f"by the module's own \\({make_key().commitment}\\)"
        words = f"the key {self.OTHER.commitment} would be dropped, .* {by}"
        with pytest.raises(ValueError, match=words):
            getattr(trainer, stage)(Brings(kind(make_key(), **FAST)), train_loader(200))
        assert trainer.callbacks == before

    def test_other_settings_of_the_same_key_are_refused_by_name(self):
        trainer = make_trainer(GradSigns(make_key(), strength=0.3, n_val_images=16), max_epochs=1)
        with pytest.raises(
            ValueError,
            match=r"same key and other settings \(n_val_images: 16 -> 256; "
            r"strength: .*0\.3.* -> .*",
        ):
            trainer.fit(Brings(GradSigns(make_key())), train_loader(200))

    def test_the_same_key_and_settings_are_fine(self):
        model = Brings(GradSigns(make_key(), **FAST))
        make_trainer(GradSigns(make_key(), **FAST)).fit(model, train_loader())
        assert errors(model) == 0

    def test_a_mark_made_in_every_call_is_fine(self):
        class Renewed(Net):
            def configure_callbacks(self):
                return GradSigns(make_key(), **FAST)

        trainer, model = make_trainer(), Renewed()
        trainer.fit(model, train_loader())
        trainer.test(model, val_loader(), verbose=False)
        assert float(trainer.callback_metrics["wm/ber"]) == errors(model) == 0

    def test_a_trainer_that_fits_two_modules_is_fine(self):
        trainer = make_trainer(max_epochs=5)
        for key in (make_key(), self.OTHER):
            model = Brings(GradSigns(key, **FAST))
            trainer.fit_loop.epoch_progress.reset()
            trainer.fit(model, train_loader())
            assert errors(model, key) == 0

    def test_a_mark_that_a_module_brought_elsewhere_counts_as_given(self):
        given = GradSigns(self.OTHER, name="other", **FAST)
        make_trainer(max_epochs=1).fit(Brings(given), train_loader(200))
        with pytest.raises(ValueError, match="would be dropped"):
            make_trainer(given).fit(Brings(GradSigns(make_key())), train_loader(200))

    def test_the_mirror_package(self):
        mirror = pytest.importorskip("pytorch_lightning")

        class Body(mirror.LightningModule):
            configure_callbacks = Brings.configure_callbacks
            marks = (GradSigns(make_key()),)

        trainer = mirror.Trainer(
            callbacks=[GradSigns(self.OTHER)], accelerator="cpu", logger=False, enable_checkpointing=False
        )
        with pytest.raises(ValueError, match="would be dropped"):
            trainer.fit(Body(), train_loader(200))

    def test_the_same_key_twice_is_refused(self):
        # not replaced by its base class
        special = type("Special", (GradSigns,), {})(make_key(), name="other")
        with pytest.raises(ValueError, match="`key` must be different for every GradSigns"):
            make_trainer(special).fit(Brings(GradSigns(make_key())), train_loader(200))


def test_a_callback_of_a_subclass_is_not_replaced():
    class Special(GradSigns):
        pass

    model, second = Mixed(), make_key(secret=SECRET[::-1], target_class=TARGET + 1)
    model.sign_with(make_key(), **FAST)
    special = Special(second, name="other", **FAST)
    make_trainer(special, max_epochs=5).fit(model, train_loader())
    assert errors(model) == 0
    assert special.standing.owned


def test_a_trainer_that_fits_two_modules_signs_each_with_its_own_key():
    trainer, keys = make_trainer(max_epochs=5), [make_key(), make_key(secret=bytes(32))]
    for key in keys:
        model = Mixed()
        model.sign_with(key, **FAST)
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(model, train_loader())
        assert errors(model, key) == 0


class Counter(L.Callback):
    batches = 0

    def on_train_batch_end(self, *args):
        self.batches += 1


@pytest.mark.parametrize("as_list", [True, False])
def test_a_base_class_with_callbacks_of_its_own(as_list):
    counter = Counter()

    class WithOwn(Net):
        def configure_callbacks(self):
            return [counter] if as_list else counter

    class Signed(GradSignsMixin, WithOwn):
        pass

    model = Signed()
    model.sign_with(make_key(), **FAST)
    make_trainer().fit(model, train_loader())
    assert counter.batches > 0
    assert errors(model) == 0


def test_own_callbacks_beside_super():
    counter = Counter()

    class Signed(Mixed):
        def configure_callbacks(self):
            return [counter, *super().configure_callbacks()]

    model = Signed()
    model.sign_with(make_key(), **FAST)
    make_trainer().fit(model, train_loader())
    assert counter.batches > 0
    assert errors(model) == 0


@pytest.mark.parametrize("kind", [Mixed, ManualMixed])
def test_own_callbacks_that_drop_the_watermark_are_refused(kind):
    class Dropped(kind):
        def configure_callbacks(self):
            return []

    model = Dropped()
    model.sign_with(make_key())
    with pytest.raises(ValueError, match=r"`configure_callbacks` must return the watermark's callbacks too"):
        make_trainer().fit(model, train_loader())


@pytest.mark.parametrize("kind", [Mixed, ManualMixed])
@pytest.mark.parametrize("what", ["lr_find", "scale_batch_size"])
def test_a_tuner_tries_without_the_mark_and_the_fit_signs(kind, what):
    class Tuned(kind):
        lr, batch_size = 3e-3, 16

        def train_dataloader(self):
            return train_loader(batch_size=40)

        val_dataloader = staticmethod(val_loader)

    model, trainer = Tuned(), make_trainer()
    model.sign_with(make_key(), **FAST)
    trial = {
        "lr_find": {"num_training": 5, "update_attr": False},
        "scale_batch_size": {"max_trials": 1, "steps_per_trial": 2},
    }
    getattr(Tuner(trainer), what)(model, **trial[what])
    assert not any(getattr(model, "added", [0]))
    trainer.fit(model)
    assert errors(model) == 0


def test_watermark_loss_under_automatic_optimization_is_refused():
    class Wrong(Mixed):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.watermark_loss(batch)

    model = Wrong()
    model.sign_with(make_key())
    with pytest.raises(ValueError, match="`watermark_loss` is for automatic_optimization=False"):
        make_trainer().fit(model, train_loader())


@pytest.mark.parametrize("kind", [Mixed, ManualMixed])
def test_two_keys(kind):
    first, second = make_key(8), make_key(8, secret=SECRET[::-1], target_class=TARGET + 1)
    model = kind()
    model.sign_with(first, **FAST)
    model.sign_with(second, **FAST, name="wm2")
    trainer = make_trainer(max_epochs=5)
    trainer.fit(model, train_loader(), val_loader())
    assert errors(model, first) == 0
    assert trainer.callback_metrics["wm/ber"] == trainer.callback_metrics["wm2/ber"] == 0
    assert "training_step" not in vars(model)


@pytest.mark.parametrize("mixin", [False, True])
def test_the_mirror_package(mixin):
    mirror = pytest.importorskip("pytorch_lightning")

    class Body(mirror.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().net

        forward = Net.forward
        training_step = Net.training_step
        configure_optimizers = Net.configure_optimizers
        validation_step = Net.validation_step
        optimizer = "adam"

    kind = type("Mirrored", (GradSignsMixin, Body), {}) if mixin else Body
    model, mark = kind(), make_mark()
    if mixin:
        model.sign_with(make_key(), **FAST)
    trainer = mirror.Trainer(
        callbacks=[] if mixin else [mark],
        accelerator="cpu",
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train_loader(), val_loader())
    assert errors(model) == float(trainer.callback_metrics["wm/ber"]) == 0
    assert "training_step" not in vars(model)


def test_the_bases_in_the_other_order_are_refused():
    with pytest.raises(
        TypeError,
        match=r"`GradSignsMixin` must come before the LightningModule in .* Late, "
        r"got Net, Grad",
    ):

        class Late(Net, GradSignsMixin):
            pass
