"""The task of these tests: sklearn's 8x8 digits and small networks.

Spawned processes can import it, see conftest.py.
"""

from __future__ import annotations

import functools

import lightning.pytorch as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from gradsigns_lightning import GradSigns, MarginObjective, WatermarkKey

SECRET = bytes(range(100, 132))
TARGET = 3
MEAN, STD = 0.3, 0.4


def make_key(n_bits=32, *, secret=None, **settings):
    settings = {"input_mean": MEAN, "input_std": STD, "target_class": TARGET} | settings
    key = WatermarkKey.generate(
        "Acme Vision", n_bits, input_shape=(1, 8, 8), secret=secret or SECRET, **settings
    )
    # A key of version 1, which these short fits hold; with some keys they leave a wrong bit or more.
    parts = key.reveal()
    public = {name: value for name, value in parts["public"].items() if name not in ("version", "purpose")}
    return WatermarkKey.from_parts(public, payload=bytes.fromhex(parts["payload"]), secret=secret or SECRET)


@functools.cache
def raw_digits():
    """Raw images and labels with the classes in rotation.

    Every batch of 10 k holds about k images of each class.
    """
    from sklearn.datasets import load_digits  # here, because spawned processes get their data by pickle

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    turns = torch.stack([(y == c).nonzero().flatten()[:170] for c in range(10)], 1).flatten()
    return x[turns], y[turns]


def train_set(n=1200):
    x, y = raw_digits()
    return TensorDataset((x[:n] - MEAN) / STD, y[:n])


def val_set():
    x, y = raw_digits()
    return TensorDataset((x[1200:] - MEAN) / STD, y[1200:])


def held_out_target_images():
    x, y = raw_digits()
    return x[1200:][y[1200:] == TARGET]


def train_loader(n=1200, batch_size=40, *, shuffle=True):
    return DataLoader(train_set(n), batch_size, shuffle=shuffle)


def val_loader(batch_size=100):
    return DataLoader(val_set(), batch_size)


def mlp(dropout=0.0):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Dropout(dropout), nn.Linear(48, 10))


def conv_net(dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(1024, 10),
    )


class Net(L.LightningModule):
    def __init__(self, net=None, *, seed=0, optimizer="adam"):
        super().__init__()
        if net is None:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                net = mlp()
        self.net = net
        self.optimizer = optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_accuracy", (self(x).argmax(1) == y).float().mean(), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class DealtNet(Net):
    """Brings its own data, dealt to the ranks in turn and in order.

    Lightning's own sampler always shuffles training data.
    """

    def __init__(self, train, val, batch_size):
        super().__init__(optimizer="sgd")
        self.data = {"train": train, "val": val}
        self.batch_size = batch_size

    def _loader(self, name):
        world = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        sampler = DistributedSampler(self.data[name], **world, shuffle=False)
        return DataLoader(self.data[name], self.batch_size // self.trainer.world_size, sampler=sampler)

    def train_dataloader(self):
        return self._loader("train")

    def val_dataloader(self):
        return self._loader("val")


def make_trainer(*callbacks, **settings):
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 5,
    }
    return L.Trainer(callbacks=list(callbacks), **(quiet | settings))


def make_mark(key=None, **settings):
    # A small margin is reached soon, so that the cadence backs off within a test.
    usual = {"cadence": 2, "momentum": 0.0, "strength": 0.5, "objective": MarginObjective(0.5)}
    return GradSigns(make_key() if key is None else key, **(usual | settings))


class Recorder(L.Callback):
    """Writes the state of each rank at the end of training."""

    def __init__(self, folder, mark=None):
        self.folder = folder
        self.mark = mark
        self.restored = None

    def on_train_start(self, trainer, pl_module):
        self.restored = self.mark.state_dict() if self.mark else None

    def on_train_end(self, trainer, pl_module):
        record = {
            "metrics": {k: v.clone() for k, v in trainer.callback_metrics.items()},
            "model": pl_module.state_dict(),
            "state": self.mark.state_dict() if self.mark else None,
            "restored": self.restored,
            "sampler": type(trainer.train_dataloader.sampler).__name__,
        }
        torch.save(record, f"{self.folder}/rank{trainer.global_rank}.pt")


class Trained(Net):
    """A network that has learnt its task and continues with Adam at a given rate."""

    def __init__(self, rate):
        net = Net()
        make_trainer(max_epochs=5).fit(net, train_loader())
        super().__init__(net.net)
        self.rate = rate

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.rate)


def warned(recwarn):
    return [str(w.message) for w in recwarn if "GradSigns 'wm'" in str(w.message)]
