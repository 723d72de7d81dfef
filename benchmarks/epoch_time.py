"""Time of a signed training beside its unmarked twin's: interleaved pairs of equal work in one process.

python benchmarks/epoch_time.py [pairs] [batches]

Fashion-MNIST, small residual network, 128 bits, default settings. Prints the ratio of every pair, the median and the quartiles.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings
from typing import Any

import lightning as L

from gradsigns_lightning import Cadence, GradSigns, WatermarkKey
from gradsigns_lightning.data import FashionMNIST
from gradsigns_lightning.models import Classifier, SmallResNet

WARM_UP_BATCHES = 5


class StepTimer(L.Callback):
    """Times the batches after the warm-up."""

    start = end = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        if batch_idx == WARM_UP_BATCHES:
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the clock."""
        self.end = time.perf_counter()


def seconds(data: FashionMNIST, key: WatermarkKey | None, n_batches: int) -> float:
    """Return the time of ``n_batches`` training steps, signed if there is a key."""
    L.seed_everything(0, verbose=False)
    timer = StepTimer()
    # The cadence of a training of 2,500 steps or more: a short one would embed more often.
    marks = [GradSigns(key, cadence=Cadence())] if key else []
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=n_batches + WARM_UP_BATCHES,
        limit_val_batches=0,
        callbacks=[*marks, timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(SmallResNet(1, 10), 10, label_smoothing=0.1), data.train_dataloader())
    return timer.end - timer.start


def main(n_pairs: int = 12, n_batches: int = 150) -> None:
    """Run the pairs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    data = FashionMNIST()
    data.setup("fit")
    key = WatermarkKey.generate(
        "benchmark", 128, input_shape=data.input_shape, target_class=0, input_mean=data.mean, input_std=data.std
    )
    seconds(data, key, 20)
    ratios = []
    for pair in range(n_pairs):
        if pair % 2:
            twin, signed = seconds(data, None, n_batches), seconds(data, key, n_batches)
        else:
            signed, twin = seconds(data, key, n_batches), seconds(data, None, n_batches)
        ratios.append(signed / twin)
        print(f"pair {pair}: twin {twin:.2f} s, signed {signed:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    low, median, high = statistics.quantiles(ratios, n=4)
    print(f"median ratio {median:.3f}, quartiles {low:.3f} and {high:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
