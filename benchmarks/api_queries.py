"""Queries until a signature is proven at p <= 1e-9, for each behaviour of a prediction API and each estimator.

    python benchmarks/api_queries.py --released FOLDER --images FOLDER          # the authors' release, images of class 0
    python benchmarks/api_queries.py --checkpoint model.ckpt --key key.gskey    # of gradsigns train, its data set's test images

Every run takes 100 images of the target class at random. Prints a Markdown table: median and deciles of the queries over the runs
that end with "owned", and how many do.
"""

from __future__ import annotations

import argparse
import io
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from gradsigns_lightning import WatermarkKey, verify_api
from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.data.decoding import read_folder
from gradsigns_lightning.models.release_2021 import load_2021
from gradsigns_lightning.runs.build import build
from gradsigns_lightning.runs.checkpoint import description_of, load_classifier, read_checkpoint
from gradsigns_lightning.verification.images import normalise

Predict = Callable[[Tensor], Tensor]
N_IMAGES = 100


def behaviours(scores: Predict) -> dict[str, Predict]:
    """Return what APIs make of a model's probabilities."""
    generator = torch.Generator().manual_seed(0)

    def noisy(deviation: float) -> Predict:
        return lambda x: scores(x) + deviation * torch.randn(len(x), 10, generator=generator)

    def best(count: int) -> Predict:
        def answer(x: Tensor) -> Tensor:
            top = scores(x).topk(count, 1)
            return torch.full((len(x), 10), torch.nan, dtype=top.values.dtype).scatter(1, top.indices, top.values)

        return answer

    def tempered(temperature: float) -> Predict:
        return lambda x: (scores(x).log() / temperature).softmax(1)

    return {
        "exact probabilities": scores,
        **{f"rounded to {n} decimals": (lambda x, n=n: scores(x).round(decimals=n)) for n in (4, 3, 2, 1)},
        "noise of 0.01 on probabilities": noisy(0.01),
        "noise of 0.1 on probabilities": noisy(0.1),
        "top 3 only": best(3),
        "top 1 only": best(1),
        "temperature 5": tempered(5),
        "temperature 0.2": tempered(0.2),
        "log-probabilities": lambda x: scores(x).log(),
        "JPEG upload (quality 100)": lambda x: scores(as_jpeg(x, 100, subsampling=0)),
        "recompressed as JPEG, quality 95, all colours": lambda x: scores(as_jpeg(x, 95, subsampling=0)),
        "recompressed as JPEG, quality 95": lambda x: scores(as_jpeg(x, 95)),
        "resized to twice the size and back": lambda x: scores(resized(x)),
        "labels only": lambda x: scores(x).argmax(1),
    }


def as_jpeg(images: Tensor, quality: int, subsampling: int = 2) -> Tensor:
    """Return images as JPEG keeps them; a subsampling of 2 keeps a quarter of the colours, 0 all."""
    from PIL import Image

    arrays = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).squeeze(3).numpy()
    received = []
    for array in arrays:
        file = io.BytesIO()
        Image.fromarray(array).save(file, format="JPEG", quality=quality, subsampling=subsampling)
        received.append(np.array(Image.open(file)))
    stack = torch.from_numpy(np.stack(received)).float() / 255
    return stack.permute(0, 3, 1, 2) if stack.ndim == 4 else stack[:, None]


def resized(images: Tensor) -> Tensor:
    """Return images that a server has scaled up and down again."""
    large = nn.functional.interpolate(images, scale_factor=2, mode="bilinear", antialias=True)
    return nn.functional.interpolate(large, scale_factor=0.5, mode="bilinear", antialias=True)


def load(arguments: argparse.Namespace) -> tuple[Predict, SignatureKey, Tensor]:
    """Return the scores' function, the key and images of its target class."""
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


def scores_of(model: nn.Module, key: SignatureKey) -> Predict:
    """Return the function from raw images to probabilities."""
    model.eval()

    @torch.inference_mode()
    def scores(images: Tensor) -> Tensor:
        return model(normalise(images, key)).double().softmax(1)

    return scores


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("released", "images", "checkpoint", "key", "only"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--estimator", default="blocks")
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
                predict, key, images[chosen], max_queries=arguments.max_queries, estimator=arguments.estimator, batch_size=64
            )
            proven += [result.n_queries] if result.verdict == "owned" else [np.inf]
        low, median, high = np.quantile(proven, [0.1, 0.5, 0.9], method="inverted_cdf")
        cells = " | ".join("not" if np.isinf(value) else f"{value:.0f}" for value in (median, low, high))
        print(f"| {name} | {cells} | {np.isfinite(proven).sum()} of {arguments.runs} |", flush=True)


if __name__ == "__main__":
    main()
