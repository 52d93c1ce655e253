"""Generative models of images: sections 5.2 and 5.3 of the paper."""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets import Data
from experiments.datasets.published import CIFAR10, MNIST, cifar10, mnist, provenance
from experiments.networks.draw import Draw
from experiments.networks.layers import ActivationNorm
from experiments.networks.vae import BinaryVAE, HierarchicalVAE
from experiments.tasks import Apply, Batch, Measures, Task, check_positive, check_sizes

SIDE = 10  # pictures are grids of so many images a side


class Generation(Task):
    """The parts that all models of images share. The loss is minus the lower bound, in nats."""

    __slots__ = ()

    metric: ClassVar[str] = "nats"

    def inputs(self, batch: Batch) -> jax.Array:
        """Pixels in [0, 1]."""
        return batch["images"].astype(jnp.float32) / 255

    def measures(self, outputs: Measures, batch: Batch) -> Measures:
        """Minus the lower bound on log p(x) in nats, its two terms, and bits a pixel value."""
        nats = outputs["reconstruction"] + outputs["kl"]
        bits = nats / (batch["images"][0].size * math.log(2))
        return {"loss": nats, "nats": nats, "bits_per_dim": bits, **outputs}

    def pictures(self, apply: Apply, batch: Batch) -> dict[str, np.ndarray]:
        """Samples, and pairs of rows: images and their reconstructions."""
        images = np.asarray(self.inputs(batch))[: SIDE * SIDE // 2]
        again = apply(images, method="reconstruct")
        starts = range(0, len(images), SIDE)
        rows = np.concatenate([x[i : i + SIDE] for i in starts for x in (images, again)])
        samples = apply(SIDE * SIDE, method="sample")
        return {"reconstructions": grid(rows, SIDE), "samples": grid(samples, SIDE)}


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """One picture (height, width, channels) of images (n, h, w, channels), row after row."""
    tiles = images[: len(images) // columns * columns]
    _, height, width, channels = tiles.shape
    tiles = tiles.reshape(-1, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, columns * width, channels)


class OnMnist(Generation):
    """A model of MNIST's images."""

    __slots__ = ()

    def data(self, folder: Path) -> Data:
        """60,000 images to train on and 10,000 to test on."""
        return mnist(folder)

    def provenance(self, folder: Path) -> dict[str, str]:
        """Whether the files are the published ones."""
        return {"MNIST": provenance(folder, MNIST)}


@dataclasses.dataclass(slots=True, kw_only=True)
class MnistVae(OnMnist):
    """MNIST, binarized at random each time, and a variational autoencoder of residual blocks.

    Attributes:
      maps: channels of the encoder's sequences of residual blocks; between two, images shrink.
      blocks: residual blocks of a sequence.
      units: features of the dense layers.
      latents: latent variables.
    """

    # Branches add up over the blocks, and the posterior starts near the prior.
    init_std: ClassVar[dict[str, float]] = {
        "encoder/posterior/kernel": 0.1,
        ".*ResidualBlock_.*/Conv_1/kernel": 0.3,
    }

    maps: tuple[int, ...] = (16, 32, 32)
    blocks: int = 2
    units: int = 450
    latents: int = 32

    def __post_init__(self) -> None:
        """Checks the sizes."""
        check_sizes(self, "maps")
        check_positive(self, "blocks", "units", "latents")
        if len(self.maps) > 3:
            raise ValueError(f"task.maps must be 3 at most: images of 28 pixels, got {self.maps}")

    def network(self, norm: ActivationNorm, dtype: Any) -> nn.Module:
        """One stochastic layer between an encoder and its mirror image."""
        del norm
        shape = 28, 28, 1
        return BinaryVAE(shape, self.maps, self.blocks, self.units, self.latents, dtype)


@dataclasses.dataclass(slots=True, kw_only=True)
class Cifar10Vae(Generation):
    """CIFAR-10, and residual units with a stochastic layer in each.

    Attributes:
      maps: channels of the residual stream.
      latents: latent variables of a unit at a pixel.
      levels: resolutions, the first being half the image's.
      units: stochastic units at a resolution.
    """

    metric: ClassVar[str] = "bits_per_dim"
    # Branches add up over the units, and posteriors start near their priors.
    init_std: ClassVar[dict[str, float]] = {
        ".*/(up_out|down_out)/kernel": 0.3,
        ".*/(below|above|prior)/kernel": 0.1,
    }

    maps: int = 64
    latents: int = 32
    levels: int = 3
    units: int = 3

    def __post_init__(self) -> None:
        """Checks the sizes."""
        check_positive(self, "maps", "latents", "levels", "units")
        if self.levels > 5:
            raise ValueError(f"task.levels must be 5 at most: 32 = 2^5, got {self.levels}")

    def data(self, folder: Path) -> Data:
        """50,000 images to train on and 10,000 to test on."""
        return cifar10(folder)

    def provenance(self, folder: Path) -> dict[str, str]:
        """Whether the files are the published ones."""
        return {"CIFAR-10": provenance(folder, CIFAR10)}

    def network(self, norm: ActivationNorm, dtype: Any) -> nn.Module:
        """Stochastic layers at several resolutions."""
        del norm
        return HierarchicalVAE((32, 32, 3), self.maps, self.latents, self.levels, self.units, dtype)


@dataclasses.dataclass(slots=True, kw_only=True)
class MnistDraw(OnMnist):
    """MNIST, binarized at random each time, and DRAW.

    Attributes:
      glimpses: steps in which an image is read and drawn.
      units: features of the LSTMs of encoder and decoder.
      latents: latent variables of a step.
      read: filters of the reading grid, on a side.
      write: filters of the writing grid, on a side.
      weight_std: standard deviation of all weights at the start; 0 for the initializers of Flax.
    """

    glimpses: int = 64
    units: int = 256
    latents: int = 100
    read: int = 2
    write: int = 5
    weight_std: float = 0.0

    def __post_init__(self) -> None:
        """Checks the sizes."""
        check_positive(self, "glimpses", "units", "latents")
        for name in ("read", "write"):
            if getattr(self, name) < 2:
                raise ValueError(f"task.{name} must be 2 or more, got {getattr(self, name)}")
        if self.weight_std < 0:
            raise ValueError(f"task.weight_std must not be negative, got {self.weight_std}")

    def network(self, norm: ActivationNorm, dtype: Any) -> nn.Module:
        """DRAW with LSTMs and selective attention."""
        del norm
        sizes = self.glimpses, self.units, self.latents, self.read, self.write
        return Draw((28, 28, 1), *sizes, self.weight_std, dtype)

    def pictures(self, apply: Apply, batch: Batch) -> dict[str, np.ndarray]:
        """The canvas over the steps, a row an image: drawn from data, and from the prior."""
        images = np.asarray(self.inputs(batch))[:SIDE]
        canvases = {
            "reconstructions": apply(images, method="reconstruct"),
            "samples": apply(SIDE, method="sample"),
        }
        steps = np.linspace(0, self.glimpses - 1, min(SIDE, self.glimpses)).round().astype(int)
        return {
            name: grid(np.concatenate(np.swapaxes(canvas[steps], 0, 1)), len(steps))
            for name, canvas in canvases.items()
        }
