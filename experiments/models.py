"""The networks."""

import flax.linen as nn
import jax


class ConvNet(nn.Module):
    """3x3 convolutions with ReLU, the average over the image, and a dense layer.

    All convolutions but the first halve the image. With `batch_norm`, every convolution is
    followed by batch normalization, and has no bias of its own.

    Attributes:
      widths: the output channels of the convolutions.
      classes: the number of outputs.
      batch_norm: whether to normalize batches.
    """

    widths: tuple[int, ...]
    classes: int
    batch_norm: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, classes) of images (batch, height, width, channels)."""
        x = images
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=2 if i else 1, use_bias=not self.batch_norm)(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))
