"""Gains of a rate of their own: by hand, and alike in both forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnjax
from experiments.gains import scale_gains_by_fan_in

pytestmark = pytest.mark.usefixtures("standard_promotion")


def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "conv": jax.random.normal(keys[0], (2, 2, 3, 4), jnp.float64),
        "dense": {"kernel": jax.random.normal(keys[1], (4, 5), jnp.float64), "bias": jnp.zeros(5)},
    }
    x = jax.random.normal(keys[2], (7, 2, 2, 3), jnp.float64)

    def loss(params):
        h = jnp.tanh(jnp.tensordot(x, params["conv"], 3))
        return jnp.mean((h @ params["dense"]["kernel"] + params["dense"]["bias"][None] - 1) ** 2)

    return params, loss, {"conv": -1, "dense/kernel": -1, ".*bias": None}


@pytest.mark.usefixtures("x64")
def test_gains_alone_move_further():
    """By √12 for the convolution and by 2 for the dense layer; Adam's first step is the rate."""
    params, loss, axes = problem()
    normalized = wnjax.weight_norm(params, axes)
    optimizer = optax.chain(optax.adam(0.1), scale_gains_by_fan_in())
    grads = jax.grad(lambda tree: loss(wnjax.fold(tree)))(normalized)
    updates, _ = optimizer.update(grads, optimizer.init(normalized), normalized)
    alone = optax.adam(0.1)
    expected, _ = alone.update(grads, alone.init(normalized), normalized)
    for name, factor in (("conv", 12**0.5), ("dense", 2)):
        leaf, other = (tree[name] for tree in (updates, expected))
        leaf, other = (x["kernel"] if name == "dense" else x for x in (leaf, other))
        np.testing.assert_allclose(leaf.g, factor * other.g, rtol=1e-12)
        np.testing.assert_array_equal(leaf.v, other.v)
        np.testing.assert_allclose(abs(leaf.g), 0.1 * factor, rtol=1e-5)
    np.testing.assert_array_equal(updates["dense"]["bias"], expected["dense"]["bias"])


@pytest.mark.usefixtures("x64")
def test_both_forms_take_the_same_steps():
    params, loss, axes = problem()
    optimizer = optax.chain(optax.adam(0.03), scale_gains_by_fan_in())
    tree, plain = wnjax.weight_norm(params, axes), params
    behind = wnjax.weight_normalized(optimizer, axes)
    state, plain_state = optimizer.init(tree), behind.init(plain)
    for _ in range(10):
        grads = jax.grad(lambda tree: loss(wnjax.fold(tree)))(tree)
        updates, state = optimizer.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
        updates, plain_state = behind.update(jax.grad(loss)(plain), plain_state, plain)
        plain = optax.apply_updates(plain, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        wnjax.fold(tree),
        plain,
    )


def test_logarithms_of_gains_pass_unchanged():
    leaf = wnjax.LogWeightNorm(jnp.ones((1, 2)), jnp.ones((4, 2)))
    updates, _ = scale_gains_by_fan_in().update({"w": leaf}, optax.EmptyState())
    jax.tree.map(np.testing.assert_array_equal, updates, {"w": leaf})
