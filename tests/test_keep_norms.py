"""Steps on the sphere, and what plain steps do to lengths."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnjax
from tests import toys

AXES = {".*kernel": -1, ".*bias": None}

SHAPES = {  # name: (shape, feature axes)
    "dense": ((6, 5), (1,)),
    "heads": ((6, 2, 3), (1, 2)),
    "scanned": ((4, 6, 5), (0, 2)),
    "conv": ((3, 3, 2, 4), (3,)),
}


def normal(shape, seed):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("as_gv_leaves", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_norms_stay_over_1000_steps(name, as_gv_leaves):
    shape, features = SHAPES[name]
    fan_in = tuple(axis for axis in range(len(shape)) if axis not in features)
    target, w = toys.in_float64([3 * normal(shape, i) for i in (0, 1)])
    axes = {"w": features}
    params = wnjax.weight_norm({"w": w}, axes) if as_gv_leaves else {"w": w}
    optimizer = optax.chain(optax.adam(3e-2), wnjax.keep_norms(None if as_gv_leaves else axes))

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: jnp.mean((wnjax.fold(p)["w"] - target) ** 2))(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        with jax.numpy_dtype_promotion("standard"):
            return jax.lax.scan(step, (params, optimizer.init(params)), length=1000)[0][0]

    found = run(params)
    v = found["w"].v if as_gv_leaves else found["w"]
    norms = [
        np.linalg.norm(
            np.asarray(x).transpose(*features, *fan_in).reshape(*[shape[f] for f in features], -1),
            axis=-1,
        )
        for x in (v, w)
    ]
    rounding = 1000 * float(jnp.finfo(jnp.float64).eps)  # in the same direction, in every step
    np.testing.assert_allclose(norms[0], norms[1], rtol=rounding)
    assert float(jnp.abs(v - w).max()) > 0.5
    cosine = (
        jnp.sum(v * target, fan_in)
        / norms[0]
        / jnp.linalg.norm(
            target.transpose(*features, *fan_in).reshape(*[shape[f] for f in features], -1), axis=-1
        )
    )
    assert float(cosine.mean()) > 0.7  # it trains


def test_projection_against_its_formula_in_float64():
    with jax.enable_x64(True):
        w, u = (jax.random.normal(jax.random.key(i), (6, 5), jnp.float64) for i in (0, 1))
        updates, _ = wnjax.keep_norms().update({"kernel": u}, optax.EmptyState(), {"kernel": w})
        norm, new = jnp.linalg.norm(w, axis=0), jnp.linalg.norm(w + u, axis=0)
        expected = (w + u) * (norm / new)[None] - w
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-12, atol=1e-13)


def test_zero_updates_and_zero_neurons():
    params = {"kernel": jnp.ones((3, 2)).at[:, 0].set(0)}
    optimizer = wnjax.keep_norms()
    state = optimizer.init(params)
    none, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_array_equal(none["kernel"], 0)
    some, _ = optimizer.update({"kernel": jnp.full((3, 2), 0.5)}, state, params)
    np.testing.assert_allclose(some["kernel"], [[0.5, 0]] * 3, atol=1e-7)


@pytest.mark.parametrize("name", toys.TREES)
def test_every_tree(name):
    params = toys.TREES[name]()
    for tree in (params, wnjax.weight_norm(params, AXES)):
        optimizer = wnjax.keep_norms(AXES)
        updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, tree), optimizer.init(tree), tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)


def test_masked_leaves_are_left_out():
    params = {"a": {"kernel": jnp.ones((3, 2))}, "b": {"kernel": jnp.ones((3, 2))}}
    optimizer = optax.masked(
        wnjax.keep_norms({"a/kernel": 1, "b/kernel": 1}), {"a": True, "b": False}
    )
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], 0, atol=1e-6)
    np.testing.assert_array_equal(updates["b"]["kernel"], 1)


def test_errors():
    with pytest.raises(ValueError, match="no leaf is a weight"):
        wnjax.keep_norms().init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="pass them"):
        wnjax.keep_norms().update({"kernel": jnp.ones((3, 2))}, optax.EmptyState())


# What plain gradient descent does to lengths: the reason for keeping them.


def quadratic(tree, target):
    return jnp.sum((wnjax.fold(tree)["w"] - target) ** 2)


@pytest.mark.usefixtures("x64")
def test_sgd_never_shortens_v_and_pythagoras_holds():
    target, w = (jax.random.normal(jax.random.key(i), (6, 5), jnp.float64) for i in (0, 1))
    tree = wnjax.weight_norm({"w": w}, {"w": 1})
    for _ in range(50):
        grads = jax.grad(quadratic)(tree, target)
        new = jax.tree.map(lambda p, g: p - 0.1 * g, tree, grads)
        before, after, step = (
            jnp.sum(x**2, 0) for x in (tree["w"].v, new["w"].v, new["w"].v - tree["w"].v)
        )
        assert (after >= before * (1 - 1e-15)).all()
        np.testing.assert_allclose(after, before + step, rtol=1e-12)
        tree = new


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("c", [0.1, 7.0])
def test_sgd_on_a_longer_v_is_sgd_at_a_smaller_rate(c):
    """SGD on (c·v, c²·lr) is SGD on (v, lr), for the directions."""
    target, w = (jax.random.normal(jax.random.key(i), (6, 5), jnp.float64) for i in (0, 1))
    tree = wnjax.weight_norm({"w": w}, {"w": 1})
    longer = {"w": tree["w"]._replace(v=c * tree["w"].v)}
    for _ in range(30):
        grads, longer_grads = jax.grad(quadratic)(tree, target), jax.grad(quadratic)(longer, target)
        rates = wnjax.WeightNorm(0.05, 0.05), wnjax.WeightNorm(0.05, 0.05 * c**2)
        tree, longer = (
            {"w": jax.tree.map(lambda p, g, r: p - r * g, t["w"], gs["w"], rate)}
            for t, gs, rate in zip((tree, longer), (grads, longer_grads), rates, strict=True)
        )
        np.testing.assert_allclose(wnjax.fold(longer)["w"], wnjax.fold(tree)["w"], rtol=1e-10)
        np.testing.assert_allclose(longer["w"].v, c * tree["w"].v, rtol=1e-10)
