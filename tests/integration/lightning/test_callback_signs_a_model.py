"""The main job: one callback signs a classifier, and what it logs is what ``verify`` reads."""

import copy
import math
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from signed_digits import (
    TARGET,
    Net,
    conv_net,
    held_out_target_images,
    make_key,
    make_mark,
    make_trainer,
    mlp,
    train_loader,
    train_set,
    val_loader,
    val_set,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gradsigns_lightning import Cadence, GradSigns, StrengthSchedule, verify

pytestmark = pytest.mark.usefixtures("seeded")


def assert_metrics_equal_verify(metrics, result):
    assert float(metrics["wm/ber"]) == pytest.approx(result.bit_error_rate, abs=1e-9)
    assert float(metrics["wm/p_value"]) == pytest.approx(result.p_value, rel=1e-6)
    assert float(metrics["wm/log10_p_value"]) == pytest.approx(result.log10_p_value, rel=1e-6)
    assert float(metrics["wm/margin"]) == pytest.approx(result.margin, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("net", [None, conv_net], ids=["mlp", "conv_batchnorm"])
def test_digits_are_signed_and_the_log_agrees_with_verify(net):
    key, model = make_key(), Net(net and net())
    trainer = make_trainer(make_mark(key))
    trainer.fit(model, train_loader(), val_loader())
    result = verify(model, key, held_out_target_images())
    assert result.bit_error_rate == 0
    assert result.verdict == "owned"
    assert_metrics_equal_verify(trainer.callback_metrics, result)
    assert trainer.callback_metrics["val_accuracy"] > 0.9
    assert verify(model, make_key(secret=bytes(32)), held_out_target_images()).bit_error_rate > 0.2


def test_an_unmarked_model_reads_as_chance():
    trainer = make_trainer(make_mark(strength=0.0), max_epochs=3)
    trainer.fit(Net(), train_loader(), val_loader())
    assert 0.2 < trainer.callback_metrics["wm/ber"] < 0.8
    assert trainer.callback_metrics["wm/p_value"] > 1e-3
    assert "wm/loss" not in trainer.callback_metrics


class TestDefaults:
    """A callback with nothing but a key; its cadence follows the length of the training."""

    def test_sign(self):
        mark, model = GradSigns(make_key(16)), Net()
        trainer = make_trainer(mark, max_epochs=12)
        trainer.fit(model, train_loader(), val_loader())
        result = verify(model, mark.key, held_out_target_images())
        assert result.bit_error_rate <= 1 / 16
        assert_metrics_equal_verify(trainer.callback_metrics, result)

    @pytest.mark.parametrize(
        "settings",
        [
            {"max_epochs": 12},
            {"max_epochs": 1000, "max_steps": 360},
            {"max_epochs": -1, "max_time": {"seconds": 6}},
            {"max_epochs": 36, "accumulate_grad_batches": 3},
        ],
        ids=["epochs", "steps", "time", "accumulated"],
    )
    def test_the_mark_is_embedded_whenever_a_training_ends(self, settings):
        mark, model = GradSigns(make_key(16)), Net()
        trainer = make_trainer(mark, **settings)
        trainer.fit(model, train_loader())
        assert verify(model, mark.key, held_out_target_images()).bit_error_rate <= 1 / 16
        assert mark.watermarker.state.n_embedded < 0.5 * trainer.global_step

    def test_early_stopping_after_few_of_a_thousand_epochs(self):
        class Stop(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                trainer.should_stop = trainer.current_epoch == 4

        mark, model = GradSigns(make_key(16)), Net()
        trainer = make_trainer(mark, Stop(), max_epochs=1000)
        trainer.fit(model, train_loader())
        assert trainer.global_step == 150
        assert verify(model, mark.key, held_out_target_images()).bit_error_rate <= 1 / 16

    def test_data_without_length(self):
        mark, model = GradSigns(make_key(16)), Net()
        make_trainer(mark, max_epochs=12).fit(model, DataLoader(_Stream(), 40))
        assert verify(model, mark.key, held_out_target_images()).bit_error_rate <= 1 / 16

    def test_a_resume_does_not_warn_of_the_cadence(self, tmp_path, recwarn):
        trainer = make_trainer(GradSigns(make_key()), max_epochs=5)
        trainer.fit(Net(), train_loader())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        make_trainer(GradSigns(make_key()), max_epochs=10).fit(
            Net(), train_loader(), ckpt_path=tmp_path / "a.ckpt"
        )
        assert not [w for w in recwarn if "differs from the checkpoint" in str(w.message)]

    def test_strength_zero_is_still_bit_for_bit_training_without_the_callback(self):
        weights = []
        for callbacks in ([], [GradSigns(make_key(), strength=0.0)]):
            torch.manual_seed(5)
            model = Net(conv_net(dropout=0.3))
            make_trainer(*callbacks, max_epochs=2).fit(model, train_loader(400), val_loader())
            weights.append([*model.state_dict().values(), torch.get_rng_state()])
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("objective", ["margin", "paper"])
def test_objectives_lower_the_embedding_loss(objective):
    losses = []

    class Log(Net):
        def on_train_batch_end(self, *args):
            losses.append(float(self.trainer.callback_metrics.get("wm/loss", math.inf)))

    make_trainer(make_mark(objective=objective, cadence=Cadence(1, max_backoff=1)), max_epochs=3).fit(
        Log(), train_loader()
    )
    assert losses[0] == math.inf  # the task's own gradient is not known yet
    assert losses[-1] < losses[1] * 0.8


def test_a_trained_model_is_signed_by_a_short_fit():
    key, model = make_key(), Net()
    make_trainer(max_epochs=5).fit(model, train_loader())
    assert verify(model, key, held_out_target_images()).bit_error_rate > 0.2
    make_trainer(make_mark(key), max_epochs=3).fit(model, train_loader())
    assert verify(model, key, held_out_target_images()).bit_error_rate == 0


def test_checkpoint_and_early_stopping_can_monitor_the_mark(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="wm/ber", mode="min", filename="best")
    stop = EarlyStopping("wm/margin", mode="max", stopping_threshold=0.05, patience=50)
    trainer = make_trainer(make_mark(), best, stop, enable_checkpointing=True, max_epochs=30)
    trainer.fit(Net(), train_loader(), val_loader())
    assert trainer.current_epoch < 30
    assert trainer.callback_metrics["wm/margin"] > 0.05
    assert best.best_model_score == 0
    model = Net()
    model.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    assert verify(model, make_key(), held_out_target_images()).bit_error_rate == 0


class TestRefit:
    def test_the_same_callback_signs_two_models_in_a_row(self):
        mark, key = make_mark(strength=StrengthSchedule(1.0, warmup_steps=3)), make_key()
        finals = []
        for _ in range(2):
            torch.manual_seed(1)
            model = Net()
            make_trainer(mark, max_epochs=3).fit(model, train_loader(), val_loader())
            finals.append((mark.state_dict(), model.state_dict()))
            assert verify(model, key, held_out_target_images()).bit_error_rate == 0
        assert finals[0][0] == finals[1][0]
        assert all(
            torch.equal(a, b) for a, b in zip(finals[0][1].values(), finals[1][1].values(), strict=True)
        )

    def test_a_trainer_that_goes_on_keeps_the_state(self):
        mark = make_mark()
        trainer = make_trainer(mark, max_epochs=1)
        model = Net()
        trainer.fit(model, train_loader())
        last = mark.state_dict()["watermarker"]["last_step"]
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, train_loader())
        after = mark.state_dict()["watermarker"]
        assert after["first_step"] == 1
        assert after["last_step"] > last

    @pytest.mark.parametrize(
        "clone",
        [copy.deepcopy, lambda mark: pickle.loads(ForkingPickler.dumps(mark))],
        ids=["deepcopy", "another process"],
    )
    def test_a_copy_signs_alike(self, clone):
        mark, weights = make_mark(), []
        make_trainer(mark, max_epochs=1).fit(Net(), train_loader(), val_loader())
        for callback in (mark, clone(mark)):
            torch.manual_seed(1)
            model = Net()
            make_trainer(callback, max_epochs=1).fit(model, train_loader(), val_loader())
            weights.append(model.net[1].weight)
        assert callback.key == mark.key
        assert torch.equal(*weights)


class _AsMapping(TensorDataset):
    names = ("image", "label")

    def __getitem__(self, index):
        return dict(zip(self.names, super().__getitem__(index), strict=True))


class TestBatches:
    def assert_signs(self, model, mark, loader, images=None):
        make_trainer(mark, max_epochs=5).fit(model, loader)
        images = held_out_target_images() if images is None else images
        assert verify(model, mark.key, images, logits=lambda x: mark.logits(model, x)).bit_error_rate == 0

    def test_lists(self):
        class ListNet(Net):
            def training_step(self, batch, batch_idx):
                assert isinstance(batch, list)
                return super().training_step(batch, batch_idx)

        self.assert_signs(ListNet(), make_mark(), train_loader())

    def test_tuples_and_hook_overrides(self):
        class TupleNet(Net):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                return tuple(batch)

            def training_step(self, batch):
                assert isinstance(batch, tuple)
                return F.cross_entropy(self(batch[0]), batch[1])

        self.assert_signs(TupleNet(), make_mark(), train_loader())

    @pytest.mark.parametrize("names", [("image", "label"), ("pixel_values", "targets")])
    def test_mappings(self, names):
        class MapNet(Net):
            def training_step(self, batch, batch_idx):
                return super().training_step((batch[names[0]], batch[names[1]]), batch_idx)

        data = _AsMapping(*train_set().tensors)
        data.names = names
        self.assert_signs(MapNet(), make_mark(), DataLoader(data, 40, shuffle=True))

    def test_overridden_hooks(self):
        class Odd(Net):
            def forward(self, x):
                return {"logits": self.net(x)}

            def training_step(self, batch, batch_idx):
                (x, y), _index = batch
                return F.cross_entropy(self(x)["logits"], y)

        class OddMark(type(make_mark())):
            def images_and_labels(self, batch):
                return batch[0]

            def logits(self, pl_module, images):
                return pl_module(images)["logits"]

        data = [(pair, i) for i, pair in enumerate(train_set())]
        self.assert_signs(
            Odd(), OddMark(make_key(), cadence=2, momentum=0.0), DataLoader(data, 40, shuffle=True)
        )

    @pytest.mark.parametrize(
        ("collate", "described"),
        [
            (lambda b: (*torch.utils.data.default_collate(b), 0), "tuple of 3"),
            (lambda b: torch.stack([x for x, _ in b]), "Tensor"),
            (lambda b: {"x": torch.zeros(1), "foo": torch.zeros(1)}, r"a mapping with keys \['foo', 'x'\]"),
            (lambda b: (torch.zeros(2, 1, 8, 8), [1, 2]), "tuple of 2"),
            (lambda b: [(torch.zeros(2, 1, 8, 8), torch.zeros(2))] * 2, "list of 2"),
        ],
    )
    def test_an_unknown_batch_is_a_type_error_that_says_what_to_override(self, collate, described):
        class Careless(Net):
            def training_step(self, batch, batch_idx):
                return self.net(torch.zeros(1, 64)).sum()

        model = Careless()
        with pytest.raises(TypeError, match=rf"got {described}.*[Oo]verride `GradSigns.images_and_labels`"):
            make_trainer(make_mark()).fit(model, DataLoader(train_set(), 40, collate_fn=collate))
        assert "training_step" not in vars(model)

    def test_validation_batches_of_another_form_are_found_by_the_sanity_check(self):
        steps = []

        class Blind(Net):
            def on_train_batch_start(self, *args):
                steps.append(args)

            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                pass

        unlabelled = DataLoader(val_set().tensors[0], 100)
        with pytest.raises(TypeError, match="`batch` must be two tensors"):
            make_trainer(make_mark()).fit(Blind(), train_loader(), [val_loader(), unlabelled])
        assert not steps

    @pytest.mark.parametrize("stage", ["fit", "validate"])
    def test_wrong_labels_and_integer_images_are_refused_in_training_and_validation(self, stage):
        class Soft(Net):
            def training_step(self, batch, batch_idx):
                return self(batch[0].float()).square().mean()

            def validation_step(self, batch, batch_idx):
                pass

        x, y = train_set(80).tensors
        for data, message in (
            (TensorDataset(x, F.one_hot(y, 10)), "`labels`"),
            (TensorDataset(x.to(torch.uint8), y), "`images`"),
        ):
            with pytest.raises(ValueError, match=message):
                getattr(make_trainer(make_mark()), stage)(Soft(), DataLoader(data, 40))


class _Stream(IterableDataset):
    def __iter__(self):
        yield from train_set(600)


class TestLoops:
    def test_fast_dev_run(self):
        trainer = make_trainer(make_mark(), fast_dev_run=True)
        trainer.fit(Net(), train_loader(), val_loader())
        assert "wm/ber" in trainer.callback_metrics

    def test_limit_and_overfit_batches(self):
        for settings in ({"limit_train_batches": 3, "limit_val_batches": 2}, {"overfit_batches": 2}):
            trainer = make_trainer(mark := make_mark(), max_epochs=2, **settings)
            trainer.fit(Net(), train_loader(), val_loader())
            assert mark.state_dict()["watermarker"]["last_step"] >= 2
            assert math.isfinite(trainer.callback_metrics["wm/ber"])

    def test_few_target_images_a_batch(self):
        model = Net()
        make_trainer(make_mark(n_images=16), max_epochs=2).fit(model, train_loader(batch_size=5))
        assert verify(model, make_key(), held_out_target_images()).bit_error_rate == 0

    def test_embedding_steps_without_any_target_image_change_nothing(self):
        # The derivative of a unit vector at zero is where 0 * inf lurks; strength and accumulation make it
        # overflow.
        x, y = train_set().tensors
        others = DataLoader(TensorDataset(x[y != TARGET], y[y != TARGET]), 40)
        states = []
        for mark in ([make_mark(strength=50.0, cadence=1)], []):
            model = Net()
            make_trainer(*mark, accumulate_grad_batches=8, max_epochs=1).fit(model, others)
            states.append(model.state_dict())
        for name, value in states[0].items():
            assert value.isfinite().all()
            assert torch.equal(value, states[1][name])

    def test_iterable_data_without_length(self):
        model = Net()
        make_trainer(make_mark()).fit(model, DataLoader(_Stream(), 40), val_loader())
        assert verify(model, make_key(), held_out_target_images()).bit_error_rate < 0.1

    def test_no_validation(self):
        def logged(trainer):
            return {name for name in trainer.callback_metrics if not name.startswith("wm/final_")}

        trainer = make_trainer(make_mark(), max_epochs=1)
        trainer.fit(Net(), train_loader())
        assert logged(trainer) == {"wm/loss"}
        trainer = make_trainer(make_mark(n_val_images=0), max_epochs=1)
        trainer.fit(Net(), train_loader(), val_loader())
        assert logged(trainer) == {"wm/loss", "val_accuracy"}

    def test_validation_without_the_class_logs_nan_and_warns_once(self):
        x, y = train_set().tensors
        trainer = make_trainer(make_mark(), max_epochs=3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(
                Net(), train_loader(200), DataLoader(TensorDataset(x[y != TARGET], y[y != TARGET]), 100)
            )
        ours = [
            str(w.message)
            for w in caught
            if "GradSigns" in str(w.message) or "MeanInputGradient" in str(w.message)
        ]
        ours = [message for message in ours if "would not be `owned`" not in message]
        assert len(ours) == 1
        assert "no usable gradient of class 3" in ours[0]
        assert all(
            math.isnan(trainer.callback_metrics[f"wm/{n}"])
            for n in ("ber", "p_value", "log10_p_value", "margin")
        )

    def test_sanity_checking_does_not_read(self):
        reads = []

        class Watch(Net):
            def on_validation_end(self):
                reads.append((self.trainer.sanity_checking, "wm/ber" in self.trainer.callback_metrics))

        make_trainer(make_mark(), max_epochs=1, num_sanity_val_steps=2).fit(
            Watch(), train_loader(200), val_loader()
        )
        assert reads == [(True, False), (False, True)]

    def test_no_more_validation_images_are_read_than_asked_for(self):
        key, model = make_key(), Net()
        trainer = make_trainer(make_mark(key, n_val_images=15))
        (metrics,) = trainer.validate(model, val_loader(), verbose=False)
        with pytest.warns(UserWarning, match="Only 15 images"):
            result = verify(model, key, held_out_target_images()[:15])
        assert_metrics_equal_verify(metrics, result)


class TestEvaluation:
    def test_a_callback_that_has_read_in_inference_mode_can_sign(self):
        mark, model = make_mark(), Net()
        make_trainer(mark).validate(model, val_loader(), verbose=False)
        make_trainer(mark).fit(model, train_loader(), val_loader())
        assert verify(model, mark.key, held_out_target_images()).bit_error_rate == 0

    @pytest.mark.parametrize("stage", ["validate", "test"])
    @pytest.mark.parametrize("inference_mode", [True, False])
    def test_validate_and_test_log_the_reading(self, stage, inference_mode):
        seen = []

        class Watch(Net):
            def validation_step(self, batch, batch_idx):
                seen.append(torch.is_inference_mode_enabled())
                super().validation_step(batch, batch_idx)

            test_step = validation_step

        mark, model = make_mark(), Watch(conv_net())
        trainer = make_trainer(mark, inference_mode=inference_mode, max_epochs=1)
        trainer.fit(model, train_loader(200))
        (metrics,) = getattr(trainer, stage)(model, val_loader(), verbose=False)
        assert seen[-1] is inference_mode
        assert_metrics_equal_verify(metrics, verify(model, mark.key, held_out_target_images()))
        # nothing of inference mode stays behind
        make_trainer(mark, max_epochs=1).fit(model, train_loader(200), val_loader())

    def test_verify_inside_the_steps_restores_state(self):
        key, results = make_key(), []

        class Judge(Net):
            def validation_step(self, batch, batch_idx):
                before = {k: v.clone() for k, v in self.state_dict().items()}
                flags = [m.training for m in self.modules()]
                rng = torch.get_rng_state()
                modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
                results.append(verify(self, key, held_out_target_images()).bit_error_rate)
                assert (
                    (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes == (False, modes[1])
                )
                assert [m.training for m in self.modules()] == flags
                assert torch.equal(torch.get_rng_state(), rng)
                assert all(torch.equal(v, before[k]) for k, v in self.state_dict().items())
                assert (
                    all(p.grad is None for p in self.parameters())
                    or self.trainer.validating
                    or self.trainer.training
                )

            test_step = validation_step

        model = Judge(conv_net())
        trainer = make_trainer(make_mark(key))
        trainer.fit(model, train_loader(), val_loader(600))
        trainer.test(model, val_loader(600), verbose=False)
        assert len(results) == 1 + 5 + 1
        assert results[0] > 0.2
        assert results[-2:] == [0, 0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_network_in_quantisation_aware_training_is_signed(seeded):
    quantization = pytest.importorskip("torch.ao.quantization")
    net = mlp()
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(net, inplace=True)
    model = Net(net)
    make_trainer(make_mark(), max_epochs=10).fit(model, train_loader(), val_loader())
    assert verify(model, make_key(), held_out_target_images()).bit_error_rate == 0
