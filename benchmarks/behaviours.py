"""What prediction APIs make of a model's probabilities, for benchmarks and tests.

All functions except :func:`scores_of` take ``scores``, a function from raw images ``(n, C, H, W)`` to
probabilities ``(n, n_classes)``, and return the API's function from images to answers.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsigns_lightning.core.key.signature_key import SignatureKey
from gradsigns_lightning.verification.images import normalize

Predict = Callable[[Tensor], Tensor]


def scores_of(model: nn.Module, key: SignatureKey) -> Predict:
    """Return the function from raw images to probabilities."""
    model.eval()

    @torch.inference_mode()
    def scores(images: Tensor) -> Tensor:
        return model(normalize(images, key)).double().softmax(1)

    return scores


def labels(scores: Predict) -> Predict:
    """Answer with classes only."""
    return lambda x: scores(x).argmax(1)


def one_hot(scores: Predict, low: float = 0.0, high: float = 1.0) -> Predict:
    """Answer with classes in the form of scores: ``high`` for the predicted one, ``low`` for all others."""

    def answer(x: Tensor) -> Tensor:
        probabilities = scores(x)
        return (
            low
            + (high - low) * nn.functional.one_hot(probabilities.argmax(1), probabilities.shape[1]).double()
        )

    return answer


def rounded(scores: Predict, decimals: int = 0) -> Predict:
    """Round the probabilities to ``decimals``."""
    return lambda x: scores(x).round(decimals=decimals)


def noisy(scores: Predict, deviation: float, generator: torch.Generator) -> Predict:
    """Add normal noise to each probability."""

    def answer(x: Tensor) -> Tensor:
        probabilities = scores(x)
        return probabilities + deviation * torch.randn(probabilities.shape, generator=generator)

    return answer


def best(scores: Predict, count: int) -> Predict:
    """Answer with the ``count`` likeliest classes only; NaN for all others."""

    def answer(x: Tensor) -> Tensor:
        probabilities = scores(x)
        top = probabilities.topk(count, 1)
        return torch.full_like(probabilities, torch.nan).scatter(1, top.indices, top.values)

    return answer


def tempered(scores: Predict, temperature: float) -> Predict:
    """Divide the logits by a temperature."""
    return lambda x: (scores(x).log() / temperature).softmax(1)


def logarithms(scores: Predict) -> Predict:
    """Answer with log-probabilities."""
    return lambda x: scores(x).log()


def through_files(scores: Predict, **options: Any) -> Predict:
    """Receive images as files, saved with Pillow's ``options``: ``format="JPEG", quality=95``."""
    from PIL import Image

    def received(array: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(array).save(file, **options)
        return np.array(Image.open(file))

    def answer(x: Tensor) -> Tensor:
        arrays = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).squeeze(3).numpy()
        stack = torch.from_numpy(np.stack([received(array) for array in arrays])).float() / 255
        return scores(stack.permute(0, 3, 1, 2) if stack.ndim == 4 else stack[:, None])

    return answer


def resized(scores: Predict) -> Predict:
    """Scale images up to twice their size and down again."""

    def answer(x: Tensor) -> Tensor:
        for factor in (2, 0.5):
            x = nn.functional.interpolate(x, scale_factor=factor, mode="bilinear", antialias=True)
        return scores(x)

    return answer
