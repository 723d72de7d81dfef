"""A stolen model behind the thief's own API, which changes what goes in or what comes out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gradsigns_lightning.attacks.base import AttackData, Observe, copied, observed
from gradsigns_lightning.core.utils.checks import check_number

Filter = Callable[[Tensor], Tensor]  # from raw pixels (n, C, H, W) in [0, 1] to such
Answer = Callable[[Tensor, Tensor], Tensor]  # from probabilities (n, n_classes) and raw pixels to scores


class Served(nn.Module):
    """A model with what an API does to images before it, and to its probabilities behind it.

    Args:
        model: maps normalized inputs to logits, or is such an API itself; a submodule.
        data: knows the normalization.
        image_filter: is given raw pixels; a submodule if it is a module. By default they stay.
        answer: is given the model's probabilities and the raw pixels as they came; by default the model's own
            answers come out.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self,
        model: nn.Module,
        data: AttackData,
        *,
        image_filter: Filter | None = None,
        answer: Answer | None = None,
    ) -> None:
        super().__init__()
        self.model, self.image_filter, self.answer = model, image_filter, answer
        for name, value in (("input_mean", data.input_mean), ("input_std", data.input_std)):
            self.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1), persistent=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, or scores as the API tells them, of normalized inputs ``(n, C, H, W)``."""
        pixels = self.raw(x)
        if self.image_filter is not None:
            x = (self.image_filter(pixels).to(x) - self.input_mean.to(x)) / self.input_std.to(x)
        scores: Tensor = self.model(x)
        if self.answer is None:
            return scores
        return self.answer(scores if _tells_probabilities(self.model) else scores.softmax(1), pixels)

    @property
    def tells_probabilities(self) -> bool:
        """Whether the answers are probabilities already, not logits."""
        return self.answer is not None or _tells_probabilities(self.model)

    def raw(self, x: Tensor) -> Tensor:
        """Return normalized inputs as raw pixels."""
        return x * self.input_std.to(x) + self.input_mean.to(x)


def served(
    model: nn.Module,
    data: AttackData,
    *,
    observe: Observe | None,
    filters: Mapping[float, Filter] | None = None,
    answers: Mapping[float, Answer] | None = None,
) -> Served:
    """Return a copy of a model behind the last filter or answer, after all of them were shown.

    Args:
        model: the stolen model.
        data: what the thief has.
        observe: is shown the served model at each dose.
        filters: filters of images by their dose, ascending.
        answers: the same of answers.
    """
    copy = copied(model)
    doses = dict.fromkeys((*(filters or {}), *(answers or {})))
    apis = {
        dose: Served(copy, data, image_filter=(filters or {}).get(dose), answer=(answers or {}).get(dose))
        for dose in doses
    }
    for dose, api in apis.items():
        observed(observe, dose, api)
    return list(apis.values())[-1]


def _tells_probabilities(model: nn.Module) -> bool:
    return isinstance(model, Served) and model.tells_probabilities


def drawn(pixels: Tensor, seed: int, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
    """Return random numbers for each image, which are always the same for the same image and seed.

    So that whoever asks about an image again learns nothing new, and does not average the numbers out; and
    readers that put random generators back where they were do not meet the same numbers at every image.

    Args:
        pixels: the images, shape ``(n, C, H, W)``.
        seed: of the thief.
        draw: draws for one image, on the CPU.
    """
    rows = []
    for image in pixels.detach().to("cpu", torch.float32):
        digest = hashlib.blake2b(image.contiguous().numpy().tobytes() + str(seed).encode(), digest_size=7)
        rows.append(draw(torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big"))))
    return torch.stack(rows).to(pixels.device)


def check_positive(name: str, value: float, *, maximum: float = math.inf) -> None:
    """Raise a ``ValueError`` unless a setting is a number above 0, and at most ``maximum``."""
    if not check_number(name, value, minimum=0, maximum=maximum):
        raise ValueError(f"`{name}` must be > 0, got 0.")
