"""The digits, and the order in which batches visit them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import batch_indices, digits


def test_digits_are_whole_and_split_by_class():
    data = digits()
    assert data.train.images.shape == (1437, 8, 8, 1)
    assert data.test.images.shape == (360, 8, 8, 1)
    assert (data.train.images.dtype, data.train.labels.dtype) == (jnp.float32, jnp.int32)
    assert (data.train.images.min(), data.train.images.max()) == (0, 1)
    assert np.bincount(data.test.labels).min() >= 34
    together = np.concatenate([np.asarray(split.images).reshape(-1, 64) for split in data])
    assert len(np.unique(together, axis=0)) == 1797  # no image is on both sides


def test_an_epoch_visits_every_example_once():
    batches = batch_indices(jax.random.key(0), jnp.int32(0), steps=10, batch=4, n=22)
    first, second = batches[:5].ravel(), batches[5:].ravel()
    for epoch in (first, second):
        assert len(np.unique(epoch)) == 20
        assert epoch.min() >= 0
        assert epoch.max() < 22
    assert (first != second).any()


@pytest.mark.parametrize("chunk", [1, 3, 7, 12, 21])
def test_chunks_do_not_matter(chunk):
    def order(chunk):
        starts = jnp.arange(0, 21, chunk, dtype=jnp.int32)
        parts = [batch_indices(jax.random.key(1), start, chunk, 4, 22) for start in starts]
        return np.concatenate(parts)[:21]

    np.testing.assert_array_equal(order(chunk), order(21))
