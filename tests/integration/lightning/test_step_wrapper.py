"""The wrapper around ``training_step``: which forms it takes, and that nothing of it stays behind."""

import base64
import copy
import functools
import pathlib
import pickle

import lightning.pytorch as L
import pytest
import torch
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
)
from torch.nn import functional as F

from gradsigns_lightning import Cadence, GradSigns, GradSignsMixin, verify
from gradsigns_lightning.integration.step_patch import StepPatch

pytestmark = pytest.mark.usefixtures("seeded")
STEP = Net.training_step


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def decorated(step):
    @functools.wraps(step)
    def wrapper(self, *args, **kwargs):
        return step(self, *args, **kwargs)

    return wrapper


class OneArgument(Net):
    def training_step(self, batch):
        return loss_of(self, batch)


class DecoratedOne(Net):
    @decorated
    @decorated
    def training_step(self, batch):
        return loss_of(self, batch)


class DecoratedTwo(Net):
    @decorated
    def training_step(self, batch, batch_idx):
        assert isinstance(batch_idx, int)
        return loss_of(self, batch)


class Variadic(Net):
    def training_step(self, *args, **kwargs):
        return loss_of(self, args[0])


class Dictionary(Net):
    def training_step(self, batch, batch_idx):
        return {"loss": loss_of(self, batch), "extra": batch_idx}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert outputs["extra"] == batch_idx


class SometimesNone(Net):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 0 else loss_of(self, batch)


class EverySecondNone(Net):
    """The first batch of every optimizer step, which is the one that would embed, returns nothing."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 == 0 else loss_of(self, batch)


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
@pytest.mark.parametrize(
    "form", [OneArgument, DecoratedOne, DecoratedTwo, Variadic, Dictionary, SometimesNone, EverySecondNone]
)
def test_every_form_of_training_step_is_signed(form):
    model = form()
    make_trainer(make_mark(), max_epochs=6).fit(model, train_loader(), val_loader())
    assert verify(model, make_key(), held_out_target_images()).bit_error_rate == 0
    assert "training_step" not in vars(model)


@pytest.mark.parametrize("output", [7.0, {"no_loss": 1}, "loss"])
def test_another_output_is_a_type_error(output):
    class Odd(Net):
        def training_step(self, batch, batch_idx):
            # The first step does not embed, and Lightning itself refuses its output.
            return super().training_step(batch, batch_idx) if self.global_step == 0 else output

    with pytest.raises(
        TypeError, match="`training_step` must return a tensor, a mapping with a tensor `loss`, or None"
    ):
        make_trainer(make_mark()).fit(Odd(), train_loader())


class TestPatchAlone:
    class Module:
        def training_step(self, batch, batch_idx=0):
            return torch.tensor(1.0)

    @pytest.mark.parametrize(
        "call",
        [
            lambda step: step("b"),
            lambda step: step("b", 1),
            lambda step: step(batch="b"),
            lambda step: step(batch_idx=1, batch="b"),
        ],
    )
    def test_the_batch_is_found_among_the_arguments(self, call):
        seen = []
        module = self.Module()
        patch = StepPatch(module, lambda batch: seen.append(batch) or torch.tensor(2.0))
        assert call(module.training_step) == 3
        assert seen == ["b"]
        patch.remove()
        assert call(module.training_step) == 1

    def test_a_scalar_that_a_skipped_step_did_not_use_is_reported(self):
        class Skipping:
            def training_step(self, batch):
                return None if batch == "bad" else torch.tensor(1.0)

        module, unused = Skipping(), []
        StepPatch(module, lambda batch: torch.tensor(2.0), lambda: unused.append(True))
        assert module.training_step("good") == 3
        assert not unused
        assert module.training_step("bad") is None
        assert unused == [True]

    def test_a_batch_of_another_name(self):
        class Other:
            def training_step(self, sample):
                return torch.tensor(1.0)

        module, seen = Other(), []
        StepPatch(module, lambda batch: seen.append(batch))
        assert module.training_step(sample="b") == 1
        assert seen == ["b"]

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
    @pytest.mark.parametrize("own", [False, True])
    def test_removal_in_any_order_leaves_nothing(self, order, own):
        module = self.Module()
        original = lambda batch, batch_idx=0: torch.tensor(10.0)  # noqa: E731
        if own:
            module.training_step = original
        patches = [StepPatch(module, lambda batch, v=v: torch.tensor(v)) for v in (1.0, 2.0, 4.0)]
        base = 10 if own else 1
        left = {0, 1, 2}
        assert module.training_step("b") == base + 7
        for index in order:
            patches[index].remove()
            left.discard(index)
            assert module.training_step("b") == base + sum(2**i for i in left)
        assert vars(module) == ({"training_step": original} if own else {})

    def test_another_wrapper_on_top_stays_and_ours_is_disabled(self):
        module = self.Module()
        patch = StepPatch(module, lambda batch: torch.tensor(2.0))
        other = functools.wraps(module.training_step)(
            lambda *args, step=module.training_step: step(*args) * 10
        )
        module.training_step = other
        assert module.training_step("b") == 30
        patch.remove()
        assert vars(module)["training_step"] is other
        assert module.training_step("b") == 10


class Bomb(Net):
    def __init__(self, error):
        super().__init__()
        self.error = error
        self.wrapped = None

    def training_step(self, batch, batch_idx):
        self.wrapped = "training_step" in vars(self)
        if batch_idx == 3:
            raise self.error
        return super().training_step(batch, batch_idx)


class TestLifetime:
    def test_installed_only_while_fitting(self):
        seen = {}

        class Watch(Net):
            def note(self, where):
                seen[where] = "training_step" in vars(self)

            def setup(self, stage):
                self.note(f"setup {stage}")

            def on_train_start(self):
                self.note("train")

            def on_validation_start(self):
                self.note(
                    "validation in fit"
                    if self.trainer.training or self.trainer.sanity_checking
                    else "validate"
                )

            def on_test_start(self):
                self.note("test")

        model = Watch()
        trainer = make_trainer(make_mark(), max_epochs=1)
        trainer.fit(model, train_loader(200), val_loader())
        assert "training_step" not in vars(model)
        trainer.validate(model, val_loader(), verbose=False)
        trainer.test(model, val_loader(), verbose=False)
        installed = {where for where, there in seen.items() if there}
        assert installed == {"train", "validation in fit"}
        pickle.dumps(model.state_dict())
        assert model.training_step.__func__ is Net.training_step

    @pytest.mark.parametrize(
        ("error", "raised"),
        [
            (RuntimeError("bang"), RuntimeError),
            (KeyboardInterrupt(), (SystemExit, KeyboardInterrupt)),
            (SystemExit(3), SystemExit),
        ],
    )
    def test_removed_after_an_exception_and_the_next_fit_signs(self, error, raised):
        model, mark = Bomb(error), make_mark()
        with pytest.raises(raised):
            make_trainer(mark).fit(model, train_loader())
        assert model.wrapped is True
        assert "training_step" not in vars(model)
        model.__class__ = Net
        make_trainer(mark).fit(model, train_loader())
        assert verify(model, mark.key, held_out_target_images()).bit_error_rate == 0

    def test_removed_after_an_exception_in_another_callback_at_fit_start(self):
        class Later(L.Callback):
            def on_fit_start(self, trainer, pl_module):
                assert "training_step" in vars(pl_module)
                raise RuntimeError("later")

        model = Net()
        with pytest.raises(RuntimeError, match="later"):
            make_trainer(make_mark(), Later()).fit(model, train_loader())
        assert "training_step" not in vars(model)

    def test_a_fit_that_ended_without_a_teardown_does_not_double_the_loss(self):
        class Broken(L.Callback):
            def on_exception(self, trainer, pl_module, exception):
                raise ValueError("broken on_exception")

        model, mark = Bomb(RuntimeError("bang")), make_mark(cadence=1)
        with pytest.raises(ValueError, match="broken on_exception"):
            make_trainer(Broken(), mark).fit(model, train_loader())
        assert "training_step" in vars(model)
        model.__class__ = Net
        make_trainer(mark, max_epochs=1).fit(model, train_loader(80))
        assert "training_step" not in vars(model)

    def test_the_users_own_instance_attribute_stays(self):
        model = Net()
        own = functools.partial(STEP, model)
        step = functools.wraps(STEP)(lambda batch, batch_idx: own(batch, batch_idx))
        model.training_step = step
        make_trainer(make_mark(), max_epochs=5).fit(model, train_loader())
        assert vars(model)["training_step"] is step
        assert verify(model, make_key(), held_out_target_images()).bit_error_rate == 0


class InPhases(Net):
    """Has another step from a given moment on."""

    def __init__(self, moment):
        super().__init__()
        self.moment = moment

    def second_step(self, batch, batch_idx):
        return 2 * loss_of(self, batch)

    def switch(self, moment):
        if moment == self.moment:
            self.training_step = self.second_step

    def on_fit_start(self):
        self.switch("fit")

    def on_train_epoch_start(self):
        self.switch(self.current_epoch)


@pytest.mark.parametrize("moment", ["fit", 1])
@pytest.mark.parametrize("n_marks", [1, 2])
def test_a_step_that_the_module_replaces_itself_is_signed_too(moment, n_marks):
    model = InPhases(moment)
    second, always = make_key(8, secret=SECRET[::-1], target_class=TARGET + 1), Cadence(2, max_backoff=1)
    marks = [make_mark(cadence=always), make_mark(second, cadence=always, name="wm2")][:n_marks]
    make_trainer(*marks, max_epochs=4).fit(model, train_loader())
    assert all(mark.standing.n_embedded > 50 for mark in marks)
    assert verify(model, marks[0].key, held_out_target_images()).bit_error_rate == 0
    assert vars(model)["training_step"] == model.second_step
    assert "__getstate__" not in vars(model)


class Stateful(Net):
    """Defines itself what is pickled."""

    def __getstate__(self):
        return super().__getstate__() | {"stamp": 7}


class Saver(L.Callback):
    """Pickles and copies the whole module as it trains."""

    def on_train_epoch_end(self, trainer, pl_module):
        torch.save(pl_module, "whole.pt")
        self.deep, self.shallow = copy.deepcopy(pl_module), copy.copy(pl_module)
        self.patched = "training_step" in vars(pl_module)


class TestCopies:
    """What is pickled or copied while the module is fitted has the plain step."""

    @pytest.mark.parametrize("module", [Net, Stateful])
    @pytest.mark.parametrize(
        "marks", [[{}], [{"strength": 0.0}], [{}, {"name": "wm2", "key": make_key(8, secret=SECRET[::-1])}]]
    )
    def test_a_module_is_saved_and_copied_while_it_fits(self, module, marks):
        saver, model = Saver(), module()
        make_trainer(saver, *(make_mark(**settings) for settings in marks), max_epochs=1).fit(
            model, train_loader(400)
        )
        assert saver.patched is ("strength" not in marks[0])
        loaded = torch.load("whole.pt", weights_only=False)
        for other in (loaded, saver.deep, saver.shallow):
            assert not {"training_step", "__getstate__"} & set(vars(other))
            assert other.training_step.__self__ is other
            assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
        assert getattr(loaded, "stamp", None) == (7 if module is Stateful else None)
        assert not {"training_step", "__getstate__"} & set(vars(model))
        make_trainer(make_mark(), max_epochs=1).fit(saver.deep, train_loader(400))
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))

    def test_the_users_own_attributes_go_along(self):
        model = Net()
        model.training_step = functools.partial(STEP, model)
        functools.update_wrapper(model.training_step, STEP)
        saver = Saver()
        make_trainer(saver, make_mark(), max_epochs=1).fit(model, train_loader(400))
        assert isinstance(vars(saver.deep)["training_step"], functools.partial)
        assert vars(saver.deep)["training_step"].args == (saver.deep,)


class Signed(GradSignsMixin, Net):
    def sign_with(self, key, **settings):
        self.mark = super().sign_with(key, **settings)  # as a user may keep it
        return self.mark


class ManuallySigned(Signed):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self, batch) + self.watermark_loss(batch))
        optimizer.step()


class SavesInTheMiddle(Saver):
    """Pickles and copies between the loss and the optimizer's step of one that embeds, too."""

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step > 0:
            self.on_train_epoch_end(trainer, pl_module)
            self.shallow.mark = copy.copy(pl_module.mark)


FORMS_OF_THE_SECRET = {
    "bytes": SECRET,
    "hex": SECRET.hex().encode(),
    "base64": base64.b64encode(SECRET)[:-2],
    "list": b"K\x64K\x65K\x66",
}


class TestCopiesOfAModuleThatBringsItsMark:
    def fitted(self, kind, *, key=None):
        saver, model = SavesInTheMiddle(), kind()
        model.sign_with(key or make_key(), cadence=2, momentum=0.0)
        make_trainer(saver, max_epochs=2).fit(model, train_loader(400))
        return saver, model

    @pytest.mark.parametrize("kind", [Signed, ManuallySigned])
    def test_the_secret_does_not_travel_into_a_file(self, kind):
        _, model = self.fitted(kind)
        whole = pathlib.Path("whole.pt").read_bytes(), pickle.dumps(model), pickle.dumps(model, protocol=2)
        assert SECRET in pickle.dumps(SECRET)
        assert FORMS_OF_THE_SECRET["list"] in pickle.dumps(list(SECRET))
        for data in whole:
            assert not {name for name, form in FORMS_OF_THE_SECRET.items() if form in data}
            assert make_key().commitment.encode() not in data
        assert len(whole[1]) < len(pickle.dumps(Net())) + 1000  # nor do the buffered images
        loaded = pickle.loads(whole[1])
        assert loaded.mark is None
        with pytest.raises(
            ValueError,
            match=r"was pickled without the key that signed it: call `self.sign_with\(key\)` again",
        ):
            make_trainer(max_epochs=1).fit(loaded, train_loader(200))
        loaded.sign_with(make_key(), cadence=2, momentum=0.0)
        make_trainer().fit(loaded, train_loader())
        assert verify(loaded, make_key(), held_out_target_images()).bit_error_rate == 0

    @pytest.mark.parametrize("kind", [Signed, ManuallySigned])
    def test_copies_sign_on_their_own(self, kind):
        saver, model = self.fitted(kind)
        weights = copy.deepcopy(model.state_dict())
        for other in (saver.deep, copy.deepcopy(model)):
            assert other.mark is other._gradsigns[0] is not model.mark
            assert other.mark.key is model.mark.key
            make_trainer().fit(other, train_loader())
            assert verify(other, make_key(), held_out_target_images()).bit_error_rate == 0
            assert "training_step" not in vars(other)
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
        assert isinstance(saver.shallow.mark, GradSigns)
        assert saver.shallow.mark.key is model.mark.key

    def test_the_fit_is_the_same(self):
        models = []
        for callbacks in ([], [SavesInTheMiddle()]):
            torch.manual_seed(0)
            model = Signed()
            model.sign_with(make_key(), cadence=2)
            make_trainer(*callbacks, max_epochs=2).fit(model, train_loader(400))
            models.append(model)
        assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))

    def test_processes_that_are_started_get_the_key(self):
        model = Signed()
        model.sign_with(make_key(), cadence=2, momentum=0.0)
        trainer = make_trainer(accelerator="cpu", devices=2, strategy="ddp_spawn")
        trainer.fit(model, train_loader())
        assert verify(model, make_key(), held_out_target_images()).bit_error_rate == 0

    def test_a_callback_of_its_own_is_not_pickled_at_all(self):
        with pytest.raises(TypeError, match="A WatermarkKey cannot be pickled"):
            pickle.dumps(make_mark())


class TestTwoKeys:
    def keys(self):
        return make_key(8), make_key(8, secret=SECRET[::-1], target_class=TARGET + 1)

    def test_both_are_readable_and_both_wrappers_go(self):
        first, second = self.keys()
        model = Net()
        trainer = make_trainer(make_mark(first), make_mark(second, name="wm2"), max_epochs=5)
        trainer.fit(model, train_loader(), val_loader())
        assert trainer.callback_metrics["wm/ber"] == trainer.callback_metrics["wm2/ber"] == 0
        assert "training_step" not in vars(model)
        assert verify(model, first, held_out_target_images()).bit_error_rate == 0

    def test_both_wrappers_go_after_an_exception(self):
        first, second = self.keys()
        model = Bomb(RuntimeError("bang"))
        with pytest.raises(RuntimeError, match="bang"):
            make_trainer(make_mark(first), make_mark(second, name="wm2")).fit(model, train_loader())
        assert "training_step" not in vars(model)

    @pytest.mark.parametrize("stage", ["fit", "validate"])
    def test_the_same_name_twice_is_refused(self, stage):
        first, second = self.keys()
        with pytest.raises(ValueError, match=r"`name` must be different .* got \['wm', 'wm'\]"):
            getattr(make_trainer(make_mark(first), make_mark(second)), stage)(Net(), train_loader())

    def test_the_same_key_twice_is_refused_by_the_trainer(self):
        with pytest.raises(RuntimeError, match="state_key"):
            make_trainer(make_mark(), make_mark(name="wm2"))
