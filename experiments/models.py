"""The networks."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax

import wnjax

Layer = Callable[..., jax.Array]
Wrapper = Callable[[Any], Layer]  # such as nn.WeightNorm
ActivationNorm = Literal["batch", "layer", "mean_only"] | None


def unwrapped(layer: Layer) -> Layer:
    """The layer itself: what wraps the layers of a plain network."""
    return layer


class ConvNet(nn.Module):
    """3x3 convolutions with ReLU, the average over the image, and a dense layer.

    All convolutions but the first halve the image. What normalizes their outputs has a bias, so
    that they have none of their own then.

    Attributes:
      widths: the output channels of the convolutions.
      classes: the number of outputs.
      norm: what normalizes the outputs of the convolutions, before ReLU.
    """

    widths: tuple[int, ...]
    classes: int
    norm: ActivationNorm = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, classes) of images (batch, height, width, channels)."""
        x = images
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=2 if i else 1, use_bias=self.norm is None)(x)
            x = nn.relu(normalize_activations(x, self.norm, train))
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


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
    norm: ActivationNorm = None

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

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, section 5.1.

    Attributes:
      widths: the output channels of the convolutions in each of the three parts.
      classes: the number of outputs.
      dropout: the share of values dropped after each pooling, in training.
      noise: the standard deviation of the noise added to the images, in training.
      normalize: what wraps every convolution and the dense layer.
      norm: what normalizes the outputs of the convolutions, before leaky ReLU.
    """

    widths: tuple[int, int, int] = (96, 192, 192)
    classes: int = 10
    dropout: float = 0.5
    noise: float = 0.15
    normalize: Wrapper = unwrapped
    norm: ActivationNorm = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, classes) of images (batch, height, width, channels)."""
        x = images
        if train and self.noise:
            x = x + self.noise * jax.random.normal(self.make_rng("noise"), x.shape, x.dtype)
        first, second, third = self.widths
        for width in (first, second):
            for _ in range(3):
                x = self._convolve(x, nn.Conv(width, (3, 3)), train)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = self._convolve(x, nn.Conv(third, (3, 3), padding="VALID"), train)
        for _ in range(2):
            x = self._convolve(x, nn.Conv(third, (1, 1)), train)
        return self.normalize(nn.Dense(self.classes))(x.mean(axis=(1, 2)))

    def _convolve(self, x: jax.Array, conv: nn.Conv, train: bool) -> jax.Array:
        x = normalize_activations(self.normalize(conv)(x), self.norm, train)
        return nn.leaky_relu(x, 0.1)


class Transformer(nn.Module):
    """A decoder-only transformer with pre-LayerNorm, learned positions and a head of its own.

    Attributes:
      layers: the number of blocks.
      width: the features of the residual stream.
      heads: the attention heads of a block.
      hidden: the features between the two dense layers of a block.
      vocabulary: the number of tokens.
      length: the largest number of tokens in a sequence.
      normalize: what wraps every dense layer, and the four projections of attention at once.
      norm: what normalizes the outputs of attention and of the dense layers but the head, in
        addition to pre-LayerNorm.
    """

    layers: int = 4
    width: int = 512
    heads: int = 8
    hidden: int = 2048
    vocabulary: int = 256
    length: int = 64
    normalize: Wrapper = unwrapped
    norm: ActivationNorm = None

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, length, vocabulary) for the token after each of (batch, length)."""

        def layer(module: nn.Module, x: jax.Array, **masks: jax.Array) -> jax.Array:
            return normalize_activations(self.normalize(module)(x, **masks), self.norm, train)

        table = self.param("positions", nn.initializers.normal(0.02), (self.length, self.width))
        x = nn.Embed(self.vocabulary, self.width)(tokens) + table[None, : tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(self.heads)
            x = x + layer(attention, nn.LayerNorm()(x), mask=mask)
            hidden = nn.gelu(layer(nn.Dense(self.hidden), nn.LayerNorm()(x)))
            x = x + layer(nn.Dense(self.width), hidden)
        return self.normalize(nn.Dense(self.vocabulary))(nn.LayerNorm()(x))


def normalize_activations(x: jax.Array, norm: ActivationNorm, train: bool) -> jax.Array:
    """A layer of the network that is being built, which normalizes x; none for None."""
    if norm == "batch":
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    elif norm == "mean_only":
        x = wnjax.linen.MeanOnlyBatchNorm(use_running_average=not train, momentum=0.9)(x)
    elif norm == "layer":
        x = nn.LayerNorm()(x)
    return x
