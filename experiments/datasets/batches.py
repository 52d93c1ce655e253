"""Which examples make up a batch, decided on the device."""

import jax
import jax.numpy as jnp


def batch_indices(key: jax.Array, first: jax.Array, steps: int, batch: int, n: int) -> jax.Array:
    """Which of `n` examples make up the batches of `steps` steps from step `first` on.

    Every epoch is a new permutation, of which the last n % batch examples are left out.
    The result depends on `key` and the step alone, not on how many steps are asked for at once.

    Returns:
      Indices of shape (steps, batch).
    """
    per_epoch = n // batch

    def epoch(number: jax.Array) -> jax.Array:
        order = jax.random.permutation(jax.random.fold_in(key, number), n)
        return order[: per_epoch * batch].reshape(per_epoch, batch)

    # So many epochs at the most do the steps touch.
    epochs = first // per_epoch + jnp.arange(-(-(steps - 1) // per_epoch) + 1)
    batches = jax.vmap(epoch)(epochs).reshape(-1, batch)
    return jax.lax.dynamic_slice_in_dim(batches, first % per_epoch, steps)
