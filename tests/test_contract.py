"""One contract for every transform of a parameter tree, on every kind of tree.

A new transform joins by one entry in `TRANSFORMS`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.test_util import check_grads

import wnjax
from tests import toys


class Transform(NamedTuple):
    """A function of one tree, what makes its input from plain parameters, and the truth."""

    fn: Callable[[Any], Any]
    prepare: Callable[[Any], Any]
    kernel: Callable[[np.ndarray], list[np.ndarray]]  # of a plain kernel: what fn gives for it


def log_weight_norm(params):
    return wnjax.weight_norm(params, log_scale=True)


def off_start(normalize):
    """(g, v) leaves with half the gain and three times the v that normalizing gives."""

    def prepare(params):
        tree = normalize(params)
        half = {"g": lambda g: g - math.log(2) if normalize is log_weight_norm else g / 2}
        change = half | {"v": lambda v: 3 * v, "other": lambda x: x}
        return jax.tree.map(lambda label, x: change[label](x), wnjax.labels(tree), tree)

    return prepare


@wnjax.wrap
def sums(params):
    """A matrix product with one row of ones: smaller than the kernel, so that its scale rides."""

    def total(p):
        return np.ones((1, p.shape[0]), p.dtype) @ p if p.ndim == 2 else jnp.copy(p)

    return jax.tree.map(total, params)


def half_sums(w):
    return [w.sum(0, keepdims=True) / 2]


def norm(w):
    return np.sqrt((w.astype(np.float64) ** 2).sum(0, keepdims=True))


def stepped(optimizer):
    """The parameters after one step, with gradients of 1/2 for all kernels and 0 for the rest."""

    def fn(params):
        grads = jax.tree.map(lambda p: jnp.full_like(p, 0.5 if p.ndim == 2 else 0), params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return jax.tree.map(lambda p, u: p + u, params, updates)

    return fn


def stepped_kernel(w):
    """A kernel after a step of g and v at rate 1/10, from g = ‖w‖ and v = w."""
    along = (0.5 * w / norm(w)).sum(0, keepdims=True)
    g, v = norm(w) - 0.1 * along, w - 0.1 * (0.5 - along * w / norm(w))
    return g * v / norm(v)


def turned_kernel(w):
    """A kernel after a plain step at rate 1/10, at the length that it had."""
    return (w - 0.05) * norm(w) / norm(w - 0.05)


TRANSFORMS = {
    "weight_norm": Transform(wnjax.weight_norm, lambda p: p, lambda w: [norm(w), w]),
    "weight_norm_log": Transform(log_weight_norm, lambda p: p, lambda w: [np.log(norm(w)), w]),
    "fold": Transform(wnjax.fold, off_start(wnjax.weight_norm), lambda w: [w / 2]),
    "fold_log": Transform(wnjax.fold, off_start(log_weight_norm), lambda w: [w / 2]),
    "wrap": Transform(sums, off_start(wnjax.weight_norm), lambda w: [w.sum(0, keepdims=True) / 2]),
    "wrap_log": Transform(
        sums, off_start(log_weight_norm), lambda w: [w.sum(0, keepdims=True) / 2]
    ),
    "weight_normalized": Transform(
        stepped(wnjax.weight_normalized(optax.sgd(0.1))),
        lambda p: p,
        lambda w: [stepped_kernel(w.astype(np.float64))],
    ),
    "keep_norms": Transform(
        stepped(optax.chain(optax.sgd(0.1), wnjax.keep_norms())),
        lambda p: p,
        lambda w: [turned_kernel(w.astype(np.float64))],
    ),
    "norms": Transform(
        wnjax.norms,
        off_start(wnjax.weight_norm),
        lambda w: [norm(w) / 2, np.full_like(norm(w), 1 / 6), 3 * norm(w)],
    ),
}

pytestmark = [
    pytest.mark.parametrize("name", TRANSFORMS),
    pytest.mark.parametrize("tree", toys.TREES),
]


def case(name, tree, place=jnp.copy):
    """The function and a fresh input, made from parameters that `place` has put somewhere."""
    fn, prepare, _ = TRANSFORMS[name]
    return fn, prepare(jax.tree.map(place, toys.TREES[tree]()))


def assert_equal(actual, expected, rtol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=rtol)
    chex.assert_trees_all_equal_dtypes(actual, expected)


def test_values(name, tree):
    """Against numpy in float64."""
    fn, params = case(name, tree)
    expected = []
    for leaf in map(np.asarray, jax.tree.leaves(toys.TREES[tree]())):
        others = [] if name == "norms" else [leaf]
        expected += TRANSFORMS[name].kernel(leaf) if leaf.ndim == 2 else others
    for actual, value in zip(jax.tree.leaves(fn(params)), expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")  # such as g in fold
def test_jit_compiles_once_and_takes_donated_input(name, tree):
    fn, params = case(name, tree)
    expected = fn(params)
    chex.clear_trace_counter()
    jitted = jax.jit(chex.assert_max_traces(fn, 1), donate_argnums=0)
    for _ in range(2):
        _, fresh = case(name, tree)
        assert_equal(jitted(fresh), expected)


def test_input_is_left_alone(name, tree):
    fn, params = case(name, tree)
    before = jax.tree.map(np.array, jax.tree.leaves(params))
    fn(params)
    chex.assert_trees_all_equal(jax.tree.leaves(params), before)


def test_bfloat16(name, tree):
    fn = TRANSFORMS[name].fn
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), toys.TREES[tree]())
    low = TRANSFORMS[name].prepare(low)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(fn(low))}
    assert dtypes <= {"bfloat16", "float32"}
    if name.startswith(("fold", "wrap")):
        assert dtypes == {"bfloat16"}
    chex.assert_trees_all_close(
        *(
            jax.tree.map(lambda x: x.astype(jnp.float32), jax.tree.leaves(fn(t)))
            for t in (low, wide)
        ),
        # With wrap, the product is rounded, then scaled; with a step, the update, then the sum.
        rtol=2**-8 if name.startswith(("weight_norm", "fold", "norms")) else 2**-7,
        atol=2**-9 if name in ("weight_normalized", "keep_norms") else 0,
    )


def test_vmap_equals_a_loop(name, tree):
    fn, params = case(name, tree)
    members = [params, jax.tree.map(lambda p: 1 - 2 * p, params)]
    stack = partial(jax.tree.map, lambda *members: jnp.stack(members))
    assert_equal(jax.jit(jax.vmap(fn))(stack(*members)), stack(*map(jax.jit(fn), members)))


def test_derivatives_equal_finite_differences(name, tree, x64):
    fn, params = case(name, tree)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)

    @jax.jit
    def total(params):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(fn(params)))

    check_grads(total, (params,), order=1, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6)


def test_shard_map_over_features(name, tree):
    fn, params = case(name, tree)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def specs(tree):
        return jax.tree.map(lambda x: jax.P(*[None] * (x.ndim - 1), "x"), tree)

    sharded = jax.shard_map(
        fn, mesh=mesh, in_specs=(specs(params),), out_specs=specs(jax.eval_shape(fn, params))
    )
    assert_equal(jax.jit(sharded)(params), fn(params))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_jit_on_sharded_arrays(name, tree, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))

    def shard(x):  # the fan-in axis of the second kernel, the features of the rest
        spec = ["x", None] if x.shape == (8, 16) else [*[None] * (x.ndim - 1), "x"]
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

    fn, params = case(name, tree)
    _, sharded = case(name, tree, place=shard)
    assert_equal(jax.jit(fn)(sharded), fn(params))
    assert_equal(fn(sharded), fn(params))


def test_pmap(name, tree):
    fn, params = case(name, tree)
    replicas = jax.tree.map(lambda p: jnp.stack([p] * 8), params)
    expected = jax.tree.map(lambda x: jnp.stack([x] * 8), fn(params))
    assert_equal(jax.pmap(fn)(replicas), expected)
