"""Weight averaging: the mark is read on the weights that will be saved."""

from dataclasses import replace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from signed_digits import (
    Net,
    conv_net,
    held_out_target_images,
    make_key,
    make_mark,
    make_trainer,
    train_loader,
    val_loader,
    warned,
)

from gradsigns_lightning import verify
from gradsigns_lightning.integration.standing import Standing

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("mark_first", [True, False])
def test_ema_is_read_and_saved_signed(tmp_path, mark_first):
    live = []

    class Watch(Net):
        def on_train_epoch_end(self):
            live.append({k: v.clone() for k, v in self.state_dict().items()})

    key, model = make_key(), Watch()
    pair = [make_mark(key), EMAWeightAveraging(decay=0.95)]
    keep = ModelCheckpoint(tmp_path, filename="last")
    trainer = make_trainer(
        *(pair if mark_first else pair[::-1]), keep, enable_checkpointing=True, max_epochs=6
    )
    trainer.fit(model, train_loader(), val_loader())
    # at the end of training the averages move into the module
    result = verify(model, key, held_out_target_images())
    assert result.bit_error_rate == float(trainer.callback_metrics["wm/ber"]) == 0
    assert float(trainer.callback_metrics["wm/margin"]) == pytest.approx(result.margin, rel=1e-3)
    raw = Net()
    raw.load_state_dict(live[-1])
    assert verify(raw, key, held_out_target_images()).margin != pytest.approx(result.margin, rel=1e-3)
    restored = Net()
    restored.load_state_dict(torch.load(keep.best_model_path, weights_only=True)["state_dict"])
    assert verify(restored, key, held_out_target_images()).margin == pytest.approx(result.margin, rel=1e-6)
    assert "training_step" not in vars(model)


@pytest.mark.parametrize("net", [None, conv_net], ids=["mlp", "batchnorm"])
def test_swa_ends_signed(net):
    key, model = make_key(16), Net(net and net())
    trainer = make_trainer(
        make_mark(key),
        StochasticWeightAveraging(swa_lrs=2e-3, swa_epoch_start=4, annealing_epochs=1),
        max_epochs=8,
    )
    trainer.fit(model, train_loader(), val_loader())
    result = verify(model, key, held_out_target_images())
    assert result.bit_error_rate == 0
    if net:  # an extra epoch without backward renews the statistics, and its validation reads the averages
        assert float(trainer.callback_metrics["wm/margin"]) == pytest.approx(result.margin, rel=1e-3)


def halve(module):
    for parameter in module.parameters():
        parameter.data.mul_(0.5)


class HalvingCallback(L.Callback):
    def on_train_end(self, trainer, pl_module):
        halve(pl_module)


class HalvingNet(Net):
    def on_train_end(self):
        halve(self)


def margin_of(model, mark):
    """Return what ``verify`` finds on the images that the final line names."""
    buffer = mark.watermarker.buffer
    images = held_out_target_images() if mark.standing.held_out else (buffer.images * 0.4 + 0.3)[buffer.valid]
    return verify(model, mark.key, images).margin


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.98),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=2e-3, swa_epoch_start=3, annealing_epochs=1),
    "own": HalvingCallback,
}


@pytest.mark.filterwarnings("ignore:Only 32 images")
class TestTheLineIsOfTheWeightsThatTheUserGets:
    @pytest.mark.parametrize("validate", [True, False], ids=["validation", "no_validation"])
    @pytest.mark.parametrize("mark_first", [True, False], ids=["mark_first", "mark_last"])
    @pytest.mark.parametrize("averages", AVERAGES)
    def test_in_each_order_of_the_callbacks(self, averages, mark_first, validate):
        mark, model = make_mark(), Net()
        pair = [mark, AVERAGES[averages]()]
        trainer = make_trainer(*(pair if mark_first else pair[::-1]), max_epochs=4)
        callbacks = set(trainer.callbacks)
        trainer.fit(model, train_loader(400), val_loader() if validate else None)
        # validation has the averages with EMA only
        assert mark.standing.held_out is (validate and averages == "ema")
        assert not mark.standing.replaced
        assert mark.standing.margin == pytest.approx(margin_of(model, mark), abs=1e-5)
        assert set(trainer.callbacks) == callbacks

    def test_a_renewal_of_statistics_that_is_not_validated(self):
        mark, model = make_mark(), Net(conv_net())
        averages = StochasticWeightAveraging(swa_lrs=2e-3, swa_epoch_start=2, annealing_epochs=1)
        make_trainer(mark, averages, max_epochs=4, check_val_every_n_epoch=4).fit(
            model, train_loader(400), val_loader()
        )
        assert mark.standing.margin == pytest.approx(margin_of(model, mark), abs=1e-5)
        assert (mark.standing.held_out, mark.standing.n_steps_since) == (False, 0)

    @pytest.mark.parametrize("validate", [True, False], ids=["validation", "no_validation"])
    def test_the_modules_own_hook_comes_after_all_callbacks(self, validate):
        mark, model = make_mark(), HalvingNet()
        make_trainer(mark, max_epochs=3).fit(model, train_loader(400), val_loader() if validate else None)
        assert mark.standing.margin == pytest.approx(margin_of(model, mark), abs=1e-5)

    @pytest.mark.parametrize("validate", [True, False], ids=["validation", "no_validation"])
    def test_averages_that_have_not_caught_up_are_the_cause(self, recwarn, validate):
        mark = make_mark()
        averages = EMAWeightAveraging(decay=0.999)
        make_trainer(mark, averages).fit(Net(), train_loader(), val_loader() if validate else None)
        (found,) = warned(recwarn)
        assert (
            "The weights in training held 32 bits, but their averages, which are read, have not caught up yet"
            in found
        )

    def test_two_marks(self):
        marks = [make_mark(make_key(8)), make_mark(make_key(8, secret=bytes(32)), name="wm2")]
        trainer, model = make_trainer(marks[0], HalvingCallback(), marks[1], max_epochs=3), Net()
        trainer.fit(model, train_loader(400))
        assert [m.standing.margin for m in marks] == pytest.approx(
            [margin_of(model, m) for m in marks], abs=1e-5
        )
        assert len(trainer.callbacks) == 3

    def test_weights_that_cannot_be_read_again_are_reported(self):
        mark = make_mark(strength=0.0)
        make_trainer(mark, HalvingCallback(), max_epochs=1).fit(Net(), train_loader(200), val_loader())
        assert mark.standing.replaced
        assert "read on 50 held-out images, before the weights were replaced, 0 embedding steps" in str(
            mark.standing
        )
        assert "replaced" not in str(replace(mark.standing, replaced=False))

    def test_an_error_in_another_callback_leaves_nothing_behind(self):
        class Failing(L.Callback):
            def on_train_end(self, trainer, pl_module):
                raise RuntimeError("late")

        mark = make_mark()
        trainer = make_trainer(mark, failing := Failing(), max_epochs=1)
        with pytest.raises(RuntimeError, match="late"):
            trainer.fit(Net(), train_loader(200))
        assert trainer.callbacks == [mark, failing]
        assert mark.standing is None


def test_two_processes_report_that_the_modules_own_hook_replaced_the_weights():
    trainer = make_trainer(
        mark := make_mark(), accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=2
    )
    trainer.fit(HalvingNet(), train_loader(400))
    assert Standing.from_metrics(trainer.callback_metrics, "wm", mark.key).replaced
