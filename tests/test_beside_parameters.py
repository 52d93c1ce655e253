"""Trees with more than parameters in them: the variables of Linen modules, the states of NNX's."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import wnjax

X = jax.random.normal(jax.random.key(1), (200, 3))


class Linen(nn.Module):
    """A layer with batch norm before its activation."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x)))


class NNX(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.dense(x)))


def linen():
    model = Linen()
    return model.apply, model.init(jax.random.key(0), X)


def of_nnx():
    graphdef, state = nnx.split(NNX(nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graphdef, state)(x), state


def told(axes):
    """By path, what is said of every leaf."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(
        axes, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.get_value()
        if isinstance(x, nnx.Variable)
        else x
        for path, x in pairs
    }


def test_collections_beside_params_hold_no_weights():
    fn, variables = linen()
    found = wnjax.infer_axes(fn, strict=True)(variables, X)
    alone = wnjax.infer_axes(lambda p, x: fn({**variables, "params": p}, x))(variables["params"], X)
    assert told(found["params"]) == {
        path: dataclasses.replace(what, bias=what.bias and f"params/{what.bias}")
        if isinstance(what, wnjax.Weight)
        else told(found["params"])[path]
        for path, what in told(alone).items()
    }
    assert found["params"]["Dense_0"]["kernel"].bias == "params/Dense_0/bias"
    for what in told(found["batch_stats"]).values():
        assert what.reason == "not a parameter: in the collection batch_stats"
        assert what.is_understood
        assert what.shape == (4,)


def test_variables_of_nnx_that_are_no_parameters():
    fn, state = of_nnx()
    found = told(wnjax.infer_axes(fn, strict=True)(state, X))
    assert {path for path, what in found.items() if isinstance(what, wnjax.Weight)} == {
        "dense/kernel"
    }
    assert found["dense/kernel"].bias == "dense/bias"
    for path in ("norm/mean", "norm/var"):
        assert found[path].reason == "not a parameter: in the collection batch_stats"
        assert found[path].is_understood


@pytest.mark.parametrize("make", [linen, of_nnx], ids=["linen", "nnx"])
def test_initialization_from_data_leaves_statistics_alone(make):
    """A running mean is taken from the sums where a bias is added to them."""
    fn, tree = make()
    after = wnjax.data_init(fn)(tree, X)
    if make is linen:
        chex.assert_trees_all_equal(after["batch_stats"], tree["batch_stats"])
        kernel = after["params"]["Dense_0"]["kernel"]
        assert (kernel != tree["params"]["Dense_0"]["kernel"]).all()
    else:
        stats = (nnx.state(x, nnx.BatchStat) for x in (after, tree))
        chex.assert_trees_all_equal(*map(nnx.to_pure_dict, stats))
        assert (after["dense"]["kernel"][...] != tree["dense"]["kernel"][...]).all()


STATS = {"layer": {"kernel": jnp.ones((3, 4))}}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["batch_stats", "cache", "intermediates", "perturbations"])
def test_naming_rules_normalize_parameters_alone(name, inside):
    tree = {"params": STATS, name: STATS}
    tree, path = ({"generator": tree}, "generator/") if inside else (tree, "")
    assert list(wnjax.norms(wnjax.weight_norm(tree))) == [f"{path}params/layer/kernel"]


def test_naming_rules_normalize_nnx_params_alone():
    state = nnx.State({"a": {"kernel": nnx.Param(jnp.ones((3, 4)))}})
    others = {"b": {"kernel": nnx.BatchStat(jnp.ones((3, 4)))}}
    both = nnx.merge_state(state, nnx.State(others))
    assert list(wnjax.norms(wnjax.weight_norm(both))) == ["a/kernel"]


def test_a_module_may_have_the_name_of_a_collection():
    """Without `params` beside it, it is one."""
    assert list(wnjax.norms(wnjax.weight_norm({"cache": STATS}))) == ["cache/layer/kernel"]


def test_overrides_have_the_last_word():
    fn, variables = linen()
    variables["batch_stats"]["extra"] = jnp.ones((3, 4))
    overrides = {"batch_stats/extra": -1}
    found = wnjax.infer_axes(fn, overrides=overrides)(variables, X)
    assert found["batch_stats"]["extra"].feature_axes == (1,)
    assert isinstance(found["batch_stats"]["BatchNorm_0"]["mean"], wnjax.NotWeight)
