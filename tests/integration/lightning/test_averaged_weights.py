"""Weight averaging: the mark is read on the weights that will be saved."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from signed_digits import Net, conv_net, held_out_target_images, make_key, make_mark, make_trainer, train_loader, val_loader

from gradsigns_lightning import verify

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
    trainer = make_trainer(*(pair if mark_first else pair[::-1]), keep, enable_checkpointing=True, max_epochs=6)
    trainer.fit(model, train_loader(), val_loader())
    result = verify(model, key, held_out_target_images())  # at the end of training the averages move into the module
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
        make_mark(key), StochasticWeightAveraging(swa_lrs=2e-3, swa_epoch_start=4, annealing_epochs=1), max_epochs=8
    )
    trainer.fit(model, train_loader(), val_loader())
    result = verify(model, key, held_out_target_images())
    assert result.bit_error_rate == 0
    if net:  # an extra epoch without backward renews the statistics, and its validation reads the averages
        assert float(trainer.callback_metrics["wm/margin"]) == pytest.approx(result.margin, rel=1e-3)
