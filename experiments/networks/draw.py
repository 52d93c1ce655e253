"""DRAW: a recurrent variational autoencoder that reads and writes through attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.networks.gaussian import (
    bernoulli_nats,
    divergence,
    gaussian,
    per_example,
    standard,
)
from experiments.networks.vae import Terms


class Filters(NamedTuple):
    """A grid of Gaussian filters on an image, and how bright what they see is.

    Attributes:
      rows: (batch, grid, height); every filter sums to 1.
      columns: (batch, grid, width).
      intensity: (batch, 1, 1).
    """

    rows: jax.Array
    columns: jax.Array
    intensity: jax.Array

    def read(self, images: jax.Array) -> jax.Array:
        """Patches (batch, grid²) of images (batch, height, width)."""
        seen = self.rows @ images @ jnp.swapaxes(self.columns, 1, 2)
        return (self.intensity * seen).reshape(len(images), -1)

    def write(self, patches: jax.Array) -> jax.Array:
        """Images (batch, height, width) of patches (batch, grid²)."""
        grid = self.rows.shape[1]
        patches = patches.reshape(-1, grid, grid)
        return jnp.swapaxes(self.rows, 1, 2) @ patches @ self.columns / self.intensity


def filters(parameters: jax.Array, height: int, width: int, grid: int) -> Filters:
    """The filters that five numbers place: center, log variance, log stride, log intensity.

    Source: Gregor et al. 2015, https://arxiv.org/abs/1502.04623, equations 19 to 26.

    Args:
      parameters: (batch, 5).
      height: of the images.
      width: of the images.
      grid: the filters on a side.
    """
    x, y, log_variance, log_stride, log_intensity = jnp.split(parameters[..., None], 5, axis=1)
    stride = (max(height, width) - 1) / (grid - 1) * jnp.exp(log_stride)
    offsets = stride * (jnp.arange(grid) - (grid - 1) / 2)[None, None]

    def bank(center: jax.Array, size: int) -> jax.Array:
        places = (size + 1) / 2 * (center + 1) - 1 + offsets  # (batch, 1, grid)
        distance = jnp.arange(size)[None, None] - jnp.swapaxes(places, 1, 2)
        # As a softmax over the pixels: a filter beside the image is finite, and sums to 1.
        return jax.nn.softmax(-0.5 * distance**2 * jnp.exp(-log_variance), axis=-1)

    return Filters(bank(y, height), bank(x, width), jnp.exp(log_intensity))


class Carry(NamedTuple):
    """What one glimpse hands on to the next."""

    canvas: jax.Array  # (batch, height, width): logits
    encoder: tuple[jax.Array, jax.Array]  # the LSTM's c and h, (batch, units) each
    decoder: tuple[jax.Array, jax.Array]


class Glimpse(nn.Module):
    """One step: look at the image and at what is missing, and draw some more of it.

    Attributes:
      units: the features of both LSTMs.
      latents: the latent variables of a step.
      read: the filters of the reading grid, on a side.
      write: the filters of the writing grid, on a side.
      weight_std: the standard deviation of all weights at the start; 0 for Flax's own choices.
      dtype: of the computation.
    """

    units: int
    latents: int
    read: int
    write: int
    weight_std: float = 0.0
    dtype: Any = None

    def setup(self) -> None:
        """Both LSTMs, and dense layers between them and the image."""
        normal = nn.initializers.normal(self.weight_std)
        of_dense: dict[str, Any] = {"kernel_init": normal} if self.weight_std else {}
        of_lstm = {**of_dense, "recurrent_kernel_init": normal} if self.weight_std else {}

        def dense(features: int) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, **of_dense)

        self.reading, self.writing = dense(5), dense(5)
        self.encoder = nn.OptimizedLSTMCell(self.units, dtype=self.dtype, **of_lstm)
        self.decoder = nn.OptimizedLSTMCell(self.units, dtype=self.dtype, **of_lstm)
        self.posterior, self.patch = dense(2 * self.latents), dense(self.write**2)

    def __call__(self, carry: Carry, images: jax.Array) -> tuple[Carry, tuple[jax.Array, Any]]:
        """The divergence in nats per example, and the canvas, after the step."""
        _, height, width = images.shape
        h = carry.decoder[1]
        grid = filters(self.reading(h).astype(jnp.float32), height, width, self.read)
        missing = images - nn.sigmoid(carry.canvas)
        seen = jnp.concatenate([grid.read(images), grid.read(missing), h], axis=-1)
        encoder, features = self.encoder(carry.encoder, seen)
        posterior = gaussian(self.posterior(features))
        after = self.draw(carry, posterior.sample(self.make_rng("latent")))
        kl = per_example(divergence(posterior, standard(posterior)))
        return after._replace(encoder=encoder), (kl, after.canvas)

    def dream(self, carry: Carry, _: Any) -> tuple[Carry, jax.Array]:
        """A step without an image: latent variables are drawn from the prior."""
        shape = len(carry.canvas), self.latents
        after = self.draw(carry, jax.random.normal(self.make_rng("latent"), shape, jnp.float32))
        return after, after.canvas

    def draw(self, carry: Carry, z: jax.Array) -> Carry:
        """What the latent variables (batch, latents) make of the canvas."""
        _, height, width = carry.canvas.shape
        decoder, h = self.decoder(carry.decoder, z)
        grid = filters(self.writing(h).astype(jnp.float32), height, width, self.write)
        canvas = carry.canvas + grid.write(self.patch(h).astype(jnp.float32))
        return Carry(canvas, carry.encoder, decoder)


class Draw(nn.Module):
    """DRAW with LSTMs and selective attention, for binary images of one channel.

    Pixels are binarized at random, each time anew: 1 with the probability that the grey level is.

    Source: Gregor et al. 2015, https://arxiv.org/abs/1502.04623, as Salimans & Kingma 2016 train
    it in section 5.3.

    Attributes:
      shape: of an image: height, width, 1.
      glimpses: the steps.
      units: the features of both LSTMs.
      latents: the latent variables of a step.
      read: the filters of the reading grid, on a side.
      write: the filters of the writing grid, on a side.
      weight_std: the standard deviation of all weights at the start; 0 for Flax's own choices.
      dtype: of the computation.
    """

    shape: tuple[int, int, int]
    glimpses: int
    units: int
    latents: int
    read: int
    write: int
    weight_std: float = 0.0
    dtype: Any = None

    def setup(self) -> None:
        """The cell, and what the first glimpse is handed."""
        sizes = self.units, self.latents, self.read, self.write
        self.cell = Glimpse(*sizes, self.weight_std, self.dtype)

        def learned(name: str, *shape: int) -> jax.Array:
            start: jax.Array = self.param(name, nn.initializers.zeros, shape)
            return start

        def state(name: str) -> tuple[jax.Array, jax.Array]:
            c, h = (learned(f"{name}_{part}", self.units) for part in ("c", "h"))
            return jnp.asarray(c, self.dtype), jnp.asarray(h, self.dtype)

        canvas = learned("canvas", *self.shape[:2])
        self.start = Carry(canvas, state("encoder"), state("decoder"))

    def __call__(self, images: jax.Array, *, train: bool) -> Terms:
        """The terms of the lower bound, in nats per example, for images in [0, 1]."""
        del train  # nothing differs
        pixels = jax.random.bernoulli(self.make_rng("binarization"), images[..., 0])
        canvases, kl = self._steps(pixels.astype(jnp.float32))
        return {"reconstruction": bernoulli_nats(canvases[-1], pixels), "kl": kl.sum(0)}

    def reconstruct(self, images: jax.Array) -> jax.Array:
        """Every canvas while images are drawn: (glimpses, batch, height, width, 1)."""
        return nn.sigmoid(self._steps(images[..., 0].round())[0])[..., None]

    def sample(self, number: int) -> jax.Array:
        """Every canvas of so many images from the model: (glimpses, number, height, width, 1)."""

        def step(cell: Glimpse, carry: Carry, _: None) -> tuple[Carry, jax.Array]:
            return cell.dream(carry, None)

        canvases: jax.Array = self._scan(step)(self.cell, self._start(number), None)[1]
        return nn.sigmoid(canvases)[..., None]

    def _steps(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Canvases (glimpses, batch, height, width), and nats (glimpses, batch)."""

        def step(cell: Glimpse, carry: Carry, _: None) -> tuple[Carry, tuple[jax.Array, Any]]:
            return cell(carry, pixels)

        kl, canvases = self._scan(step)(self.cell, self._start(len(pixels)), None)[1]
        return canvases, kl

    def _scan(self, step: Any) -> Any:
        rngs: dict[Any, bool] = {"params": False, "latent": True}
        return nn.scan(step, variable_broadcast="params", split_rngs=rngs, length=self.glimpses)

    def _start(self, number: int) -> Carry:
        start: Carry = jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *x.shape)), self.start)
        return start
