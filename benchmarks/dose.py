"""Whether the defaults sign what people train, on scikit-learn's digits.

All settings of the mark have their defaults. ``fits`` counts how many of 20 fits of an MLP and a CNN with a
32-bit key end `owned` (2 minutes; with ``--first-seed 100``, other keys and seeds); ``kinds`` compares 13
kinds of module and step with their unmarked twins (3 seeds each, 6 minutes); ``slow`` trains a vision
transformer that has hardly learned when its fit ends (6 seeds, 3 minutes); ``scales`` multiplies the loss by
.01 to 128, with Adam and SGD (3 seeds each, 4 minutes):

    python benchmarks/dose.py fits
    python benchmarks/dose.py kinds
    python benchmarks/dose.py slow
    python benchmarks/dose.py scales

Held-out images are digits that no fit has seen. Every line reports what was read from them and the accuracy
on them.
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from gradsigns_lightning import GradSigns, GradSignsMixin, WatermarkKey, verify
from gradsigns_lightning.models import ViT

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return all 1,797 raw images and their labels in one fixed random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)[order], torch.tensor(data.target)[
        order
    ]


class Rows(nn.Module):
    """A GRU over the image's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(8, 64, batch_first=True), nn.Linear(64, 10)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x[:, 0])[0][:, -1])  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Two transformer layers over the image's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Linear(8, 32), nn.Parameter(0.02 * torch.randn(1, 8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1)
        self.encoder, self.head = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(32, 10),
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x[:, 0]) + self.position).mean(1))  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    """Return a network with one hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def small_cnn() -> nn.Module:
    """Return a network with one convolution."""
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 10))


def cnn(norm: Callable[[int], nn.Module], *, pooled: bool = False) -> nn.Module:
    """Return a network with two convolutions, each with a normalization layer."""
    pool = [nn.MaxPool2d(2)] if norm is nn.BatchNorm2d and not pooled else []
    head = [nn.AdaptiveAvgPool2d(1)] if pooled else []
    layers = [nn.Conv2d(1, 16, 3, padding=1), norm(16), nn.ReLU(), *pool]
    layers += [nn.Conv2d(16, 32, 3, padding=1), norm(32), nn.ReLU(), *pool, *head]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))


class Model(LightningModule):
    """A classifier whose loss is multiplied by ``scale``, and whose rate for SGD is divided by it."""

    def __init__(
        self, make: Callable[[], nn.Module], *, lr: float, optimizer: str = "adamw", scale: float = 1.0
    ) -> None:
        super().__init__()
        self.network, self.lr, self.optimizer, self.scale = make(), lr, optimizer, scale
        self.network(digits()[0][:2])  # lazy layers

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]

    def task(self, batch: Any) -> Tensor:
        """Return the task's loss of a batch."""
        return self.scale * F.cross_entropy(self(batch[0]), batch[1])

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.task(batch)

    @override
    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), self.lr / self.scale, momentum=0.9)
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer](
            self.parameters(), self.lr
        )


class OneArgument(Model):
    """A model whose step takes only the batch."""

    @override
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return self.task(batch)


def logged(step: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a step as users do."""

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return {"loss": step(*args, **kwargs), "seen": 1}

    return wrapper


class Decorated(Model):
    """A model whose step is wrapped and returns a mapping."""

    @override
    @logged
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.task(batch)


class Skipping(Model):
    """A model whose step returns None for every fifth batch."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 5 == 4 else self.task(batch)


class Manual(GradSignsMixin, Model):
    """A model with manual optimization."""

    automatic_optimization = False

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.task(batch) + self.watermark_loss(batch))
        optimizer.step()


@dataclass(frozen=True)
class Kind:
    """One kind of training."""

    network: Callable[[], nn.Module] = mlp
    module: type[Model] = Model
    batch_size: int = 32
    trainer: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "CNN, batch normalization": Kind(functools.partial(cnn, nn.BatchNorm2d)),
    "one-argument step": Kind(module=OneArgument),
    "decorated step": Kind(module=Decorated),
    "step that returns None": Kind(module=Skipping),
    "CNN, group normalization": Kind(functools.partial(cnn, functools.partial(nn.GroupNorm, 4))),
    "two-layer transformer": Kind(Transformer),
    "GRU": Kind(Rows),
    "accumulation of 4 batches of 16": Kind(batch_size=16, trainer={"accumulate_grad_batches": 4}),
    "CNN, batches of 8": Kind(small_cnn, batch_size=8),
    "clipping, bf16-mixed": Kind(trainer={"gradient_clip_val": 0.5, "precision": "bf16-mixed"}),
    "float64": Kind(trainer={"precision": "64-true"}),
    "manual optimization": Kind(module=Manual),
    "CNN, batch norm., global average pooling": Kind(functools.partial(cnn, nn.BatchNorm2d, pooled=True)),
}


@dataclass(frozen=True)
class Fit:
    """The result of one fit, on held-out images."""

    accuracy: float
    n_wrong: int
    margin: float
    verdict: str


def fit(
    kind: Kind, seed: int, *, n_bits: int, n_train: int, epochs: int, signed: bool = True, **model: Any
) -> Fit:
    """Train one network and read it."""
    images, labels = digits()
    seed_everything(seed, verbose=False)
    module = kind.module(kind.network, **model)
    key = WatermarkKey.generate(
        "benchmark", n_bits, input_shape=(1, 8, 8), target_class=0, secret=bytes([seed + 1]) * 32
    )
    loader = DataLoader(TensorDataset(images[:n_train], labels[:n_train]), kind.batch_size, shuffle=True)
    # A module with the mixin is never trained unsigned in silence; strength 0 changes nothing.
    callbacks = (
        [GradSigns(key)]
        if signed
        else [GradSigns(key, strength=0)]
        if isinstance(module, GradSignsMixin)
        else []
    )
    Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET, **kind.trainer).fit(module, loader)  # type: ignore[arg-type]
    images, labels = images[n_train:], labels[n_train:]
    module = module.float().eval()
    with torch.no_grad():
        accuracy = float((module(images).argmax(1) == labels).float().mean())
    result = verify(module, key, images[labels == 0])
    return Fit(accuracy, n_bits - result.n_matches, result.margin, result.verdict)


def fits(first_seed: int = 0) -> None:
    """Print how many of 20 fits end ``owned``."""
    grid = [(lr, *b) for lr in (1e-3, 2e-3) for b in ((8, 10), (16, 15), (32, 20), (64, 30), (128, 30))]
    done = []
    for name, network in (("MLP", mlp), ("CNN", small_cnn)):
        for i, (lr, batch_size, epochs) in enumerate(grid):
            kind = Kind(network, batch_size=batch_size)
            marked, twin = (
                fit(
                    kind,
                    first_seed + i,
                    n_bits=32,
                    n_train=1200,
                    epochs=epochs,
                    signed=signed,
                    lr=lr,
                    optimizer="adam",
                )
                for signed in (True, False)
            )
            difference = 100 * (marked.accuracy - twin.accuracy)
            print(
                f"{name}, Adam {lr:g}, batches of {batch_size}, {epochs} epochs: {marked.verdict}, "
                f"{marked.n_wrong} wrong, margin {marked.margin:.2f}, accuracy {marked.accuracy:.3f} "
                f"({difference:+.1f} points)",
                flush=True,
            )
            done.append((marked.verdict == "owned", difference))
    differences = [difference for _, difference in done]
    print(
        f"{sum(owned for owned, _ in done)} of {len(done)} owned; accuracy against the twin "
        f"{statistics.mean(differences):+.2f} ± {statistics.stdev(differences):.2f} points"
    )


def kinds() -> None:
    """Print wrong bits and accuracy of every kind and of its twin."""
    _head("kind", 24)
    for name, kind in KINDS.items():
        marked, twin = (
            [fit(kind, seed, n_bits=24, n_train=1400, epochs=15, signed=signed, lr=3e-3) for seed in range(3)]
            for signed in (True, False)
        )
        _row(name, marked, twin)


def slow() -> None:
    """Print wrong bits and accuracy of a slow learner and of its twin."""
    kind = Kind(functools.partial(ViT, (1, 8, 8), 10, patch_size=2, dim=32, depth=1, heads=2), batch_size=40)
    _head("AdamW's rate", 16)
    for lr in (3e-4, 1e-3):
        options = {"n_bits": 16, "n_train": 1200, "epochs": 10, "lr": lr}
        marked, twin = (
            [fit(kind, seed, signed=signed, **options) for seed in range(6)] for signed in (True, False)
        )
        _row(f"{lr:g}", marked, twin)


def scales() -> None:
    """Print wrong bits and accuracy at every scale of the loss."""
    _head("optimizer, loss times", 32)
    for optimizer, lr in (("adam", 3e-3), ("sgd", 0.05)):
        for scale in (0.01, 0.1, 1.0, 32.0, 128.0):
            options = {
                "n_bits": 32,
                "n_train": 1200,
                "epochs": 10,
                "lr": lr,
                "optimizer": optimizer,
                "scale": scale,
            }
            marked, twin = (
                [fit(Kind(), seed, signed=signed, **options) for seed in range(3)] for signed in (True, False)
            )
            _row(f"{optimizer}, {scale:g}", marked, twin)


def _head(name: str, n_bits: int) -> None:
    print(
        f"| {name} | wrong bits of {n_bits} | smallest margin | accuracy | twin | difference, points "
        f"|\n|---|---|---|---|---|---|"
    )


def _row(name: str, marked: list[Fit], twin: list[Fit]) -> None:
    differences = [100 * (m.accuracy - t.accuracy) for m, t in zip(marked, twin, strict=True)]
    columns = [
        ", ".join(str(m.n_wrong) for m in marked),
        ", ".join(f"{m.margin:.2f}" for m in marked),
        *(", ".join(f"{f.accuracy:.3f}" for f in arm) for arm in (marked, twin)),
        ", ".join(f"{d:+.1f}" for d in differences),
    ]
    print(f"| {name} | {' | '.join(columns)} |", flush=True)


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = {"fits": fits, "kinds": kinds, "slow": slow, "scales": scales}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--first-seed", type=int, default=0, help="of `fits`")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    commands[arguments.command](
        **({"first_seed": arguments.first_seed} if arguments.command == "fits" else {})
    )


if __name__ == "__main__":
    main()
