"""What cannot be signed is refused before the first batch, all reasons in one message."""

import functools

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from signed_digits import SECRET, Net, make_mark, make_trainer, mlp, train_loader, val_loader
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradsigns_lightning.integration.compat import check_compatible


def refusal(model, mark=None, trainer=None, **settings):
    steps = []
    model.on_train_batch_start = lambda *args: steps.append(args)
    with pytest.raises(
        ValueError, match=r"^GradSigns cannot sign this model in this Trainer:\n  - "
    ) as caught:
        (trainer or make_trainer(mark or make_mark(), **settings)).fit(model, train_loader())
    assert not steps
    assert "training_step" not in vars(model)
    return str(caught.value)


def test_normalization_by_the_batch_alone():
    model = Net()
    model.net.append(nn.BatchNorm1d(10, track_running_stats=False))
    assert "module 'net.5' keeps no running statistics" in refusal(model)


def test_lbfgs():
    class Newton(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    assert "optimizer LBFGS" in refusal(Newton())


def test_half_precision_weights_without_an_exponent_for_gradients():
    assert (
        "precision '16-true' is not supported, use one of '32-true', '64-true', '16-mixed', 'bf16-mixed', "
        "'bf16-true'" in refusal(Net(), precision="16-true")
    )


class GradSampleModule(nn.Module):
    """Looks like Opacus' wrapper, which expects one backward pass for each forward pass."""

    def __init__(self, module):
        super().__init__()
        self.wrapped, self.n_open = module, 0
        self.wrapped.register_full_backward_hook(self.close)

    def close(self, *_args):
        self.n_open -= 1
        assert self.n_open == 0

    def forward(self, x):
        self.n_open += self.training
        return self.wrapped(x)


def test_per_sample_gradients():
    words = (
        r"module 'net' (GradSampleModule) collects per-sample gradients, as Opacus does for private training"
    )
    assert words in refusal(Net(GradSampleModule(mlp())))


def test_per_sample_optimizers():
    class DPOptimizer(torch.optim.SGD):
        pass

    class Private(Net):
        def configure_optimizers(self):
            return DPOptimizer(self.parameters(), lr=0.1)

    assert "optimizer DPOptimizer steps with per-sample gradients" in refusal(Private())


def test_per_sample_gradients_at_strength_zero_are_no_concern():
    mark = make_mark(strength=0.0)
    trainer = make_trainer(mark, max_epochs=1)
    trainer.fit(Net(GradSampleModule(mlp())), train_loader(400), val_loader())
    assert trainer.callback_metrics["wm/ber"] >= 0


def test_opacus_itself(seeded):
    opacus = pytest.importorskip("opacus")

    class Private(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return opacus.optimizers.DPOptimizer(
                optimizer, noise_multiplier=0.0, max_grad_norm=10.0, expected_batch_size=40
            )

    problems = refusal(Private(opacus.GradSampleModule(mlp())))
    assert "module 'net' (GradSampleModule)" in problems
    assert "optimizer DPOptimizer" in problems
    trainer = make_trainer(make_mark(strength=0.0), max_epochs=1)
    trainer.fit(Private(opacus.GradSampleModule(mlp())), train_loader(400), val_loader())
    assert trainer.callback_metrics["wm/ber"] >= 0


def test_steps_that_take_the_iterator():
    class Iterates(Net):
        def training_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            return super().training_step(batch, 0)

    assert "`training_step` takes a `dataloader_iter`" in refusal(Iterates())


@pytest.mark.parametrize("hold", ["key", "callback"])
def test_a_key_among_the_hyperparameters_reaches_no_checkpoint(hold, tmp_path):
    """Lightning leaves out what cannot be pickled, and a key cannot."""

    class Leaky(Net):
        def __init__(self, owner_key, width=48):
            super().__init__()
            self.save_hyperparameters()

    mark = make_mark()
    trainer = make_trainer(mark, max_steps=2)
    trainer.fit(Leaky(mark.key if hold == "key" else mark), train_loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"] == {"width": 48}
    assert not any(SECRET in file.read_bytes() for file in tmp_path.iterdir())


class DeepSpeedStrategy(DDPStrategy):
    pass


class UsersDDPStrategy(DDPStrategy):
    pass


def fake_trainer(strategy, **settings):
    fields = {
        "strategy": object.__new__(strategy),
        "precision": "32-true",
        "optimizers": [],
        "world_size": 2,
    } | settings
    return type("FakeTrainer", (), fields)()


def check(trainer, model=None, **settings):
    check_compatible(trainer, Net() if model is None else model, make_mark(**settings).watermarker)


def test_deepspeed():
    with pytest.raises(
        ValueError, match=r"strategy DeepSpeedStrategy is not supported .*: use strategy='ddp'"
    ):
        check(fake_trainer(DeepSpeedStrategy))


def test_the_real_deepspeed_strategy_is_refused():
    module = pytest.importorskip("lightning.pytorch.strategies.deepspeed")
    with pytest.raises(ValueError, match="strategy DeepSpeedStrategy is not supported"):
        check(fake_trainer(module.DeepSpeedStrategy))


def test_subclasses_of_supported_strategies_are_accepted():
    check(fake_trainer(UsersDDPStrategy))


def fsdp(**settings):
    trainer = fake_trainer(FSDPStrategy, **settings)
    trainer.strategy.model = None
    trainer.strategy._lightning_module = None
    return trainer


def test_sharded_parameters():
    check(fsdp())
    check(fsdp(), engine="forward_over_reverse")
    with pytest.raises(
        ValueError, match="engine 'double_backward' is not safe for sharded parameters: use 'auto'"
    ):
        check(fsdp(), engine="double_backward")
    with pytest.raises(
        ValueError, match="precision 'bf16-mixed' is not supported with FSDPStrategy, use '32-true'"
    ):
        check(fsdp(precision="bf16-mixed"))


def test_finite_differences_of_kinked_modules():
    model = Net(nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)))
    message = refusal(model, make_mark(engine="finite_difference"))
    assert "module 'net.2' (ReLU) is not smooth, and engine 'finite_difference' is wrong there" in message


def test_a_carrier_layer_that_does_not_exist():
    assert "`carrier_layer` 'net.l' is not a submodule; similar names: net" in refusal(
        Net(), make_mark(carrier_layer="net.l")
    )


def test_reentrant_checkpoints_that_can_be_seen():
    model = Net()
    model.net[1].gradient_checkpointing = True
    model.net[1]._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=True)
    model.net[4] = checkpoint_wrapper(model.net[4], checkpoint_impl=CheckpointImpl.REENTRANT)
    message = refusal(model)
    assert "module 'net.1' checkpoints activations with use_reentrant=True" in message
    assert "module 'net.4' checkpoints activations with use_reentrant=True" in message
    model.net[1]._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    model.net[4] = nn.Linear(48, 10)
    make_trainer(make_mark(), max_epochs=1, limit_train_batches=1).fit(model, train_loader())


def test_all_problems_come_in_one_message():
    class Hopeless(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, dataloader_iter):
            pass

    model = Hopeless()
    model.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10, track_running_stats=False))
    trainer = fsdp(precision="16-true", optimizers=[torch.optim.LBFGS(model.parameters())])
    with pytest.raises(ValueError, match="cannot sign") as caught:
        check(trainer, model, engine="double_backward")
    lines = str(caught.value).splitlines()[1:]
    words = (
        *("with FSDPStrategy", "use one of", "LBFGS", "automatic_optimization", "dataloader_iter", "net.2"),
        "sharded",
    )
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert word in line


class BadOperation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


class Twice(torch.optim.SGD):
    """Evaluates the loss twice, as sharpness-aware minimisation does."""

    def step(self, closure):
        closure()
        self.zero_grad()
        return super().step(closure)


def test_an_optimizer_that_evaluates_the_loss_twice():
    class Sharp(Net):
        def configure_optimizers(self):
            return Twice(self.parameters(), lr=0.1)

    model = Sharp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="evaluates the loss more than once a step"):
        make_trainer(make_mark()).fit(model, train_loader())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "training_step" not in vars(model)


def test_checkpointed_activations_of_sharded_parameters():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = (
                nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout()),
                nn.Linear(16, 10),
            )

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    model, marker = Checkpointed(), make_mark(engine="auto").watermarker
    images = torch.randn(8, 1, 8, 8)
    marker.prepare(model, model, images)
    with pytest.raises(ValueError, match="checkpointing is not supported with sharded parameters"):
        marker.prepare(model, model, images, sharded=True)


def test_what_only_a_batch_can_show_is_refused_before_anything_is_trained():
    class Net2(Net):
        def forward(self, x):
            return F.relu(BadOperation.apply(super().forward(x)))

    model, mark = Net2(), make_mark()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"cannot embed in this model") as caught:
        make_trainer(mark).fit(model, train_loader())
    message = str(caught.value)
    assert "engine 'double_backward': a custom autograd function is marked once_differentiable" in message
    assert (
        "engine 'forward_over_reverse': a custom autograd function has no forward-mode derivative" in message
    )
    assert (
        "engine 'finite_difference': the network has kinks (Relu) and finite differences would be wrong"
        in message
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "training_step" not in vars(model)
