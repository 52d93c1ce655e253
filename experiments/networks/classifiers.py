"""Networks that classify images."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer

from experiments.networks.layers import ActivationNorm, Wrapper, normalize_activations, unwrapped


class ConvNet(nn.Module):
    """3x3 convolutions with ReLU, the average over the image, and a dense layer.

    All convolutions but the first halve the image. What normalizes their outputs has a bias, so
    that they have none of their own then.

    Attributes:
      widths: the output channels of the convolutions.
      classes: the number of outputs.
      norm: what normalizes the outputs of the convolutions, before ReLU.
      dtype: of the computation.
    """

    widths: tuple[int, ...]
    classes: int
    norm: ActivationNorm = ActivationNorm.NONE
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, classes) of images (batch, height, width, channels)."""
        x = images
        for i, width in enumerate(self.widths):
            has_bias, strides = self.norm is ActivationNorm.NONE, 2 if i else 1
            x = nn.Conv(width, (3, 3), strides, use_bias=has_bias, dtype=self.dtype)(x)
            x = nn.relu(normalize_activations(x, self.norm, train, self.dtype))
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean(axis=(1, 2)))


class MLP(nn.Module):
    """Dense layers with ReLU.

    Attributes:
      widths: the output features of the hidden layers.
      classes: the number of outputs.
      normalize: what wraps every dense layer.
      norm: what normalizes the outputs of the hidden layers, before ReLU.
    """

    widths: tuple[int, ...] = (1024, 1024, 1024, 1024)
    classes: int = 10
    normalize: Wrapper = unwrapped
    norm: ActivationNorm = ActivationNorm.NONE

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, classes) of images (batch, ...)."""
        x = images.reshape(len(images), -1)
        for width in self.widths:
            x = self.normalize(nn.Dense(width))(x)
            x = nn.relu(normalize_activations(x, self.norm, train))
        return self.normalize(nn.Dense(self.classes))(x)


class ConvPoolCNN(nn.Module):
    """ConvPool-CNN-C: convolutions with leaky ReLU, max pooling and dropout, for 32x32 images.

    As in `ConvNet`, convolutions have no bias where something with a bias follows: its gradient
    would be rounding alone, of which Adam makes steps as large as any.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, section 5.1.

    Attributes:
      widths: the output channels of the convolutions in each of the three parts.
      classes: the number of outputs.
      dropout: the share of values dropped after each pooling, in training.
      noise: the standard deviation of the noise added to the images, in training.
      normalize: what wraps every convolution and the dense layer.
      norm: what normalizes the outputs of the convolutions, before leaky ReLU.
      kernel_init: of the convolutions and of the dense layer.
      dtype: of the computation.
    """

    widths: tuple[int, int, int] = (96, 192, 192)
    classes: int = 10
    dropout: float = 0.5
    noise: float = 0.15
    normalize: Wrapper = unwrapped
    norm: ActivationNorm = ActivationNorm.NONE
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, classes) of images (batch, height, width, channels)."""
        x = images
        if train and self.noise:
            x = x + self.noise * jax.random.normal(self.make_rng("noise"), x.shape, x.dtype)
        first, second, third = self.widths
        for width in (first, second):
            for _ in range(3):
                x = self._convolve(x, width, (3, 3), "SAME", train)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = self._convolve(x, third, (3, 3), "VALID", train)
        for _ in range(2):
            x = self._convolve(x, third, (1, 1), "SAME", train)
        dense = nn.Dense(self.classes, kernel_init=self.kernel_init, dtype=self.dtype)
        return self.normalize(dense)(x.mean(axis=(1, 2)))

    def _convolve(
        self, x: jax.Array, width: int, window: tuple[int, int], padding: str, train: bool
    ) -> jax.Array:
        conv = nn.Conv(
            *(width, window),
            padding=padding,
            use_bias=self.norm is ActivationNorm.NONE,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
        )
        x = normalize_activations(self.normalize(conv)(x), self.norm, train, self.dtype)
        return nn.leaky_relu(x, 0.1)
