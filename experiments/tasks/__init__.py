"""What is learned: each task is data, a network and a loss, and its fields are its sizes."""

# Config files set these fields and the command line changes them, so no
# `from __future__ import annotations` in this package: ml_collections reads their types.
import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np

from experiments.datasets import Data
from experiments.networks.layers import ActivationNorm

Batch = dict[str, jax.Array]  # by name; the first axis counts examples
Measures = dict[str, jax.Array]  # by name; a value for every example
Apply = Callable[..., np.ndarray]  # the network's methods: apply(*arguments, method=name)


class Task(abc.ABC):
    """What the trainer asks of a task; subclasses are dataclasses of sizes."""

    __slots__ = ()

    metric: ClassVar[str]  # the measure that tells how good a network is; less is better
    norms: ClassVar[tuple[ActivationNorm, ...]] = (ActivationNorm.NONE,)  # that the network has
    init_std: ClassVar[dict[str, float]] = {}  # deviations other than 1, for wnjax.data_init
    layouts: ClassVar[dict[str, tuple[str | None, ...]]] = {}  # of weights on a mesh, for placement

    @abc.abstractmethod
    def data(self, folder: Path) -> Data:
        """All examples; `folder` is where downloaded data is or goes.

        Raises:
          DataError: if they cannot be had.
        """

    def provenance(self, folder: Path) -> dict[str, str]:
        """What is to be said of the data, by its name; nothing where there is nothing to say."""
        del folder
        return {}

    @abc.abstractmethod
    def network(self, norm: ActivationNorm, dtype: Any) -> nn.Module:
        """The network, called with inputs and `train`."""

    @abc.abstractmethod
    def inputs(self, batch: Batch) -> jax.Array:
        """What the network sees of a batch."""

    @abc.abstractmethod
    def measures(self, outputs: Any, batch: Batch) -> Measures:
        """The loss of every example, called "loss", and what else is to be known."""

    def pictures(self, apply: Apply, batch: Batch) -> dict[str, np.ndarray]:
        """By name, images (height, width, channels) in [0, 1] of what a network does."""
        del apply, batch
        return {}


def check_positive(task: Any, *names: str) -> None:
    """Refuses fields that are not positive.

    Raises:
      ValueError: naming the field.
    """
    for name in names:
        if getattr(task, name) <= 0:
            raise ValueError(f"task.{name} must be positive, got {getattr(task, name)}")


def check_sizes(task: Any, name: str, length: int | None = None) -> None:
    """Refuses a field that is not a tuple of positive ints.

    Raises:
      ValueError: naming the field.
    """
    sizes, number = getattr(task, name), "one or more" if length is None else length
    fits = len(sizes) == length if length else len(sizes) > 0
    if not fits or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"task.{name} must be {number} positive ints, got {sizes}")
