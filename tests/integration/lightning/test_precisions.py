"""Mixed and double precision sign too; the embedding pass runs in the parameters' own dtype."""

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
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
)
from torch.utils.data import DataLoader, TensorDataset

from gradsigns_lightning import verify

pytestmark = pytest.mark.usefixtures("seeded")


class Watch(Net):
    def training_step(self, batch, batch_idx):
        self.seen = self(batch[0]).dtype
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:You passed.*precision='16-mixed'")
@pytest.mark.parametrize(
    ("precision", "logits", "weights", "net"),
    [
        ("bf16-mixed", torch.bfloat16, torch.float32, mlp),
        ("bf16-mixed", torch.bfloat16, torch.float32, conv_net),
        ("16-mixed", torch.bfloat16, torch.float32, mlp),  # Lightning itself changes it to bf16 on a CPU
        ("64-true", torch.float64, torch.float64, mlp),
        ("64-true", torch.float64, torch.float64, conv_net),
    ],
)
def test_each_precision_signs(precision, logits, weights, net):
    key, model, dtypes = make_key(8), Watch(net()), []

    class Mark(type(make_mark())):
        def logits(self, pl_module, images):
            output = super().logits(pl_module, images)
            dtypes.append((images.dtype, output.dtype))
            return output

    trainer = make_trainer(Mark(key, cadence=2, momentum=0.0), precision=precision, max_epochs=5)
    trainer.fit(model, train_loader(600), val_loader())
    assert model.seen is logits
    assert set(dtypes) == {(weights, weights)}  # autocast is off in the embedding and in the reading pass
    assert all(p.isfinite().all() and p.dtype is weights for p in model.parameters())
    result = verify(model, key, held_out_target_images())
    assert result.bit_error_rate == float(trainer.callback_metrics["wm/ber"]) == 0
    assert float(trainer.callback_metrics["wm/margin"]) == pytest.approx(result.margin, rel=1e-3)


class ScaledBfloat(MixedPrecision):
    """float16's loss scaling on a CPU.

    Autocast is to bfloat16, but the loss goes through a GradScaler, as with '16-mixed' on CUDA.
    """

    def __init__(self):
        super().__init__("bf16-mixed", "cpu")
        self.precision = "16-mixed"
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)

    def autocast_context_manager(self):
        return torch.autocast("cpu", dtype=torch.bfloat16)


def test_a_scaled_loss_signs_also_when_the_first_embedding_steps_see_no_image():
    x, y = train_set().tensors
    order = torch.cat([(y != TARGET).nonzero()[:60, 0], torch.arange(1200)])
    key, model = make_key(16), Watch()
    plugin = ScaledBfloat()
    trainer = make_trainer(make_mark(key, strength=3.0), plugins=[plugin], max_epochs=6)
    trainer.fit(model, DataLoader(TensorDataset(x[order], y[order]), 20))
    assert trainer.precision == "16-mixed"
    assert plugin.scaler.get_scale() >= 2.0**14  # no step overflowed and was skipped
    assert all(p.isfinite().all() for p in model.parameters())
    assert verify(model, key, held_out_target_images()).bit_error_rate == 0
