"""`wnjax.convert` against the libraries that it converts from: outputs, and an optimizer's step."""

from functools import partial

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import pytest
from flax.core import freeze

import wnjax
from tests.toys import train
from wnjax.convert import from_dicts, from_equinox, from_paramax

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (5, 3))
RATE = 0.1
close = partial(chex.assert_trees_all_close, rtol=2e-6, atol=2e-6)


def shaken(tree):
    """Every array of a tree moved off where it was initialized, as training does."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)
    moved = [x + jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype) for x in leaves]
    return treedef.unflatten(moved)


def eqx_loss(unwrap):
    """The loss of a model's arrays; the rest of it, such as activations, is no parameter."""

    def loss(params, static, x):
        return jnp.mean((jax.vmap(unwrap(eqx.combine(params, static)))(x) - 1) ** 2)

    return loss


def eqx_stepped(model, x, unwrap):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    params = train(optax.sgd(RATE), lambda params: eqx_loss(unwrap)(params, static, x), params, 1)
    return eqx.combine(params, static)


EQUINOX = {
    "linear": (lambda key: eqx.nn.Linear(3, 4, key=key), 0, (3,)),
    "whole": (lambda key: eqx.nn.Linear(3, 4, key=key), None, (3,)),
    "inputs": (lambda key: eqx.nn.Linear(3, 4, key=key), 1, (3,)),
    "conv": (lambda key: eqx.nn.Conv2d(2, 4, 3, key=key), 0, (2, 5, 5)),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_equinox_computes_the_same_and_trains_alike(name):
    make, axis, shape = EQUINOX[name]
    old = eqx.nn.Sequential([eqx.nn.WeightNorm(make(KEY), axis=axis), eqx.nn.Lambda(jax.nn.tanh)])
    old = eqx.tree_at(lambda m: m[0].g, old, 2 * old[0].g)
    new = from_equinox(old)
    x = jax.random.normal(KEY, (6, *shape))
    assert isinstance(new[0].weight, wnjax.WeightNorm)
    close(jax.vmap(wnjax.fold(new))(x), jax.vmap(old)(x))

    actual = eqx_stepped(new, x, wnjax.fold)
    expected = from_equinox(eqx_stepped(old, x, lambda model: model))
    close(*(eqx.filter(m, eqx.is_array) for m in (actual, expected)))


def test_equinox_stacked_layers():
    make = eqx.filter_vmap(lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=key)))
    old = make(jax.random.split(KEY, 5))
    new = from_equinox(old)
    assert new.weight.g.shape == (5, 4, 1)
    run = eqx.filter_vmap(lambda layer: jax.vmap(layer)(X))
    close(run(wnjax.fold(new)), run(old))


def test_equinox_errors():
    layer = eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=KEY))
    with pytest.raises(ValueError, match=r"found no equinox.nn.WeightNorm .*\n  weight\n  bias"):
        from_equinox(layer.layer)
    with pytest.raises(ValueError, match="a/0: a WeightNorm inside another"):
        from_equinox({"a": [eqx.nn.WeightNorm(layer, "g")]})
    with pytest.raises(ValueError, match="a: g should be an array, but is a NoneType"):
        from_equinox({"a": eqx.partition(layer, eqx.is_array)[1]})


def paramax_model():
    mlp = eqx.nn.MLP(3, 4, 5, 1, key=KEY)
    return eqx.tree_at(
        lambda m: [layer.weight for layer in m.layers],
        mlp,
        [paramax.WeightNormalization(layer.weight) for layer in mlp.layers],
    )


def test_paramax_computes_the_same():
    old = paramax_model()
    new = from_paramax(old)
    assert new.layers[0].weight.g.shape == (5, 1)
    run = jax.vmap(wnjax.fold(new))(X), jax.vmap(paramax.unwrap(old))(X)
    close(*run)


def test_paramax_step_is_that_of_another_parameter_of_the_length():
    """As in paramax for v; the gradient of the scale there is that of g times softplus′."""
    old = paramax_model()
    new = from_paramax(old)
    before = old.layers[0].weight.scale.args[0]
    actual = eqx_stepped(new, X, wnjax.fold).layers[0].weight
    expected = eqx_stepped(old, X, paramax.unwrap).layers[0].weight
    close(actual.v, expected.weight)
    change = (actual.g - new.layers[0].weight.g) * jax.nn.sigmoid(before)
    close(change, expected.scale.args[0] - before)


def test_paramax_wrappers_around_a_gv_leaf_stay():
    weight = paramax.WeightNormalization(X)
    old = {"frozen": paramax.NonTrainable(weight), "exp": paramax.Parameterize(jnp.exp, weight)}
    new = from_paramax(old)
    assert isinstance(new["frozen"], paramax.NonTrainable)
    close(paramax.unwrap(wnjax.fold(new)), paramax.unwrap(old))


def test_paramax_scales_of_other_kinds():
    old = paramax.WeightNormalization(X)
    old = eqx.tree_at(lambda w: w.scale, old, paramax.Parameterize(jnp.exp, X[:, :1]))
    close(wnjax.fold(from_paramax(old)), paramax.unwrap(old))
    old = eqx.tree_at(lambda w: w.scale, old, X[:, :1])
    close(wnjax.fold(from_paramax(old)), paramax.unwrap(old))


def test_paramax_errors():
    masked = paramax.WeightNormalization(paramax.Parameterize(jnp.tril, X))
    frozen = paramax.non_trainable(paramax.WeightNormalization(X))
    for wrapped in (masked, frozen):
        with pytest.raises(ValueError, match="a: a wrapper inside the WeightNormalization"):
            from_paramax({"a": wrapped})
    with pytest.raises(ValueError, match=r"found no paramax.WeightNormalization .*\n  a"):
        from_paramax({"a": X})


def gv_dict(g=(1, 3), v=(5, 3), gain="g", dtype=np.float32):
    return {gain: np.ones(g, np.float32), "v": np.ones(v, dtype)}


def test_dicts_become_gv_leaves():
    tree = {"a": [gv_dict(), {"bias": X}], "b": freeze(gv_dict(gain="log_g"))}
    normalized_params = from_dicts(tree)
    assert isinstance(normalized_params["a"][0], wnjax.WeightNorm)
    assert isinstance(normalized_params["b"], wnjax.LogWeightNorm)
    assert normalized_params["a"][0].v is tree["a"][0]["v"]
    assert normalized_params["a"][1]["bias"] is X


def test_modules_that_are_called_g_and_v_stay():
    modules = {"g": {"kernel": gv_dict()}, "v": {"kernel": gv_dict()}}
    normalized_params = from_dicts(modules)
    assert set(normalized_params) == {"g", "v"}
    assert isinstance(normalized_params["v"]["kernel"], wnjax.WeightNorm)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": X}, r"found no dict of a \(g, v\) leaf .*\n  a"),
        ({"m": gv_dict(g=(3,))}, r"m: g of shape \(3,\) does not fit v"),
        ({"m": gv_dict(g=(1, 4))}, r"m: g of shape \(1, 4\) does not fit v"),
        ({"m": gv_dict((3,), (3,))}, "m has the keys of a WeightNorm, but g has no axis"),
        ({"m": gv_dict((), (), "log_g")}, "m has the keys of a LogWeightNorm, but log_g has no"),
        ({"m": gv_dict(dtype=np.int32)}, "m has the keys of a WeightNorm, .* int32"),
        ({"m": gv_dict() | {"v": {"kernel": X}}}, "m: v should be an array, but is a dict"),
        ({"m": gv_dict() | {"v": None}}, "m: v should be an array, but is a NoneType"),
    ],
)
def test_what_only_looks_like_a_gv_leaf_is_refused(tree, message):
    with pytest.raises(ValueError, match=message.replace("\n", "\\n")):
        from_dicts(tree)
