"""Views of a tree: summaries, labels, norms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnjax
from tests import toys
from wnjax import NotWeight, Weight


def test_summary_of_gv_leaves():
    params = {
        "attention": {"query": {"kernel": jnp.ones((4, 2, 3), jnp.bfloat16)}},
        "bias": jnp.ones(4),
        "embedding": jnp.ones((1000, 4)),
        "log": wnjax.LogWeightNorm(jnp.zeros((1, 5)), jnp.ones((3, 5))),
        "steps": jnp.arange(3),
    }
    params["attention"] = wnjax.weight_norm(params["attention"])
    assert wnjax.summary(params).splitlines() == [
        "leaf                    shape      dtype     normalized",
        "attention/query/kernel  (4, 2, 3)  bfloat16  6 neurons, norm over axes (0,)",
        "bias                    (4,)       float32   no: a single axis",
        "embedding               (1000, 4)  float32   no: not chosen by the axes",
        "log                     (3, 5)     float32   5 neurons, norm over axes (0,), log scale",
        "steps                   (3,)       int32     no: not floating-point",
        "2 of 5 leaves normalized: 11 neurons, 39 of 4,046 numbers",
    ]


@pytest.mark.parametrize("tree", toys.TREES)
def test_summary_is_the_same_for_every_container(tree):
    lines = wnjax.summary(wnjax.weight_norm(toys.TREES[tree]())).splitlines()
    assert lines[2] == "first/kernel   (3, 8)   float32  8 neurons, norm over axes (0,)"
    assert lines[-1] == "2 of 4 leaves normalized: 24 neurons, 152 of 176 numbers"


def test_summary_of_decisions():
    tree = {
        "a": {"kernel": Weight((1,), bias="a/bias"), "bias": NotWeight("bias")},
        "b": Weight((0, 2)),
    }
    assert wnjax.summary(tree).splitlines() == [
        "leaf      neuron",
        "a/bias    no: bias",
        "a/kernel  feature axes (1,), bias a/bias",
        "b         feature axes (0, 2)",
        "2 of 3 leaves are weights of neurons",
    ]


def test_summary_of_plain_and_abstract_trees():
    assert "0 of 4 leaves normalized" in wnjax.summary(toys.mlp_params())
    abstract = jax.eval_shape(wnjax.weight_norm, toys.mlp_params())
    assert wnjax.summary(abstract) == wnjax.summary(wnjax.weight_norm(toys.mlp_params()))


def test_summary_of_leaves_that_are_no_arrays():
    tree = {"activation": jnp.tanh, "kernel": jnp.ones((2, 2)), "key": jax.random.key(0)}
    lines = wnjax.summary(wnjax.weight_norm(tree)).splitlines()
    assert lines[1].endswith("  no: not an array")
    assert lines[3].endswith("  no: not floating-point")


@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize("tree", toys.TREES)
def test_labels_have_the_structure_of_the_tree(tree, log_scale):
    params = wnjax.weight_norm(toys.TREES[tree](), log_scale=log_scale)
    labels = wnjax.labels(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert jax.tree.leaves(labels) == ["other", "g", "v"] * 2


@pytest.mark.parametrize("tree", toys.TREES)
def test_labels_freeze_g(tree):
    params = wnjax.weight_norm(toys.TREES[tree]())
    optimizer = optax.multi_transform(
        {"g": optax.set_to_zero(), "v": optax.sgd(0.1), "other": optax.sgd(0.1)}, wnjax.labels
    )
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params))
    moved = jax.tree.map(lambda update: bool((update != 0).all()), updates)
    expected = jax.tree.map(lambda label: label != "g", wnjax.labels(params))
    assert jax.tree.leaves(moved) == jax.tree.leaves(expected)


@pytest.mark.parametrize("kind", ["(g, v) leaves in a dict", "(g, v) leaves in boxes", "log scale"])
def test_norms(kind):
    v = jnp.array([[3.0, 0.0], [4.0, 2.0]])
    tree = {"kernel": v, "bias": jnp.ones(2)}
    tree = toys.boxed(tree) if kind == "(g, v) leaves in boxes" else tree
    tree = wnjax.weight_norm(tree, log_scale=kind == "log scale")
    norms = jax.jit(wnjax.norms)(tree)
    assert set(norms) == {"kernel"}
    for name, expected in {"v": [[5, 2]], "g": [[5, 2]], "scale": [[1, 1]]}.items():
        np.testing.assert_allclose(norms["kernel"][name], expected, rtol=1e-6)
