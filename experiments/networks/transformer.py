"""A language model."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from experiments.networks.layers import ActivationNorm, Wrapper, normalize_activations, unwrapped


class Transformer(nn.Module):
    """A decoder-only transformer with learned positions and a head of its own.

    Attributes:
      layers: the number of blocks.
      width: the features of the residual stream.
      heads: the attention heads of a block.
      hidden: the features between the two dense layers of a block.
      vocabulary: the number of tokens.
      length: the largest number of tokens in a sequence.
      normalize: what wraps every dense layer, and the four projections of attention at once.
      layer_norm: normalizes the inputs of attention, of the two dense layers, and of the head.
      norm: what normalizes the outputs of attention and of the dense layers but the head, in
        addition.
      dropout: the share of the outputs of attention and of the dense layers that are dropped,
        in training.
      dtype: of the computation.
    """

    layers: int = 4
    width: int = 512
    heads: int = 8
    hidden: int = 2048
    vocabulary: int = 256
    length: int = 64
    normalize: Wrapper = unwrapped
    layer_norm: bool = True
    norm: ActivationNorm = ActivationNorm.NONE
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        """Logits (batch, length, vocabulary) for the token after each of (batch, length)."""

        def layer(module: nn.Module, x: jax.Array, **masks: jax.Array) -> jax.Array:
            x = self.normalize(module)(x, **masks)
            return normalize_activations(x, self.norm, train, self.dtype)

        def inputs(x: jax.Array) -> jax.Array:
            norm = ActivationNorm.LAYER if self.layer_norm else ActivationNorm.NONE
            return normalize_activations(x, norm, train, self.dtype)

        def dense(features: int) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype)

        def branch(x: jax.Array) -> jax.Array:
            if not self.dropout:
                return x
            dropped: jax.Array = nn.Dropout(self.dropout)(x, deterministic=not train)
            return dropped

        table = self.param("positions", nn.initializers.normal(0.02), (self.length, self.width))
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
        x = embed(tokens) + table[None, : tokens.shape[1]].astype(self.dtype or table.dtype)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)
            x = x + branch(layer(attention, inputs(x), mask=mask))
            hidden = nn.gelu(layer(dense(self.hidden), inputs(x)))
            x = x + branch(layer(dense(self.width), hidden))
        return self.normalize(dense(self.vocabulary))(inputs(x))
