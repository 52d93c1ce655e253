"""Variational autoencoders of residual convolutions, with one and with many stochastic layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.networks.gaussian import (
    Gaussian,
    bernoulli_nats,
    divergence,
    gaussian,
    logistic_nats,
    per_example,
    standard,
)
from experiments.networks.layers import ResidualBlock

Terms = dict[str, jax.Array]  # nats per example


def upsample(x: jax.Array) -> jax.Array:
    """Every pixel of (batch, height, width, maps) twice in both directions."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class Encoder(nn.Module):
    """Sequences of residual blocks, the image halved between them, and a dense layer.

    Attributes:
      maps: the channels of the sequences.
      blocks: the residual blocks of a sequence.
      units: the features of the dense layer.
      latents: the latent variables.
      dtype: of the computation.
    """

    maps: tuple[int, ...]
    blocks: int
    units: int
    latents: int
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> Gaussian:
        """q(z | x), of shape (batch, latents), for images (batch, height, width, channels)."""
        x = images
        for i, maps in enumerate(self.maps):
            x = nn.Conv(maps, (3, 3), strides=2 if i else 1, dtype=self.dtype)(x)
            for _ in range(self.blocks):
                x = ResidualBlock(maps, self.dtype)(x)
            x = nn.elu(x)
        x = nn.elu(nn.Dense(self.units, dtype=self.dtype)(x.reshape(len(x), -1)))
        return gaussian(nn.Dense(2 * self.latents, dtype=self.dtype, name="posterior")(x))


class Decoder(nn.Module):
    """The mirror image of the encoder.

    Attributes:
      shape: of an image: height and width, multiples of 2^(sequences - 1), and channels.
      maps: the channels of the encoder's sequences.
      blocks: the residual blocks of a sequence.
      units: the features of the dense layer.
      dtype: of the computation.
    """

    shape: tuple[int, int, int]
    maps: tuple[int, ...]
    blocks: int
    units: int
    dtype: Any = None

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Logits of the pixels of images, for latent variables (batch, latents)."""
        height, width, channels = self.shape
        factor = 2 ** (len(self.maps) - 1)
        small = height // factor, width // factor, self.maps[-1]
        x = nn.elu(nn.Dense(self.units, dtype=self.dtype)(z))
        x = nn.Dense(small[0] * small[1] * small[2], dtype=self.dtype)(x)
        x = nn.elu(x.reshape(-1, *small))
        for i, maps in enumerate(reversed(self.maps)):
            x = nn.Conv(maps, (3, 3), dtype=self.dtype)(upsample(x) if i else x)
            for _ in range(self.blocks):
                x = ResidualBlock(maps, self.dtype)(x)
            x = nn.elu(x)
        pixels = nn.Conv(channels, (3, 3), dtype=self.dtype, name="pixels")
        return pixels(x).astype(jnp.float32)


class BinaryVAE(nn.Module):
    """One layer of Gaussian latent variables behind binary images.

    Pixels are binarized at random, each time anew: 1 with the probability that the grey level is.

    The posterior is a diagonal Gaussian; the paper's is autoregressive.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, section 5.2, and Salimans,
    Kingma & Welling 2015, https://arxiv.org/abs/1410.6460, section 4.2.

    Attributes:
      shape: of an image.
      maps: the channels of the encoder's sequences.
      blocks: the residual blocks of a sequence.
      units: the features of the dense layers.
      latents: the latent variables.
      dtype: of the computation.
    """

    shape: tuple[int, int, int]
    maps: tuple[int, ...]
    blocks: int
    units: int
    latents: int
    dtype: Any = None

    def setup(self) -> None:
        """Both halves."""
        sizes = self.maps, self.blocks, self.units
        self.encoder = Encoder(*sizes, self.latents, self.dtype)
        self.decoder = Decoder(self.shape, *sizes, self.dtype)

    def __call__(self, images: jax.Array, *, train: bool) -> Terms:
        """The terms of the lower bound, in nats per example, for images in [0, 1]."""
        del train  # nothing differs
        pixels = jax.random.bernoulli(self.make_rng("binarization"), images)
        posterior = self.encoder(pixels.astype(jnp.float32))
        logits = self.decoder(posterior.sample(self.make_rng("latent")))
        kl = per_example(divergence(posterior, standard(posterior)))
        return {"reconstruction": bernoulli_nats(logits, pixels), "kl": kl}

    def sample(self, number: int) -> jax.Array:
        """So many images from the model: the probabilities of their pixels."""
        z = jax.random.normal(self.make_rng("latent"), (number, self.latents), jnp.float32)
        return nn.sigmoid(self.decoder(z))

    def reconstruct(self, images: jax.Array) -> jax.Array:
        """Images, encoded to the means of the posterior and decoded."""
        return nn.sigmoid(self.decoder(self.encoder(images.round()).mean))


class StochasticUnit(nn.Module):
    """A residual unit with latent variables, inferred from above and from below.

    Attributes:
      maps: the channels of the residual stream.
      latents: the latent variables at a pixel.
      dtype: of the computation.
    """

    maps: int
    latents: int
    dtype: Any = None

    def setup(self) -> None:
        """The convolutions of both passes."""

        def conv(maps: int) -> nn.Conv:
            return nn.Conv(maps, (3, 3), dtype=self.dtype)

        def head() -> nn.Conv:
            # Small at first, so that the posterior starts near the prior.
            init = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
            return nn.Conv(2 * self.latents, (3, 3), kernel_init=init, dtype=self.dtype)

        self.up, self.up_out = conv(self.maps), conv(self.maps)
        self.down, self.down_out = conv(self.maps), conv(self.maps)
        self.below, self.above, self.prior = head(), head(), head()

    def encode(self, x: jax.Array) -> jax.Array:
        """What the features from below say of the latent variables."""
        return self.below(nn.elu(x))

    def ascend(self, x: jax.Array) -> jax.Array:
        """The features for the next unit."""
        return x + self.up_out(nn.elu(self.up(nn.elu(x))))

    def decode(
        self, x: jax.Array, below: jax.Array | None, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The next features from above, and the divergence in nats per example.

        Where there is nothing from below, latent variables are drawn from the prior.
        """
        h = nn.elu(x)
        prior = gaussian(self.prior(h))
        posterior = prior if below is None else gaussian(self.above(h) + below)
        both = jnp.concatenate([nn.elu(self.down(h)), posterior.sample(key)], axis=-1)
        return x + self.down_out(both), per_example(divergence(posterior, prior))


class HierarchicalVAE(nn.Module):
    """Residual units with a layer of latent variables in each, at several resolutions.

    Inference goes up through all units and down again, generation down alone. Pixels have a
    logistic distribution with a scale learned for each channel.

    The posterior of a unit is a diagonal Gaussian. Salimans & Kingma 2016 train this network in
    section 5.2 with autoregressive posteriors, which are left out here.

    Source: Kingma et al. 2016, https://arxiv.org/abs/1606.04934, section 5.2 and appendix C.

    Attributes:
      shape: of an image; height and width are multiples of 2^levels.
      maps: the channels of the residual stream.
      latents: the latent variables of a unit at a pixel.
      levels: the resolutions; the first has half the image's.
      units: the stochastic units at a resolution.
      dtype: of the computation.
    """

    shape: tuple[int, int, int]
    maps: int
    latents: int
    levels: int
    units: int
    dtype: Any = None

    def setup(self) -> None:
        """All units, and what changes the resolution between them."""
        levels, units = range(self.levels), range(self.units)
        self.stack = [
            [StochasticUnit(self.maps, self.latents, self.dtype) for _ in units] for _ in levels
        ]
        self.shrink = [nn.Conv(self.maps, (3, 3), strides=2, dtype=self.dtype) for _ in levels]
        self.grow = [nn.Conv(self.maps, (3, 3), dtype=self.dtype) for _ in levels]
        self.pixels = nn.Conv(self.shape[-1], (3, 3), dtype=self.dtype)
        height, width, _ = self.shape
        top = height >> self.levels, width >> self.levels, self.maps
        self.top = self.param("top", nn.initializers.zeros, top)
        self.log_scale = self.param("log_scale", nn.initializers.constant(-3.0), self.shape[-1:])

    def __call__(self, images: jax.Array, *, train: bool) -> Terms:
        """The terms of the lower bound, in nats per example, for images in [0, 1]."""
        del train  # nothing differs
        below = self._encode(images)
        mean, kl = self._decode(len(images), below)
        log_scale = self.log_scale[None, None, None]
        return {"reconstruction": logistic_nats(mean, log_scale, images), "kl": kl}

    def sample(self, number: int) -> jax.Array:
        """So many images from the model: the means of their pixels."""
        return self._decode(number, None)[0].clip(0, 1)

    def reconstruct(self, images: jax.Array) -> jax.Array:
        """Images, encoded and decoded."""
        return self._decode(len(images), self._encode(images))[0].clip(0, 1)

    def _encode(self, images: jax.Array) -> list[list[jax.Array]]:
        x, found = 2 * images - 1, []
        for shrink, level in zip(self.shrink, self.stack, strict=True):
            x, from_level = shrink(x), []
            for unit in level:
                from_level.append(unit.encode(x))
                if unit is not self.stack[-1][-1]:  # nothing is above it
                    x = unit.ascend(x)
            found.append(from_level)
        return found

    def _decode(
        self, number: int, found: list[list[jax.Array]] | None
    ) -> tuple[jax.Array, jax.Array]:
        x = jnp.broadcast_to(self.top[None], (number, *self.top.shape))
        kl = jnp.zeros(number, jnp.float32)
        for i in reversed(range(self.levels)):
            for j in reversed(range(self.units)):
                below = None if found is None else found[i][j]
                x, nats = self.stack[i][j].decode(x, below, self.make_rng("latent"))
                kl = kl + nats
            x = self.grow[i](upsample(nn.elu(x)))
        return (1 + self.pixels(nn.elu(x)).astype(jnp.float32)) / 2, kl
