"""A small device-side buffer of the target class's most recent training images."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsigns_lightning.core.key.signature_key import check_images


class TargetBuffer:
    """Keeps the last ``capacity`` images of the target class, as the batches stream by.

    All shapes are static and nothing is read back to the host, so filling the buffer costs no synchronisation
    on an accelerator. The images are those that the network was trained on, with the user's augmentations. No
    random numbers are used.

    Args:
        capacity: images kept, at least 1.
        target_class: class T.
        input_shape: shape of one image, ``(C, H, W)``; None for inputs of any kind, such as token ids.
    """

    def __init__(self, capacity: int, target_class: int, input_shape: tuple[int, ...] | None = None) -> None:
        self.capacity = capacity
        self.target_class = target_class
        self.input_shape = input_shape
        self.images: Tensor | None = None  # (capacity, C, H, W), newest first
        self.valid: Tensor | None = None  # (capacity,) bool; valid slots come first

    def clear(self) -> None:
        """Forget all images."""
        self.images = self.valid = None

    def check(self, images: Tensor, labels: Tensor) -> None:
        """Refuse a batch that is not floating-point images ``(n, C, H, W)`` and classes ``(n,)``.

        Raises:
            ValueError: the images do not have the input shape, or not that of earlier batches, or the labels
                are not one class index per image.
        """
        if self.input_shape is not None:
            check_images(images, self.input_shape)
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"`labels` must have shape ({images.shape[0]},), one class index per image, got "
                f"{tuple(labels.shape)}."
            )
        if self.images is not None and images.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"`images` must have one shape in all batches, because the carriers are fixed places in it, "
                f"got {tuple(images.shape[1:])} after {tuple(self.images.shape[1:])}. Pad text to a fixed "
                "length."
            )

    def push(self, images: Tensor, labels: Tensor) -> None:
        """Take the images of the target class from one batch.

        Args:
            images: floating point, shape ``(n, C, H, W)``.
            labels: class indices, shape ``(n,)``.
        """
        images = images.detach()
        if self.images is None or self.valid is None or self.images.device != images.device:
            self.images = images.new_zeros((self.capacity, *images.shape[1:]))
            self.valid = torch.zeros(self.capacity, dtype=torch.bool, device=images.device)
        is_target = labels == self.target_class
        newest_last = is_target * torch.arange(1, labels.shape[0] + 1, device=images.device)
        chosen = newest_last.topk(min(self.capacity, labels.shape[0])).indices
        valid = torch.cat([is_target[chosen], self.valid])
        keep = valid.to(torch.int8).argsort(descending=True, stable=True)[: self.capacity]
        self.valid = valid[keep]
        # Slots without an image repeat the others in turn. They have no weight in the objective, but blank
        # ones could make the mean NaN (0 * NaN), and batch normalization averages over all slots.
        keep = keep[torch.arange(self.capacity, device=images.device) % self.valid.sum().clamp_min(1)]
        self.images = torch.cat([images[chosen].to(self.images.dtype), self.images])[keep]
