"""Images and their classes: the digits, and CIFAR-10 as in section 5.1 of the paper."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.datasets import Data
from experiments.datasets.digits import digits
from experiments.datasets.published import CIFAR10, cifar10, provenance
from experiments.datasets.whitening import fit_once
from experiments.networks.classifiers import ConvNet, ConvPoolCNN
from experiments.networks.layers import ActivationNorm
from experiments.tasks import Batch, Measures, Task, check_sizes

CLASSES = 10


class Classification(Task):
    """The parts that all classifications of images share."""

    __slots__ = ()

    metric: ClassVar[str] = "error"
    norms: ClassVar[tuple[ActivationNorm, ...]] = tuple(ActivationNorm)

    def inputs(self, batch: Batch) -> jax.Array:
        """The images."""
        return batch["images"]

    def measures(self, outputs: jax.Array, batch: Batch) -> Measures:
        """Cross entropy in nats, and 1 where the most likely class is the wrong one."""
        logits = outputs.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return {"loss": loss, "error": (logits.argmax(-1) != batch["labels"]).astype(jnp.float32)}


@dataclasses.dataclass(slots=True, kw_only=True)
class Digits(Classification):
    """The 8x8 digits that ship with scikit-learn, and a small convolutional network.

    Attributes:
      widths: output channels of the 3x3 convolutions; all but the first halve the image.
    """

    widths: tuple[int, ...] = (16, 32, 32)

    def __post_init__(self) -> None:
        """Checks the sizes."""
        check_sizes(self, "widths")

    def data(self, folder: Path) -> Data:
        """1,437 images to train on and 360 to test on."""
        del folder  # they come with a package
        return digits()

    def network(self, norm: ActivationNorm, dtype: Any) -> nn.Module:
        """Convolutions, the average over the image, and a dense layer."""
        return ConvNet(self.widths, CLASSES, norm, dtype)


@dataclasses.dataclass(slots=True, kw_only=True)
class Cifar10(Classification):
    """CIFAR-10 and ConvPool-CNN-C.

    Attributes:
      whiten: ZCA whitening of the images, fitted to those for training and kept in data_dir;
        otherwise pixels are between -1 and 1.
      widths: output channels of the convolutions in the three parts of the network.
      dropout: share of values dropped after each pooling, in training.
      noise: standard deviation of the noise added to the images, in training.
      weight_std: standard deviation of the weights at the start, at the widths of the paper; 0
        for the uniform distribution of Glorot & Bengio 2010.
    """

    whiten: bool = True
    widths: tuple[int, ...] = (96, 192, 192)
    dropout: float = 0.5
    noise: float = 0.15
    weight_std: float = 0.05

    def __post_init__(self) -> None:
        """Checks the values."""
        check_sizes(self, "widths", length=3)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"task.dropout must lie in [0, 1), got {self.dropout}")
        for name in ("noise", "weight_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"task.{name} must not be negative, got {getattr(self, name)}")

    def data(self, folder: Path) -> Data:
        """50,000 images to train on and 10,000 to test on."""
        data = cifar10(folder)
        if not self.whiten:
            return data
        whitening = fit_once(data.train["images"], folder)
        train, test = ({**split, "images": whitening(split["images"])} for split in data[:2])
        return Data(train, test)

    def inputs(self, batch: Batch) -> jax.Array:
        """The images, whitened or between -1 and 1."""
        images = batch["images"]
        return images if self.whiten else images.astype(jnp.float32) / 127.5 - 1

    def provenance(self, folder: Path) -> dict[str, str]:
        """Whether the files are the published ones."""
        return {"CIFAR-10": provenance(folder, CIFAR10)}

    def network(self, norm: ActivationNorm, dtype: Any) -> nn.Module:
        """The network of section 5.1."""
        first, second, third = self.widths
        return ConvPoolCNN(
            widths=(first, second, third),
            classes=CLASSES,
            dropout=self.dropout,
            noise=self.noise,
            norm=norm,
            weight_std=self.weight_std,
            dtype=dtype,
        )
