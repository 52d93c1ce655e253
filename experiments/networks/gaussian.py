"""Gaussian latent variables with diagonal covariance, and the likelihood of pixels."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LIMIT = 8.0  # of logarithms of standard deviations: beyond, exponentials of early nets overflow


class Gaussian(NamedTuple):
    """Independent normal distributions: means and logarithms of standard deviations."""

    mean: jax.Array
    log_std: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """One draw, as a function of the parameters that has a derivative."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self.log_std) * noise


def gaussian(parameters: jax.Array) -> Gaussian:
    """The distribution whose means and log standard deviations the last axis holds, one half each.

    Log standard deviations are kept between -8 and 8, smoothly.
    """
    mean, log_std = jnp.split(parameters.astype(jnp.float32), 2, axis=-1)
    return Gaussian(mean, LIMIT * jnp.tanh(log_std / LIMIT))


def divergence(q: Gaussian, p: Gaussian) -> jax.Array:
    """KL[q || p] in nats, of every variable by itself."""
    ratio = jnp.exp(2 * (q.log_std - p.log_std))
    distance = jnp.square((q.mean - p.mean) * jnp.exp(-p.log_std))
    return p.log_std - q.log_std + (ratio + distance - 1) / 2


def standard(like: Gaussian) -> Gaussian:
    """The standard normal distribution, of as many variables."""
    return Gaussian(jnp.zeros_like(like.mean), jnp.zeros_like(like.log_std))


def per_example(x: jax.Array) -> jax.Array:
    """Sums over all axes but the first, in float32."""
    return jnp.sum(x.astype(jnp.float32), axis=tuple(range(1, x.ndim)))


def bernoulli_nats(logits: jax.Array, pixels: jax.Array) -> jax.Array:
    """-log p(pixels) for pixels in {0, 1}, per example: softplus(l) - l·x, summed."""
    logits = logits.astype(jnp.float32)
    return per_example(jax.nn.softplus(logits) - logits * pixels)


def logistic_nats(mean: jax.Array, log_scale: jax.Array, pixels: jax.Array) -> jax.Array:
    """-log p(pixels) for a logistic distribution rounded to the 256 grey levels, per example.

    The outer levels have the tails.

    Source: Kingma et al. 2016, https://arxiv.org/abs/1606.04934, equation 15.

    Args:
      mean: (batch, ...), in units of pixels.
      log_scale: of the distribution; broadcasts against the mean.
      pixels: multiples of 1/255 in [0, 1].
    """
    mean, inverse = mean.astype(jnp.float32), jnp.exp(-log_scale.astype(jnp.float32))
    half = 0.5 / 255
    above, below = (pixels + half - mean) * inverse, (pixels - half - mean) * inverse
    inside = jax.nn.sigmoid(above) - jax.nn.sigmoid(below)
    # Where both are 0 or 1 to rounding: the density in the middle, times the width.
    middle = (pixels - mean) * inverse
    width = jnp.log(2 * half * inverse)
    tail = middle - 2 * jax.nn.softplus(middle) + width
    nats = jnp.where(inside > 1e-5, jnp.log(jnp.maximum(inside, 1e-12)), tail)
    nats = jnp.where(pixels < half, -jax.nn.softplus(-above), nats)
    nats = jnp.where(pixels > 1 - half, -jax.nn.softplus(below), nats)
    return -per_example(nats)
