"""Fresh keys read from unmarked models after every attack: p-values are uniform, whatever a thief does.

    python benchmarks/attacked_false_alarms.py                 # every attack; minutes
    python benchmarks/attacked_false_alarms.py --only ftal prune_90 --keys 10000

For each attack an unmarked network on digits is attacked as ``gradsigns attack`` does at its defaults, and
read with keys that nobody embedded. Prints a Markdown table: the mean of the matches (half of the bits would
be right), and the p-value of the chi-square test that they are Binomial(bits, 1/2). Attacks on responses
change no weights, and are left out.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Trainer, seed_everything
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from gradsigns_lightning import WatermarkKey, verify_many
from gradsigns_lightning.attacks import AttackData, Recipe
from gradsigns_lightning.attacks.base import Attack
from gradsigns_lightning.data import Digits
from gradsigns_lightning.models import Classifier, SmallResNet
from gradsigns_lightning.runs.build import build
from gradsigns_lightning.runs.config import config_folder

N_BITS, TARGET_CLASS = 32, 3
RECIPE = Recipe(rate=3e-3, epochs=16, batch_size=32)
LEAST_EXPECTED = 5  # matches in a bin of the chi-square test


def names() -> list[str]:
    """Return the names of all attacks."""
    return sorted(path.stem for path in Path(config_folder(), "attack").glob("*.yaml"))


def attack_of(name: str) -> Attack:
    """Return an attack at its defaults."""
    with initialize_config_dir(config_folder(), version_base="1.3"):
        config = compose(overrides=[f"+attack={name}"])
    attack: Attack = build(config.attack, option="attack")
    return attack


def unmarked(data: Digits, seed: int) -> nn.Module:
    """Return a network that was trained without a mark."""
    seed_everything(seed, verbose=False)
    classifier = Classifier(SmallResNet(1, 10, width=16), 10, label_smoothing=RECIPE.label_smoothing)
    Trainer(
        max_epochs=RECIPE.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(classifier, datamodule=data)
    return classifier.net.eval()


def matches(model: nn.Module, images: Tensor, n_keys: int) -> NDArray[np.int64]:
    """Return how many bits of fresh keys a model matches, shape ``(n_keys,)``."""
    keys = [
        WatermarkKey.generate(
            "nobody", N_BITS, input_shape=(1, 8, 8), target_class=TARGET_CLASS, n_carriers=64
        )
        for _ in range(n_keys)
    ]
    return np.array([result.n_matches for result in verify_many(model, keys, images)])


def goodness_of_fit(found: NDArray[np.int64]) -> float:
    """Return the p-value of the chi-square test that matches are Binomial(N_BITS, 1/2)."""
    expected = len(found) * stats.binom.pmf(np.arange(N_BITS + 1), N_BITS, 0.5)
    low = int(np.argmax(np.cumsum(expected) >= LEAST_EXPECTED))
    clipped = np.bincount(np.clip(found, low, N_BITS - low), minlength=N_BITS + 1)[low : N_BITS - low + 1]
    bins = expected[low : N_BITS - low + 1].copy()
    bins[0], bins[-1] = expected[: low + 1].sum(), expected[N_BITS - low :].sum()
    return float(stats.chisquare(clipped, bins).pvalue)


def row(name: str, model: nn.Module, data: Digits, n_keys: int) -> dict[str, Any] | None:
    """Return what is read after an attack; None if it leaves the weights as they are."""
    attack = attack_of(name)
    if attack.kind != "model":
        return None
    attacked = attack(model, AttackData.of(data, RECIPE))
    found = matches(attacked, data.raw_images("test", TARGET_CLASS), n_keys)
    return {"attack": name, "mean": found.mean(), "most": found.max(), "p": goodness_of_fit(found)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=names())
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = Digits(batch_size=RECIPE.batch_size)
    data.setup()
    model = unmarked(data, arguments.seed)
    print(f"| attack | matches of {N_BITS}, mean | most | goodness of fit, p |\n|---|---|---|---|")
    for name in arguments.only:
        try:
            found = row(name, model, data, arguments.keys)
        except ValueError as error:
            print(f"| {name} | refused: {error} | | |", flush=True)
            continue
        if found:
            values = f"{found['mean']:.2f} | {found['most']} | {found['p']:.3f}"
            print(f"| {name} | {values} |", flush=True)


if __name__ == "__main__":
    main()
