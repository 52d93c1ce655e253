"""The forms of the `axes` argument, and what is said when one does not fit."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import wnjax
from tests import toys
from wnjax import NotWeight, Weight

PARAMS = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "ids": jnp.arange(6)}


def gain_shapes(params, axes):
    """From the path of every normalized leaf to the shape of its g."""
    normalized = wnjax.norms(wnjax.weight_norm(params, axes))
    return {path: gv["g"].shape for path, gv in normalized.items()}


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("dense/kernel", (3, 4), (1, 4)),
        ("dense/kernel", (4,), None),
        ("dense/weight", (3, 4), None),
        ("kernel/embedding", (3, 4), None),
        ("my_kernel", (3, 4), None),
        ("query/kernel", (4, 2, 3), (1, 2, 3)),
        ("key/kernel", (4, 2, 3), (1, 2, 3)),
        ("value/kernel", (4, 2, 3), (1, 2, 3)),
        ("value/kernel", (4, 3), (1, 3)),
        ("out/kernel", (2, 3, 4), (1, 1, 4)),
    ],
)
def test_flax_naming_rules(path, shape, expected):
    params = {"other": {"kernel": jnp.ones((2, 2))}}
    *modules, name = path.split("/")
    inner = {name: jnp.ones(shape)}
    for module in reversed(modules):
        inner = {module: inner}
    assert gain_shapes(params | inner, None).get(path) == expected


@pytest.mark.parametrize("tree", toys.TREES)
@pytest.mark.parametrize(
    "axes",
    [
        {".*/bias": None, "first/kernel": -1},
        {"first/kernel": 1},
        {"first/.*l": (1,), ".*/kernel": None},
        lambda path, leaf: 1 if path == "first/kernel" and leaf.shape == (3, 8) else None,
        {"first/kernel": [-1]},
    ],
)
def test_patterns_and_callables_choose_one_leaf(tree, axes):
    assert gain_shapes(toys.TREES[tree](), axes) == {"first/kernel": (1, 8)}


@pytest.mark.parametrize(
    ("feature_axes", "expected"),
    [
        (0, (2, 1, 1)),
        (-1, (1, 1, 4)),
        ((0, -1), (2, 1, 4)),
        ((-1, 0), (2, 1, 4)),
        ((), (1, 1, 1)),
    ],
)
def test_feature_axes(feature_axes, expected):
    assert gain_shapes({"w": jnp.ones((2, 3, 4))}, {"w": feature_axes}) == {"w": expected}


def test_first_match_wins():
    axes = {"first/.*": None, ".*/kernel": -1}
    assert gain_shapes(toys.mlp_params(), axes) == {"second/kernel": (1, 16)}


def test_a_none_for_all_the_rest_may_have_no_rest():
    axes = {".*/kernel": -1, ".*/bias": None, ".*": None}
    assert len(gain_shapes(toys.mlp_params(), axes)) == 2


@pytest.mark.parametrize("tree", toys.TREES)
def test_tree_of_neurons(tree):
    params = toys.TREES[tree]()

    def decision(path, leaf):
        is_first = jax.tree_util.keystr(path, simple=True, separator="/").startswith("first/kernel")
        return Weight(feature_axes=(0,)) if is_first else NotWeight("not now")

    axes = jax.tree_util.tree_map_with_path(decision, params)
    assert gain_shapes(params, axes) == {"first/kernel": (3, 1)}


def test_tree_of_neurons_may_be_of_another_container():
    params = toys.mlp_params()
    axes = freeze(jax.tree.map(lambda p: Weight(-1) if p.ndim == 2 else NotWeight("bias"), params))
    assert len(gain_shapes(params, axes)) == 2


@pytest.mark.parametrize("tree", ["dict", "nnx_state"])
@pytest.mark.parametrize("form", ["weight_norm", "weight_normalized", "keep_norms"])
def test_tree_of_neurons_of_the_whole_serves_for_a_part(form, tree):
    whole = toys.TREES[tree]()
    axes = jax.tree.map(lambda p: Weight(0) if p.ndim == 2 else NotWeight("bias"), whole)
    part = (
        {"first": whole["first"]}
        if tree == "dict"
        else nnx.filter_state(whole, nnx.PathContains("first"))
    )
    if form == "weight_norm":
        assert gain_shapes(part, axes) == {"first/kernel": (3, 1)}
        return
    optimizer = (
        wnjax.keep_norms(axes)
        if form == "keep_norms"
        else wnjax.weight_normalized(optax.trace(0.0), axes)
    )
    # A step along w: no direction changes.
    updates, _ = optimizer.update(part, optimizer.init(part), part)
    (kernel,) = [x for x in jax.tree.leaves(part) if x.ndim == 2]
    (update,) = [x for x in jax.tree.leaves(updates) if x.ndim == 2]
    factor = {"keep_norms": 0, "weight_normalized": 1}[form]
    np.testing.assert_allclose(update, factor * kernel, rtol=1e-5, atol=1e-6)


def test_axes_of_a_whole_model_serve_an_optimizer_of_some_of_its_params():
    model = toys.TwoLayers(nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    axes = wnjax.infer_axes(lambda p, x: nnx.merge(graphdef, p)(x))(params, jnp.ones((5, 3)))
    wrt = nnx.All(nnx.Param, nnx.PathContains("first"))
    optimizer = nnx.Optimizer(model, wnjax.weight_normalized(optax.sgd(0.1), axes), wrt=wrt)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((5, 3)))), argnums=nnx.DiffState(0, wrt))(model)
    optimizer.update(model, grads)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert (after["rest"][0]["kernel"] == before["rest"][0]["kernel"]).all()
    assert (after["first"]["kernel"] != before["first"]["kernel"]).any()


def test_tree_of_neurons_may_be_callable():
    """An Equinox module is one."""
    model = eqx.filter(eqx.nn.Linear(3, 4, key=jax.random.key(0)), eqx.is_array)
    axes = jax.tree.map(lambda x: Weight(0) if x.ndim == 2 else NotWeight("bias"), model)
    assert callable(axes)
    assert gain_shapes(model, axes) == {"weight": (4, 1)}


def test_a_single_array_is_a_tree():
    assert wnjax.weight_norm(jnp.ones((3, 4)), lambda path, leaf: -1).g.shape == (1, 4)


@pytest.mark.parametrize(
    ("axes", "error", "text"),
    [
        (
            {"dense/kernal": -1},
            ValueError,
            r"the pattern 'dense/kernal' matches no leaf \(.*Near paths:\n  dense/kernel\n",
        ),
        ({"kernel": -1}, ValueError, r"'kernel' matches no leaf \(it must match the whole"),
        ({"(": -1}, ValueError, r"'\(' is not a regular expression: missing \)"),
        ({3: -1}, ValueError, "3 is not a regular expression: give it as a string"),
        (
            {"dense/kernel": 2},
            ValueError,
            r"^dense/kernel of shape \(3, 4\): feature axis 2 is out of range for 2 axes",
        ),
        (
            {"dense/kernel": -3},
            ValueError,
            r"^dense/kernel of shape \(3, 4\): feature axis -3 is out of range for 2 axes",
        ),
        (
            {"dense/kernel": (0, 1)},
            ValueError,
            r"^dense/kernel of shape \(3, 4\): .* leave no fan-in axis .*give None to keep",
        ),
        ({"dense/.*": -1}, ValueError, r"^dense/bias of shape \(4,\).*no fan-in axis"),
        ({"dense/kernel": (1, -1)}, ValueError, "dense/kernel.*name an axis twice"),
        (
            {".*": None, "dense/kernel": -1},
            ValueError,
            "the pattern 'dense/kernel' never applies, since the first match wins.*before them",
        ),
        ({"dense/kernel": True}, TypeError, "dense/kernel.*an int or a tuple of ints, got True"),
        ({re.compile("dense/k"): -1, re.compile("b"): 0}, ValueError, "give it as a string"),
        ({"dense/kernel": 1.0}, TypeError, "dense/kernel.*an int or a tuple of ints, got 1.0"),
        ({"dense/kernel": "1"}, TypeError, "dense/kernel.*tuple of ints, got '1'"),
        ({"ids": ()}, TypeError, "^ids has dtype int32; only floating-point.*None for its path"),
        ({".*": None}, ValueError, "no leaf is a weight.*\n  dense/bias: the pattern '.*' says"),
        (lambda path, leaf: None, ValueError, "no leaf is a weight; pass axes to choose them"),
        ("kernel", TypeError, "axes must be None, a dict .*got 'kernel'"),
        (3, TypeError, "axes must be None"),
        (
            {"dense": {"kernel": Weight(-1), "bias": NotWeight("bias")}},
            ValueError,
            "the tree says nothing of these leaves:\n  ids$",
        ),
        (
            {"more": Weight(-1)},
            ValueError,
            "the tree says nothing of these leaves:\n  dense/bias\n  dense/kernel\n  ids$",
        ),
        (
            {"dense": {"kernel": Weight(-1), "bias": 0}, "ids": NotWeight("ids")},
            TypeError,
            "dense/bias must be a Weight or a NotWeight, got 0",
        ),
    ],
)
def test_errors(axes, error, text):
    with pytest.raises(error, match=text):
        wnjax.weight_norm(PARAMS, axes)


def test_empty_feature_axes_need_an_axis_to_sum_over():
    with pytest.raises(ValueError, match=r"^scale of shape \(\): .* leave no fan-in axis"):
        wnjax.weight_norm({"scale": jnp.ones(())}, axes={"scale": ()})


def test_nothing_matched():
    with pytest.raises(
        ValueError,
        match=r"no leaf is a weight; pass axes.*\n  bias: not named kernel\n  kernel: has 1 axes",
    ):
        wnjax.weight_norm({"kernel": jnp.ones(3), "bias": jnp.ones(3)})


def test_long_lists_are_cut():
    params = {f"layer{i:02}": jnp.ones(3) for i in range(20)}
    with pytest.raises(ValueError, match=r"layer07: not named kernel\n  \.\.\. and 12 more$"):
        wnjax.weight_norm(params)
