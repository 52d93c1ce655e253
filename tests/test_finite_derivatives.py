"""Derivatives of all public functions at neurons that have no length, or one out of range.

First and second ones, and those through a step of an optimizer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnjax

NEURONS = {
    "zeros": [0.0, 0.0, 0.0],
    "constant": [0.5, 0.5, 0.5],
    "tiny": [1e-30, -1e-30, 1e-30],
    "huge": [1e30, 1e30, -1e30],
    "mixed": [0.0, 1e-30, 2.0],
    "mixed_huge": [1e30, 1e-30, 0.0],
}


def stepped(optimizer):
    """The kernel after two steps; the second reads the directions that the first one made."""

    def fn(w):
        params = {"kernel": w}
        state = optimizer.init(params)
        for _ in range(2):
            # The derivative of tanh: bounded, and with it its own derivatives.
            grads = jax.tree.map(lambda p: 1 - jnp.tanh(p) ** 2, params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params["kernel"]

    return fn


def gv(w):
    return {"kernel": wnjax.WeightNorm(jnp.full((1, w.shape[1]), 1.5), w)}


def stepped_gv_leaf(w):
    normalized_params = gv(w)
    updates, _ = wnjax.keep_norms().update(
        jax.tree.map(jnp.sin, normalized_params), optax.EmptyState(), normalized_params
    )
    return jax.tree.leaves(optax.apply_updates(normalized_params, updates))


def normalized(w, **options):
    return jax.tree.leaves(wnjax.weight_norm({"kernel": w}, **options))


KINDS = ("value", "first", "second", "forward over reverse")
X = np.array([[1.0, -2.0, 0.5]], np.float32)

INNER = wnjax.weight_normalized(optax.sgd(0.1))
FUNCTIONS = {  # of a kernel
    "fold": lambda w: wnjax.fold(gv(w))["kernel"],
    "weight_norm": normalized,
    "log_weight_norm": lambda w: normalized(w, log_scale=True),
    "fold_of_weight_norm": lambda w: wnjax.fold(wnjax.weight_norm({"kernel": w}))["kernel"],
    "wrap": lambda w: wnjax.wrap(lambda p, x: x @ p["kernel"])(gv(w), X),
    "norms": lambda w: list(wnjax.norms(gv(w))["kernel"].values()),
    "weight_normalized": stepped(wnjax.weight_normalized(optax.sgd(0.1))),
    "weight_normalized_remainder": stepped(wnjax.weight_normalized(optax.sgd(0.1), remainder=True)),
    "keep_norms": stepped(optax.chain(optax.sgd(0.1), wnjax.keep_norms())),
    "keep_norms_of_gv_leaves": stepped_gv_leaf,
    "inner_params": lambda w: jax.tree.leaves(
        wnjax.inner_params(INNER.init({"kernel": w}), {"kernel": w})
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives_are_finite(name):
    def total(w):
        # The sine keeps what is large from being multiplied by what is large.
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(FUNCTIONS[name](w)))

    @jax.jit
    def derivatives(w):
        first = jax.grad(total)
        second = jax.grad(lambda w: jnp.sum(jnp.sin(first(w))))
        forward = jax.jvp(first, (w,), (jnp.ones_like(w),))[1]
        return total(w), first(w), second(w), forward

    for neuron, values in NEURONS.items():
        w = jnp.stack([jnp.array(values), jnp.array([0.3, -0.4, 1.2])], axis=1)
        found = dict(zip(KINDS, derivatives(w), strict=True))
        if neuron == "tiny" and name in ("weight_norm", "log_weight_norm"):
            # v is w/1e-30: sin(v) has second derivatives of 1e60, and log g of -1e60.
            found = {kind: found[kind] for kind in ("value", "first")}
        for kind, x in found.items():
            assert np.isfinite(x).all(), f"{kind} of {name} at {neuron}: {x}"


@pytest.mark.parametrize("kept", ["weight_normalized", "keep_norms"])
def test_through_a_step_from_zeros_they_are_those_of_a_plain_step(kept):
    x = jnp.array([[1.0, 2.0], [0.5, -1.0]])

    def loss(params):
        return jnp.mean((x @ params["kernel"] - 1) ** 2)

    def after_a_step(optimizer):
        def fn(params):
            updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
            return loss(optax.apply_updates(params, updates))

        return jax.jit(jax.grad(fn))({"kernel": jnp.zeros((2, 1))})["kernel"]

    optimizer = {
        "weight_normalized": wnjax.weight_normalized(optax.sgd(0.1)),
        "keep_norms": optax.chain(optax.sgd(0.1), wnjax.keep_norms()),
    }[kept]
    np.testing.assert_allclose(
        after_a_step(optimizer), after_a_step(optax.sgd(0.1)), rtol=1e-6, atol=1e-6
    )
