"""A small vision transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsigns_lightning.core.utils.checks import check_int, check_shape


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2021) with a learned position embedding and mean pooling.

    The attention is ``torch.nn.functional.scaled_dot_product_attention``; only its math backend can be
    differentiated twice.

    Args:
        input_shape: ``(C, H, W)`` of one image.
        n_classes: number of classes, >= 2.
        patch_size: height and width of a patch; it must divide ``H`` and ``W``.
        dim: width of a token; ``heads`` must divide it.
        depth: number of transformer blocks, >= 1.
        heads: attention heads of every block, >= 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range, or the sizes do not divide.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        n_classes: int,
        patch_size: int = 4,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        channels, height, width = check_shape(input_shape)
        for name, value in {"patch_size": patch_size, "dim": dim, "depth": depth, "heads": heads}.items():
            check_int(name, value, minimum=1)
        check_int("n_classes", n_classes, minimum=2)
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"`patch_size` must divide the height {height} and the width {width}, got {patch_size}."
            )
        if dim % heads:
            raise ValueError(f"`dim` must be a multiple of `heads`, {heads}, got {dim}.")
        self.embed = nn.Conv2d(channels, dim, patch_size, patch_size)
        tokens = (height // patch_size) * (width // patch_size)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, dim), std=0.02))
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(n, n_classes)`` of float images ``(n, C, H, W)``."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


class _Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer normalization and around a shortcut."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed

    def _attend(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        query, key, value = (
            self.qkv(x).view(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind()
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        merged: Tensor = self.out(mixed.transpose(1, 2).reshape(n, tokens, dim))
        return merged
