"""Reading the short message that a model carries."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

import numpy as np
from torch import Tensor, nn

from gradsigns_lightning.core.key import WatermarkKey, key_of
from gradsigns_lightning.core.key.payload import blank_message_key, message_code
from gradsigns_lightning.core.result import is_recognised
from gradsigns_lightning.verification.api.queries import Oracle
from gradsigns_lightning.verification.images import warn_if_few
from gradsigns_lightning.verification.suspects import read_scores


@dataclass(frozen=True)
class Message:
    """A text that a model carries.

    Attributes:
        text: the text.
        n_corrected: wrong bits that the code corrected.
        n_correctable: wrong bits that the code can correct at most.
    """

    text: str
    n_corrected: int
    n_correctable: int


def read_message(
    suspect: nn.Module | Oracle,
    master: WatermarkKey | str | PathLike[str],
    images: Tensor,
    *,
    max_queries: int = 1000,
) -> Message:
    """Read the text that :func:`message_key` put into a model; arguments as for :func:`trace`.

    Raises:
        ValueError: more bits are wrong than the code can correct, the model does not classify the images as
            the target class, or an argument is out of range.
    """
    master = key_of(master, argument="master")
    code = message_code(master)
    scores, _, recognised, _ = read_scores(suspect, master, images, max_queries=max_queries)
    if not is_recognised(recognised):
        raise ValueError(
            "`images` must be of the target class: the model classifies most of them as something else."
        )
    try:
        data, n_corrected = code.decode(
            (scores > 0).astype(np.uint8) ^ blank_message_key(master).signature.numpy()
        )
        text = data.rstrip(b"\0").decode()
    except ValueError as error:
        warn_if_few(len(images), stacklevel=2)
        if not isinstance(error, UnicodeDecodeError):
            raise
        raise ValueError(
            "`suspect` carries no message under this key: the bits that were read are not text."
        ) from error
    return Message(text=text, n_corrected=n_corrected, n_correctable=code.n_correctable)
