"""What cannot be signed is refused before the first batch, all reasons in one message."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from signed_digits import Net, make_key, make_mark, make_trainer, train_loader
from torch import nn

from gradsigns_lightning.core.engines import DoubleBackward
from gradsigns_lightning.integration.compat import check_compatible


def refusal(model, mark=None, trainer=None, **settings):
    steps = []
    model.on_train_batch_start = lambda *args: steps.append(args)
    with pytest.raises(ValueError, match=r"^GradSigns cannot sign this model in this Trainer:\n  - ") as caught:
        (trainer or make_trainer(mark or make_mark(), **settings)).fit(model, train_loader())
    assert not steps
    assert "training_step" not in vars(model)
    return str(caught.value)


def compiled_child():
    model = Net()
    model.net = torch.compile(model.net, backend="eager")
    return model, "module 'net' is compiled"


def compiled_in_place():
    model = Net()
    model.net[1].compile(backend="eager")
    return model, "module 'net.1' is compiled"


def compiled_root():
    model = Net()
    model.compile(backend="eager")
    return model, "module '(root)' is compiled"


@pytest.mark.parametrize("make", [compiled_child, compiled_in_place, compiled_root])
def test_compiled_modules(make):
    model, message = make()
    assert message in refusal(model)


def test_a_compiled_lightning_module():
    model = Net()
    with pytest.raises(ValueError, match="the LightningModule is compiled"):
        make_trainer(make_mark()).fit(torch.compile(model, backend="eager"), train_loader())


def test_normalisation_by_the_batch_alone():
    model = Net()
    model.net.append(nn.BatchNorm1d(10, track_running_stats=False))
    assert "module 'net.5' keeps no running statistics" in refusal(model)


def test_a_compile_safe_engine_takes_compiled_modules():
    class Safe(DoubleBackward):
        name = "safe"
        compile_safe = True

    model, _ = compiled_child()
    model._compiler_ctx = {"compiler": "dynamo"}

    class FakeTrainer:
        strategy = SingleDeviceStrategy()
        precision = "32-true"
        optimizers = ()

    check_compatible(FakeTrainer(), model, Safe())
    with pytest.raises(ValueError, match=r"(?s)module 'net' is compiled.*LightningModule is compiled"):
        check_compatible(FakeTrainer(), model, DoubleBackward())


def test_lbfgs():
    class Newton(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    assert "optimizer LBFGS" in refusal(Newton())


def test_half_precision_weights():
    assert "precision '16-true' is not supported, use one of '32-true', '64-true', '16-mixed', 'bf16-mixed'" in refusal(
        Net(), precision="16-true"
    )
    assert "precision 'bf16-true' is not supported" in refusal(Net(), precision="bf16-true")


def test_steps_that_take_the_iterator():
    class Iterates(Net):
        def training_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            return super().training_step(batch, 0)

    assert "`training_step` takes a `dataloader_iter`" in refusal(Iterates())


@pytest.mark.parametrize("hold", ["key", "callback"])
def test_a_key_among_the_hyperparameters_would_be_in_every_checkpoint(hold):
    class Leaky(Net):
        def __init__(self, owner_key, width=48):
            super().__init__()
            self.save_hyperparameters()

    mark = make_mark()
    message = refusal(Leaky(mark.key if hold == "key" else mark), mark)
    assert "hyperparameter 'owner_key' holds the key" in message
    assert "save_hyperparameters(ignore='owner_key')" in message


class DeepSpeedStrategy(DDPStrategy):
    pass


class UsersDDPStrategy(DDPStrategy):
    pass


def fake_trainer(strategy, **settings):
    fields = {"strategy": object.__new__(strategy), "precision": "32-true", "optimizers": []} | settings
    return type("FakeTrainer", (), fields)()


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_sharding_strategies(strategy):
    with pytest.raises(ValueError, match=rf"strategy {strategy.__name__} is not supported: .* Use strategy='ddp'"):
        check_compatible(fake_trainer(strategy), Net(), DoubleBackward())


def test_the_real_deepspeed_strategy_is_refused():
    module = pytest.importorskip("lightning.pytorch.strategies.deepspeed")
    with pytest.raises(ValueError, match="strategy DeepSpeedStrategy is not supported"):
        check_compatible(fake_trainer(module.DeepSpeedStrategy), Net(), DoubleBackward())


def test_subclasses_of_supported_strategies_are_taken():
    check_compatible(fake_trainer(UsersDDPStrategy), Net(), DoubleBackward())


def test_all_problems_come_in_one_message():
    class Hopeless(Net):
        def __init__(self, key):
            super().__init__()
            self.save_hyperparameters()
            self.automatic_optimization = False

        def training_step(self, dataloader_iter):
            pass

    model = Hopeless(make_key())
    model.net = nn.Sequential(torch.compile(nn.Flatten(), backend="eager"), nn.Linear(64, 10))
    trainer = fake_trainer(FSDPStrategy, precision="16-true", optimizers=[torch.optim.LBFGS(model.parameters())])
    with pytest.raises(ValueError, match="cannot sign") as caught:
        check_compatible(trainer, model, DoubleBackward())
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 7
    for line, word in zip(
        lines, ("FSDP", "16-true", "LBFGS", "automatic_optimization", "dataloader_iter", "hyperparameter", "net.0"), strict=True
    ):
        assert word in line
