"""The residual network of ImageNet."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from experiments.networks.layers import ActivationNorm, Wrapper, normalize_activations, unwrapped


class ResNet(nn.Module):
    """ResNet-50 of version 1.5: the 3x3 convolution of a block halves the image, not the first 1x1.

    As in `ConvNet`, convolutions have no bias where what normalizes their outputs has one.

    Source: He et al. 2015, https://arxiv.org/abs/1512.03385, table 1 and figure 5.

    Attributes:
      stages: the number of blocks at each size of the image.
      width: the channels of the first convolution; the blocks of each stage have twice as many as
        those of the one before, and four times as many as that at their outputs.
      classes: the number of outputs.
      normalize: what wraps every convolution and the dense layer.
      norm: what normalizes the outputs of the convolutions, before ReLU and before the sum.
      dtype: of the computation.
    """

    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000
    normalize: Wrapper = unwrapped
    norm: ActivationNorm = ActivationNorm.NONE
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, classes) of images (batch, height, width, channels)."""
        x = nn.relu(self._convolve(images, self.width, 7, 2, train))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                strides = 2 if stage and not block else 1
                x = self._bottleneck(x, self.width * 2**stage, strides, train)
        dense = nn.Dense(self.classes, dtype=self.dtype)
        return self.normalize(dense)(x.mean(axis=(1, 2)))

    def _bottleneck(self, x: jax.Array, width: int, strides: int, train: bool) -> jax.Array:
        """Three convolutions beside the identity, or beside one where shapes differ."""
        y = nn.relu(self._convolve(x, width, 1, 1, train))
        y = nn.relu(self._convolve(y, width, 3, strides, train))
        y = self._convolve(y, 4 * width, 1, 1, train)
        if x.shape != y.shape:
            x = self._convolve(x, 4 * width, 1, strides, train)
        return nn.relu(x + y)

    def _convolve(
        self, x: jax.Array, width: int, window: int, strides: int, train: bool
    ) -> jax.Array:
        has_bias = self.norm is ActivationNorm.NONE
        size = (window, window)
        conv = nn.Conv(width, size, strides, use_bias=has_bias, dtype=self.dtype)
        return normalize_activations(self.normalize(conv)(x), self.norm, train, self.dtype)
