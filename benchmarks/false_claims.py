"""Share of random keys that are found "owned" in models that were not signed with them.

    python benchmarks/false_claims.py --models a.ckpt b.ckpt --out claims.json --keys 10000 --readers weights

The models are checkpoints of gradsigns train, unmarked or signed with other keys; images are their data set's
test images. Every model is read with every key, from the weights and through its probabilities, at
alpha = 1e-2 and 1e-3; a key is derived from its number, 0 to ``--keys`` - 1. Finished cells are kept in the
file and not run again. Prints a Markdown table; the last column is the probability of so many owned keys or
more if the share were alpha.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from behaviours import scores_of
from scipy.stats import binom
from torch import Tensor, nn

from gradsigns_lightning import WatermarkKey, verify_api, verify_many
from gradsigns_lightning.runs.build import build
from gradsigns_lightning.runs.checkpoint import description_of, load_classifier, read_checkpoint

ALPHAS = (1e-2, 1e-3)
N_IMAGES, MAX_QUERIES, CHUNK = 100, 100, 500
DATA = {"fashion_mnist": "gradsigns_lightning.data.FashionMNIST", "digits": "gradsigns_lightning.data.Digits"}


def key_number(number: int, data: dict) -> WatermarkKey:
    """Return the key that is derived from a number."""
    return WatermarkKey.generate(
        "false claim",
        min(128, int(torch.tensor(data["input_shape"]).prod())),
        input_shape=data["input_shape"],
        target_class=0,
        input_mean=data["mean"],
        input_std=data["std"],
        secret=number.to_bytes(32, "big"),
    )


def from_weights(model: nn.Module, images: Tensor, keys: list[WatermarkKey], alpha: float) -> int:
    """Count owned keys, read from the weights."""
    return sum(result.verdict == "owned" for result in verify_many(model, keys, images, alpha=alpha))


def from_probabilities(model: nn.Module, images: Tensor, keys: list[WatermarkKey], alpha: float) -> int:
    """Count owned keys, read through probabilities."""
    predict = scores_of(model, keys[0])
    results = (
        verify_api(predict, key, images, alpha=alpha, max_queries=MAX_QUERIES, batch_size=64) for key in keys
    )
    return sum(result.verdict == "owned" for result in results)


READERS: dict[str, Callable[[nn.Module, Tensor, list[WatermarkKey], float], int]] = {
    "weights": from_weights,
    "probabilities": from_probabilities,
}


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    cells = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for path in arguments.models:
        checkpoint = read_checkpoint(path)
        description = description_of(checkpoint, path)
        data = description["data"]
        model = load_classifier(checkpoint, description)
        images = build({"_target_": DATA[data["name"]]}).raw_images("test", 0)[:N_IMAGES]
        for reader in arguments.readers:
            for alpha in ALPHAS:
                for start in range(0, arguments.keys, CHUNK):
                    cell = f"{path} {reader} {alpha:g} {start}"
                    if cell in cells:
                        continue
                    begun = time.time()
                    numbers = range(start, min(start + CHUNK, arguments.keys))
                    cells[cell] = (
                        READERS[reader](
                            model, images, [key_number(number, data) for number in numbers], alpha
                        ),
                        len(numbers),
                    )
                    arguments.out.write_text(json.dumps(cells))
                    print(f"# {cell}: {cells[cell]}, {time.time() - begun:.0f} s", flush=True)
    print("| model | read from | alpha | owned | keys | share | p |\n|---|---|---|---|---|---|---|")
    for path in arguments.models:
        for reader in arguments.readers:
            for alpha in ALPHAS:
                found = [
                    value for cell, value in cells.items() if cell.startswith(f"{path} {reader} {alpha:g} ")
                ]
                owned, total = (sum(column) for column in zip(*found, strict=True))
                share, p = owned / total, binom.sf(owned - 1, total, alpha)
                print(f"| {path} | {reader} | {alpha:g} | {owned} | {total} | {share:.4f} | {p:.2f} |")


if __name__ == "__main__":
    main()
