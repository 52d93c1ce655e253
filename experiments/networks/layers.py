"""What the networks have in common: how layers are normalized, and residual blocks."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import wnjax

Layer = Callable[..., jax.Array]
Wrapper = Callable[[Any], Layer]  # such as nn.WeightNorm


class ActivationNorm(enum.Enum):
    """What normalizes the outputs of layers."""

    NONE = "none"
    BATCH = "batch"
    MEAN_ONLY = "mean_only"  # batch normalization of means
    LAYER = "layer"


def unwrapped(layer: Layer) -> Layer:
    """The layer itself: what wraps the layers of a plain network."""
    return layer


class BatchNorm(nn.BatchNorm):
    """Flax's batch normalization with the running variance of the authors' code.

    The running variance takes n/(n − 1) times the variance of a batch of n examples:

        running ← momentum · running + (1 − momentum) · n/(n − 1) · variance

    Source: the code of Salimans & Kingma 2016, https://github.com/TimSalimans/weight_norm.
    """

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The normalized x, of the same shape."""
        before: Any = self.get_variable("batch_stats", "var")
        y = super().__call__(x, *args, **kwargs)
        if before is not None and self.is_mutable_collection("batch_stats") and len(x) > 1:
            after: Any = self.get_variable("batch_stats", "var")
            # Flax has added (1 − momentum) · variance; the rest of n/(n − 1) is added here.
            rest = (after - self.momentum * before) / jnp.float32(len(x) - 1)
            self.put_variable("batch_stats", "var", after + rest)
        return y


def normalize_activations(
    x: jax.Array, norm: ActivationNorm, train: bool, dtype: Any = None
) -> jax.Array:
    """A layer of the network that is being built, which normalizes x."""
    match norm:
        case ActivationNorm.BATCH:
            batch = BatchNorm
            x = batch(use_running_average=not train, momentum=0.9, epsilon=1e-6, dtype=dtype)(x)
        case ActivationNorm.MEAN_ONLY:
            mean_only = wnjax.linen.MeanOnlyBatchNorm
            x = mean_only(use_running_average=not train, momentum=0.9, dtype=dtype)(x)
        case ActivationNorm.LAYER:
            x = nn.LayerNorm(dtype=dtype)(x)
        case ActivationNorm.NONE:
            pass
    return x


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after ELU, beside the identity.

    Attributes:
      maps: the channels, of inputs and outputs alike.
      dtype: of the computation.
    """

    maps: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images (batch, height, width, maps) of the same."""
        h = nn.Conv(self.maps, (3, 3), dtype=self.dtype)(nn.elu(x))
        return x + nn.Conv(self.maps, (3, 3), dtype=self.dtype)(nn.elu(h))
