"""Networks that classify images."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from experiments.networks.layers import ActivationNorm, Wrapper, normalize_activations, unwrapped

PAPER_WIDTHS = 96, 192, 192  # of ConvPool-CNN-C


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

    Every layer is normalized alike, the dense one that gives the logits too. As in `ConvNet`,
    layers have no bias where something with a bias follows: its gradient would be rounding alone,
    of which Adam makes steps as large as any.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, section 5.1, and their code,
    https://github.com/TimSalimans/weight_norm.

    Attributes:
      widths: the output channels of the convolutions in each of the three parts.
      classes: the number of outputs.
      dropout: the share of values dropped after each pooling, in training.
      noise: the standard deviation of the noise added to the images, in training.
      weight_std: the standard deviation of the weights at the start, at the widths of the paper.
        Layers of fewer inputs start with larger weights, in inverse proportion to the square root
        of the fan-in, so that narrow networks compute with numbers of the same size. 0 for the
        uniform distribution of Glorot & Bengio 2010.
      normalize: what wraps every convolution and the dense layer.
      norm: what normalizes the outputs of all layers, before leaky ReLU.
      dtype: of the computation.
    """

    widths: tuple[int, int, int] = PAPER_WIDTHS
    classes: int = 10
    dropout: float = 0.5
    noise: float = 0.15
    weight_std: float = 0.05
    normalize: Wrapper = unwrapped
    norm: ActivationNorm = ActivationNorm.NONE
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, classes) of images (batch, height, width, channels)."""
        x = images
        if train and self.noise:
            x = x + self.noise * jax.random.normal(self.make_rng("noise"), x.shape, x.dtype)
        for part, width in enumerate(self.widths):
            is_last = part == len(self.widths) - 1
            for layer in range(3):
                window = (1, 1) if is_last and layer else (3, 3)
                padding = "VALID" if is_last and not layer else "SAME"
                options = {"padding": padding, **self._options(x, part, layer)}
                conv = self.normalize(nn.Conv(width, window, **options))
                x = nn.leaky_relu(normalize_activations(conv(x), self.norm, train, self.dtype), 0.1)
            if not is_last:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
                x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = x.mean(axis=(1, 2))
        dense = self.normalize(nn.Dense(self.classes, **self._options(x, len(self.widths), 0)))
        return normalize_activations(dense(x), self.norm, train, self.dtype)

    def _options(self, x: jax.Array, part: int, layer: int) -> dict[str, Any]:
        """What the convolutions and the dense layer have in common, for the input x of a layer."""
        kernel_init = nn.initializers.glorot_uniform()
        if self.weight_std:
            papers = (x.shape[-1], *PAPER_WIDTHS)[part] if not layer else PAPER_WIDTHS[part]
            kernel_init = nn.initializers.normal(self.weight_std * (papers / x.shape[-1]) ** 0.5)
        has_bias = self.norm is ActivationNorm.NONE
        return {"use_bias": has_bias, "kernel_init": kernel_init, "dtype": self.dtype}
