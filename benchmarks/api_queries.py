"""Queries until a signature is proven at p <= 1e-9, by behaviour of a prediction API.

Of the authors' release with images of class 0, or of a checkpoint of gradsigns train with its test images:

    python benchmarks/api_queries.py --released FOLDER --images FOLDER
    python benchmarks/api_queries.py --checkpoint model.ckpt --key key.gskey

Every run takes 100 images of the target class at random. Prints a Markdown table: median and deciles of the
queries, where a run that does not end with "owned" counts as infinitely many, and how many runs do.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial

import numpy as np
import torch
from behaviours import (
    Predict,
    best,
    labels,
    logarithms,
    noisy,
    resized,
    rounded,
    scores_of,
    tempered,
    through_files,
)
from torch import Tensor

from gradsigns_lightning import WatermarkKey, verify_api
from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.data.decoding import read_folder
from gradsigns_lightning.models.release_2021 import load_2021
from gradsigns_lightning.runs.build import build
from gradsigns_lightning.runs.checkpoint import description_of, load_classifier, read_checkpoint

N_IMAGES = 100


def behaviours(scores: Predict) -> dict[str, Predict]:
    """Return the APIs that are measured, by their names in the table."""
    generator = torch.Generator().manual_seed(0)
    jpeg = partial(through_files, scores, format="JPEG")
    return {
        "exact probabilities": scores,
        **{f"rounded to {n} decimals": rounded(scores, n) for n in (4, 3, 2, 1)},
        "noise of 0.01 on probabilities": noisy(scores, 0.01, generator),
        "noise of 0.1 on probabilities": noisy(scores, 0.1, generator),
        "top 3 only": best(scores, 3),
        "top 1 only": best(scores, 1),
        "temperature 5": tempered(scores, 5),
        "temperature 0.2": tempered(scores, 0.2),
        "log-probabilities": logarithms(scores),
        "JPEG upload (quality 100)": jpeg(quality=100, subsampling=0),
        "recompressed as JPEG, quality 95, all colours": jpeg(quality=95, subsampling=0),
        "recompressed as JPEG, quality 95": jpeg(quality=95, subsampling=2),  # keeps a quarter of the colours
        "resized to twice the size and back": resized(scores),
        "labels only": labels(scores),
    }


def load(arguments: argparse.Namespace) -> tuple[Predict, SignatureKey, Tensor]:
    """Return the model's prediction function, the key and images of its target class."""
    if arguments.released:
        key, model = load_2021(arguments.released)
        return scores_of(model, key), key, read_folder(arguments.images, key.input_shape)
    checkpoint = read_checkpoint(arguments.checkpoint)
    description = description_of(checkpoint, arguments.checkpoint)
    own = WatermarkKey.load(arguments.key)
    data = description["data"]["name"]
    images = build({"_target_": DATA[data]}).raw_images("test", own.target_class)
    return scores_of(load_classifier(checkpoint, description), own), own, images


DATA = {"fashion_mnist": "gradsigns_lightning.data.FashionMNIST", "digits": "gradsigns_lightning.data.Digits"}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("released", "images", "checkpoint", "key", "only"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--estimator", default="groups")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--max-queries", type=int, default=2000)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    scores, key, images = load(arguments)
    print("| answers | queries (median) | 10 % | 90 % | proven |\n|---|---|---|---|---|")
    for name, predict in behaviours(scores).items():
        if arguments.only and arguments.only not in name:
            continue
        proven = []
        for run in range(arguments.runs):
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(run))[:N_IMAGES]
            result = verify_api(
                predict,
                key,
                images[chosen],
                max_queries=arguments.max_queries,
                estimator=arguments.estimator,
                batch_size=64,
            )
            proven += [result.n_queries] if result.verdict == "owned" else [np.inf]
        low, median, high = np.quantile(proven, [0.1, 0.5, 0.9], method="inverted_cdf")
        cells = " | ".join("not" if np.isinf(value) else f"{value:.0f}" for value in (median, low, high))
        print(f"| {name} | {cells} | {np.isfinite(proven).sum()} of {arguments.runs} |", flush=True)


if __name__ == "__main__":
    main()
