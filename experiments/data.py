"""The data sets, as arrays in memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets, model_selection


class Split(NamedTuple):
    """Images (n, height, width, channels), float32 in [0, 1], and labels (n,), int32."""

    images: jax.Array
    labels: jax.Array


class Data(NamedTuple):
    """What a network is trained on, and what it is tested on."""

    train: Split
    test: Split


def digits() -> Data:
    """The 1,797 handwritten digits of 8x8 pixels that ship with scikit-learn.

    A fifth of every class is held out: 1,437 images to train on, 360 to test on. The
    split is always the same.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (1998),
    https://doi.org/10.24432/C50P49, test part.
    """
    bunch = datasets.load_digits()
    train, test = model_selection.train_test_split(
        np.arange(len(bunch.target)), test_size=0.2, stratify=bunch.target, random_state=0
    )
    return Data(
        *(_split(bunch.images[rows, :, :, None] / 16, bunch.target[rows]) for rows in (train, test))
    )


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32))


def batch_indices(key: jax.Array, first: jax.Array, steps: int, batch: int, n: int) -> jax.Array:
    """Which of `n` examples make up the batches of `steps` steps from step `first` on.

    Every epoch is a new permutation, of which the last n % batch examples are left out.
    The result depends on `key` and the step alone, not on how steps are put into chunks.

    Returns:
      Indices of shape (steps, batch).
    """
    per_epoch = n // batch

    def epoch(number: jax.Array) -> jax.Array:
        order = jax.random.permutation(jax.random.fold_in(key, number), n)
        return order[: per_epoch * batch].reshape(per_epoch, batch)

    # So many epochs at the most does a chunk touch.
    epochs = first // per_epoch + jnp.arange((steps - 1) // per_epoch + 2)
    batches = jax.vmap(epoch)(epochs).reshape(-1, batch)
    return jax.lax.dynamic_slice_in_dim(batches, first % per_epoch, steps)
