"""What every implementation of weight normalization trains: a network and a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.networks.classifiers import MLP, ConvPoolCNN
from experiments.networks.transformer import Transformer

Batch = tuple[jax.Array, jax.Array]  # inputs and labels


class Problem(NamedTuple):
    """A plain Linen network, its parameters, and the batch that it is trained on."""

    model: nn.Module
    params: Any
    inputs: jax.Array
    labels: jax.Array


class Network(NamedTuple):
    """What is trained: a Linen network, how to make a batch of some size, and default sizes.

    The size of a batch counts images, or sequences of tokens.
    """

    model: nn.Module
    batch: Callable[[int], Batch]
    sizes: tuple[int, ...]

    def problem(self, size: int) -> Problem:
        """The network and a batch, always the same ones."""
        inputs, labels = self.batch(size)
        return Problem(self.model, variables(self.model, inputs)["params"], inputs, labels)


def variables(model: nn.Module, inputs: jax.Array) -> dict[str, Any]:
    """Variables that are always the same: compiling Linen's initializers takes too long here."""
    shapes = jax.eval_shape(partial(model.init, train=True), jax.random.key(0), inputs)
    random = np.random.default_rng(0)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = random.standard_normal(leaf.shape, np.float32)
        if leaf.ndim > 1:  # by the inputs of a neuron
            values /= np.sqrt(leaf.size / leaf.shape[-1])
        else:
            values = 0.1 * values + str(path[-1].key).endswith(("scale", "var"))
        return jnp.asarray(values, leaf.dtype)

    filled: dict[str, Any] = jax.tree_util.tree_map_with_path(fill, dict(shapes))
    return filled


def images(*shape: int, classes: int = 10) -> Callable[[int], Batch]:
    """Batches of noise with random labels."""

    def batch(size: int) -> Batch:
        keys = jax.random.split(jax.random.key(1))
        labels = jax.random.randint(keys[1], (size,), 0, classes, jnp.int32)
        return jax.random.normal(keys[0], (size, *shape), jnp.float32), labels

    return batch


def sequences(length: int, vocabulary: int) -> Callable[[int], Batch]:
    """Batches of random tokens, with the next ones as labels."""

    def batch(size: int) -> Batch:
        shape = (size, length + 1)
        tokens = jax.random.randint(jax.random.key(1), shape, 0, vocabulary, jnp.int32)
        return tokens[:, :-1], tokens[:, 1:]

    return batch


NETWORKS = {
    "mlp": Network(MLP(), images(784), (8, 64, 512)),
    "convpool": Network(ConvPoolCNN(dropout=0.0, noise=0.0), images(32, 32, 3), (8, 64, 512)),
    "transformer": Network(Transformer(), sequences(64, 256), (2, 8, 64)),  # of 64 tokens
}
