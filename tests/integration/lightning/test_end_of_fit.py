"""At the end of a fit the callback says how the mark stands; if it does not hold, why, and what helps."""

import io
import logging
import math
import signal
import threading
from contextlib import nullcontext

import lightning.pytorch as L
import pytest
import rich
import torch
from lightning.pytorch.callbacks import ModelPruning, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core import rank_zero
from signed_digits import (
    TARGET,
    Net,
    Trained,
    conv_net,
    held_out_target_images,
    make_key,
    make_mark,
    make_trainer,
    train_loader,
    val_loader,
    warned,
)
from torch.nn.utils import prune

from gradsigns_lightning import Cadence, GradSigns, verify
from gradsigns_lightning.integration.standing import Standing

pytestmark = pytest.mark.usefixtures("seeded")


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        if "GradSigns" in record.getMessage():
            self.lines.append(record.getMessage())


@pytest.fixture
def lines():
    handler, logger = Lines(), rank_zero.log  # which package's it is depends on what was imported last
    before = logger.level, logger.disabled
    # other tests and the command line leave Lightning's loggers raised or switched off
    logger.disabled = False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(before[0])
    logger.disabled = before[1]


def assert_equals(standing, result):
    assert (standing.n_bits, standing.n_matches) == (result.n_bits, result.n_matches)
    assert standing.p_value == result.p_value
    assert standing.log10_p_value == result.log10_p_value
    assert standing.margin == pytest.approx(result.margin, rel=1e-3, abs=1e-5)
    assert standing.owned is (result.verdict == "owned")


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_progress_bar_does_not_wipe_the_line_out(lines, interrupted):
    """On a terminal Lightning's default bar moves the cursor up and erases until it is closed."""
    terminal = io.StringIO()
    handler = logging.StreamHandler(terminal)
    rank_zero.log.addHandler(handler)
    bar = RichProgressBar(console_kwargs={"file": terminal, "force_terminal": True})

    class Interrupting(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if interrupted:
                raise KeyboardInterrupt

    trainer = make_trainer(make_mark(), Interrupting(), bar, max_epochs=1, enable_progress_bar=True)
    try:
        with pytest.raises(SystemExit) if interrupted else nullcontext():
            trainer.fit(Net(), train_loader(), val_loader())
    finally:
        rank_zero.log.removeHandler(handler)
        rich.reconfigure()
    (line,) = lines
    bar_drawn, _, rest = terminal.getvalue().partition(line)
    assert "\x1b[1A" in bar_drawn
    assert "\x1b[1A" not in rest


def test_it_is_read_on_the_held_out_images_of_the_last_validation(lines, recwarn):
    mark, model = make_mark(), Net()
    assert mark.standing is None
    make_trainer(mark).fit(model, train_loader(), val_loader())
    assert_equals(mark.standing, verify(model, mark.key, held_out_target_images()))
    assert (mark.standing.held_out, mark.standing.n_images, mark.standing.n_steps_since) == (True, 50, 0)
    assert mark.standing.n_embedded == mark.watermarker.state.n_embedded
    (line,) = lines
    assert line == f"GradSigns 'wm': {mark.standing}."
    assert "32 of 32 bits held, p = 2.3e-10 (log10 -9.6), smallest margin +0." in line
    assert ": owned at alpha 1e-09; read on 50 held-out images, " in line
    assert (mark.standing.free_bits, mark.standing.log10_charged_p_value) == (0, mark.standing.log10_p_value)
    assert not warned(recwarn)


@pytest.mark.parametrize("net", [None, conv_net], ids=["mlp", "conv_batchnorm"])
def test_without_validation_the_training_images_are_read(lines, recwarn, net):
    mark, model = make_mark(), Net(net and net())
    make_trainer(mark).fit(model, train_loader())
    buffer = mark.watermarker.buffer
    result = verify(model, mark.key, (buffer.images * 0.4 + 0.3)[buffer.valid])
    assert_equals(mark.standing, result)
    assert (mark.standing.held_out, mark.standing.n_images) == (False, 32)
    assert len(lines) == 1
    assert "read on 32 training images" in lines[0]
    assert not warned(recwarn)


def test_a_payload_that_could_be_fitted_is_reported_and_charged(lines):
    key = make_key().with_payload(bytes(4))
    trainer, model = make_trainer(mark := make_mark(key)), Net()
    trainer.fit(model, train_loader(), val_loader())
    result = verify(model, key, held_out_target_images())
    assert (mark.standing.free_bits, result.free_bits) == (32, 32)
    assert mark.standing.owned
    assert mark.standing.log10_charged_p_value == result.log10_charged_p_value > -9
    assert mark.standing.to_dict()["log10_charged_p_value"] == mark.standing.log10_charged_p_value
    (line,) = lines
    assert (
        ": owned at alpha 1e-09, for the key's maker alone: 32 bits of it could be fitted to this model; "
        "read on" in line
    )
    assert Standing.from_metrics(trainer.callback_metrics, "wm", key) == mark.standing


def test_steps_after_the_last_validation_count():
    mark, model = make_mark(), Net()
    make_trainer(mark, check_val_every_n_epoch=2, max_epochs=3).fit(model, train_loader(), val_loader())
    assert not mark.standing.held_out
    reading = make_mark(strength=0.0)
    make_trainer(reading, check_val_every_n_epoch=2, max_epochs=3).fit(model, train_loader(400), val_loader())
    assert (reading.standing.held_out, reading.standing.n_steps_since) == (True, 10)
    assert "held-out images, 10 steps before the end" in str(reading.standing)


def test_reading_leaves_the_model_as_it_was():
    states = []
    for n_val_images in (256, 0):
        torch.manual_seed(3)
        model = Net(conv_net(dropout=0.3))
        mark = make_mark(n_val_images=n_val_images)
        make_trainer(mark, max_epochs=2).fit(model, train_loader(400), val_loader())
        assert mark.standing.held_out is (n_val_images > 0)
        states.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_strength_zero_says_how_a_mark_stands_and_warns_of_nothing(lines, recwarn):
    mark = make_mark(strength=0.0)
    make_trainer(mark, max_epochs=1).fit(Net(), train_loader(200), val_loader())
    assert not mark.standing.owned
    assert len(lines) == 1
    assert not warned(recwarn)
    make_trainer(mark, max_epochs=1).fit(Net(), train_loader(200))
    assert mark.standing is None
    assert len(lines) == 1


class Stop(L.Callback):
    def __init__(self, error):
        self.error = error

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise self.error


def test_a_fit_that_fails_says_nothing(lines, recwarn):
    mark = make_mark()
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(mark, Stop(RuntimeError("stop"))).fit(Net(), train_loader(200), val_loader())
    assert mark.standing is None
    assert not lines
    assert not warned(recwarn)


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="Lightning sets a signal handler"
)
def test_a_fit_that_the_user_ends_says_what_was_read_last(lines, recwarn):
    mark = make_mark()
    with pytest.raises(SystemExit):
        make_trainer(mark, Stop(KeyboardInterrupt())).fit(Net(), train_loader(200), val_loader())
    assert mark.standing.n_images == 50
    assert len(lines) == 1
    assert not warned(recwarn)
    assert signal.getsignal(signal.SIGINT) is not None


class Memory(Logger):
    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.final = {}

    def log_metrics(self, metrics, step=None):
        self.final |= {name: value for name, value in metrics.items() if "/final_" in name}

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_loggers_and_the_trainers_metrics_get_the_figures(tmp_path):
    logger, mark = Memory(), make_mark()
    trainer = make_trainer(mark, logger=[logger, CSVLogger(tmp_path)])
    trainer.fit(Net(), train_loader(), val_loader())
    figures = ("ber", "log10_p_value", "margin", "erasures", "owned", "recognised")
    counts = ("images", "held_out", "embedded", "steps_since", "replaced", "held_back")
    assert set(logger.final) == {f"wm/final_{name}" for name in (*figures, *counts)}
    assert logger.final["wm/final_ber"] == 0
    assert logger.final["wm/final_owned"] == logger.final["wm/final_held_out"] == 1
    assert logger.final["wm/final_margin"] == mark.standing.margin
    assert Standing.from_metrics(trainer.callback_metrics, "wm", mark.key) == mark.standing
    assert Standing.from_metrics(trainer.callback_metrics, "other", mark.key) is None


def test_a_dose_that_was_held_back_for_a_slow_learner_is_reported(lines):
    """A network that learns its classes gets the whole dose in the end.

    One that does not is left room to learn.
    """

    class Slow(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-5)

    fast, slow = make_mark(cadence=None), make_mark(cadence=None)
    make_trainer(fast).fit(Net(), train_loader(), val_loader())
    make_trainer(slow).fit(Slow(), train_loader(), val_loader())
    assert 0 < fast.standing.n_held_back < fast.standing.n_embedded
    assert slow.standing.n_held_back == slow.standing.n_embedded > 0
    for mark, line in zip((fast, slow), lines, strict=True):
        assert line.endswith(
            f" embedding steps, {mark.standing.n_held_back} at a lower dose while the class was not known "
            "yet."
        )


@pytest.mark.parametrize("validation", [True, False])
def test_what_verify_would_not_conclude_from_is_not_owned(lines, recwarn, validation):
    # The step computes its loss from another layer than `forward` returns, so the mark is in numbers that are
    # not logits of the classes.
    class Features(Net):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(10, 10)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return torch.nn.functional.cross_entropy(self.head(self(x).tanh()), (y + 5) % 10)

        def validation_step(self, batch, batch_idx):
            pass

    mark, model = make_mark(), Features()
    make_trainer(mark).fit(model, train_loader(), val_loader() if validation else None)
    with pytest.warns(UserWarning, match="classifies only"):
        result = verify(model, make_key(), held_out_target_images())
    assert result.verdict == "inconclusive"
    assert not mark.standing.owned
    assert mark.standing.recognised < 0.5
    assert f"not owned at alpha 1e-09; read on {mark.standing.n_images} " in lines[0]
    assert "of which the model recognises)" in lines[0]
    (message,) = [text for text in warned(recwarn) if "would not be `owned`" in text]
    assert "`GradSigns.logits` must return the logits that the loss is computed from" in message


class TestNoBatch:
    def told_by(self, recwarn, **settings):
        ckpt_path, mark = settings.pop("ckpt_path", None), make_mark(strength=settings.pop("strength", 0.5))
        make_trainer(mark, **settings).fit(Net(), train_loader(), val_loader(), ckpt_path=ckpt_path)
        assert mark.standing is None
        return warned(recwarn)

    def test_a_checkpoint_that_is_trained_to_its_end_already(self, recwarn, tmp_path):
        trainer = make_trainer(max_epochs=1)
        trainer.fit(Net(), train_loader())
        trainer.save_checkpoint(tmp_path / "unmarked.ckpt")
        (message,) = self.told_by(recwarn, max_epochs=1, ckpt_path=tmp_path / "unmarked.ckpt")
        assert "trained on no batch" in message
        assert "`max_epochs`" in message

    @pytest.mark.parametrize(
        "settings", [{"max_epochs": 0}, {"max_steps": 0}, {"limit_train_batches": 0}], ids=str
    )
    def test_a_fit_of_no_length(self, recwarn, settings):
        (message,) = self.told_by(recwarn, **settings)
        assert "trained on no batch" in message

    def test_nothing_is_said_at_strength_0(self, recwarn):
        assert not self.told_by(recwarn, max_epochs=0, strength=0)


class TestWarnings:
    def message(self, recwarn, model, mark, *callbacks, **settings):
        make_trainer(mark, *callbacks, **settings).fit(model, train_loader())
        assert not mark.standing.owned
        (found,) = [message for message in warned(recwarn) if "would not be `owned`" in message]
        return found

    def test_a_key_that_can_never_be_owned(self, recwarn):
        found = self.message(recwarn, Net(), make_mark(make_key(16)), max_epochs=8)
        assert "(16 of 16 bits held). With a key of 16 bits it never is: 30 bits would do" in found
        assert "learning rate" not in found

    def test_few_embedding_steps(self, recwarn):
        assert "10 embedding steps are not enough: train longer." in self.message(
            recwarn, Net(), make_mark(cadence=Cadence(10, max_backoff=1)), max_epochs=4, max_steps=100
        )

    def test_a_rate_that_is_too_low_and_one_that_would_do(self, recwarn):
        found = self.message(recwarn, Trained(5e-4), GradSigns(make_key()), max_epochs=2)
        assert "the mark needs about" in found
        words = found.split()
        steps, factor = int(words[words.index("optimizer") - 1]), float(words[words.index("least") + 1])
        assert 60 < steps < 600
        assert 1 < factor < 10
        # The advice is true: a fit that long, or a rate that many times as high, embeds the mark.
        for rate, n_steps in ((5e-4, 2 * steps), (1e-3 * factor, 60)):
            mark = GradSigns(make_key())
            make_trainer(mark, max_epochs=-1, max_steps=n_steps).fit(Trained(rate), train_loader())
            assert mark.standing.n_matches >= 31

    @pytest.mark.parametrize("cadence", [None, 10])
    def test_a_network_that_does_not_know_its_class_yet(self, seeded, recwarn, cadence):
        mark = GradSigns(make_key(), cadence=cadence)
        found = self.message(recwarn, Net(), mark, max_epochs=1, max_steps=20)
        confidence = float(mark.watermarker.state.recognised)
        assert confidence < 0.6
        held_back = f"a probability of only {confidence:.2f} for that class, so the mark was held back"
        assert (held_back in found) is (cadence is None)  # a fixed cadence holds nothing back

    def test_a_rate_that_is_too_high(self, seeded, recwarn):
        make_trainer(GradSigns(make_key()), max_epochs=2).fit(Trained(30.0), train_loader())
        early, end = warned(recwarn)
        assert "bits were lost as fast as others were won: the learning rate is too high" in early
        assert "has the training diverged (a learning rate that is too high)?" in end

    def test_a_rate_that_leaves_no_gradient_at_all(self, seeded, recwarn):
        make_trainer(GradSigns(make_key()), max_epochs=2).fit(Trained(100.0), train_loader())
        messages = warned(recwarn)
        assert messages
        for message in messages:
            assert "the gradient of class 3 was zero in every embedding step" in message

    @pytest.mark.parametrize("by_callback", [True, False])
    def test_pruned_weights(self, recwarn, by_callback):
        model, pruning = Net(), []
        if by_callback:
            layer = [(model.net[1], "weight")]
            pruning = [
                ModelPruning("l1_unstructured", layer, amount=0.9, apply_pruning=lambda epoch: epoch == 2)
            ]
        else:
            prune.l1_unstructured(model.net[1], "weight", 0.97)
        found = self.message(recwarn, model, make_mark(), *pruning, max_epochs=3 if by_callback else 1)
        assert "Weights are pruned" in found

    def test_training_images_that_are_unlike_the_held_out_ones(self, recwarn):
        x, y = val_loader().dataset.tensors
        others = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (y + 1) % 10), 100)
        mark = make_mark()
        make_trainer(mark, max_epochs=5).fit(Net(), train_loader(), others)
        (found,) = warned(recwarn)
        assert mark.standing.held_out
        assert "training images holds 32 bits, but that of the held-out images differs." in found
        assert f"More images of class {TARGET}" in found

    def test_few_images_of_the_class(self, recwarn):
        x, y = train_loader().dataset.tensors
        few = torch.cat([(y == TARGET).nonzero()[:2].flatten(), (y != TARGET).nonzero().flatten()])
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[few], y[few]), 40, shuffle=True)
        make_trainer(GradSigns(make_key(), strength=0.01), max_epochs=2).fit(Net(), loader)
        end = warned(recwarn)[-1]
        assert f"images of class {TARGET} were available" in end

    def test_a_training_that_diverged(self, recwarn):
        class Kill(L.Callback):
            def on_train_end(self, trainer, pl_module):
                for parameter in pl_module.parameters():
                    parameter.data.fill_(math.nan)

        mark = make_mark()
        make_trainer(Kill(), mark, max_epochs=1).fit(Net(), train_loader())
        assert mark.standing is None
        (found,) = warned(recwarn)
        assert "the training has diverged: weights are no longer finite" in found


@pytest.mark.parametrize("validate", [True, False])
def test_two_processes_read_together_and_the_figures_come_back(validate):
    settings = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn", "max_epochs": 5}
    trainer, model = make_trainer(make_mark(), **settings), Net()
    trainer.fit(model, train_loader(), val_loader() if validate else None)
    standing = Standing.from_metrics(trainer.callback_metrics, "wm", make_key())
    assert (standing.held_out, standing.n_images) == (validate, 50 if validate else 64)
    assert standing.owned
    if validate:
        assert_equals(standing, verify(model, make_key(), held_out_target_images()))
