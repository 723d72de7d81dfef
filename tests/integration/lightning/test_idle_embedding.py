"""A fit that left the model unsigned says so."""

import pytest
import torch
from signed_digits import TARGET, Net, make_mark, make_trainer, train_loader, train_set
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gradsigns_lightning import GradSignsMixin, StrengthSchedule


class Directions(nn.Module):
    """Divides by a norm, which is zero for a blank image."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.Linear(512, 10)

    def forward(self, x):
        return self.head(F.normalize(self.conv(x), dim=1).flatten(1))


def warning(recwarn, model, mark, loader=None):
    make_trainer(mark, max_epochs=1).fit(model, loader or train_loader(200))
    (found,) = [str(w.message) for w in recwarn if "GradSigns 'wm'" in str(w.message)]
    return found


def test_a_strength_that_never_starts(recwarn):
    mark = make_mark(strength=StrengthSchedule(0.3, start_epoch=1))
    assert "No embedding step was made: the strength was 0" in warning(recwarn, Net(), mark)


def test_a_class_that_is_never_seen(recwarn):
    x, y = train_set(200).tensors
    loader = DataLoader(TensorDataset(x[y != TARGET], y[y != TARGET]), 40)
    assert f"the training saw no image of class {TARGET}" in warning(recwarn, Net(), make_mark(), loader)


@pytest.mark.parametrize("embeds", [True, False])
def test_optimizers_that_lightning_does_not_count(recwarn, embeds):
    class Manual(GradSignsMixin, Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=not embeds)
            optimizer.zero_grad()
            loss = Net.training_step(self, batch, batch_idx)
            self.manual_backward(loss + self.watermark_loss(batch) if embeds else loss)
            optimizer.step()

    words = "Lightning counted no optimizer step" if embeds else "`watermark_loss` was not called"
    assert words in warning(recwarn, Manual(), make_mark())


def test_non_finite_gradients(recwarn):
    model, mark = Net(Directions()), make_mark()
    x, y = train_set(200).tensors
    x = x.clone()
    x[y == TARGET] *= (torch.arange(20) < 10).view(-1, 1, 1, 1)  # the first batches pass the trial
    make_trainer(mark, max_epochs=1).fit(model, DataLoader(TensorDataset(x, y), 40))
    (found,) = [str(w.message) for w in recwarn if "GradSigns 'wm'" in str(w.message)]
    assert "had non-finite gradients and were left out" in found
    assert all(p.isfinite().all() for p in model.parameters())
