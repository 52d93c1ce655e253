"""Trees of (g, v) leaves through every kind of file: with and without a target, and the library."""

import copy
import pickle
import subprocess
import sys
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, NamedSharding
from orbax.checkpoint import v1
from safetensors import flax as safetensors
from safetensors import numpy as safetensors_numpy

import wnjax
from tests import toys
from wnjax.convert import from_dicts

pytestmark = [
    # Orbax's own, of asyncio and of restoring without shardings.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning"),
]


def normalized_params(dtype=jnp.float32, **arguments):
    """(g, v) leaves that are not where `weight_norm` starts."""
    tree = wnjax.weight_norm(toys.mlp_params(dtype), **arguments)
    change = {"g": lambda g: g - 0.5, "v": lambda v: 3 * v, "other": lambda x: x + 1}
    return jax.tree.map(lambda label, x: change[label](x), wnjax.labels(tree), tree)


def kernels(params):
    """The first kernel alone, where a pattern is to choose."""
    return wnjax.weight_norm(params, axes={"first/kernel": -1})


def adam_state():
    """Adam's state on (g, v) leaves, after a step."""
    return stepped_state(optax.adam(1e-2), normalized_params())


def optimizer_form_state():
    return stepped_state(wnjax.weight_normalized(optax.adam(1e-2)), toys.mlp_params())


def stepped_state(optimizer, params):
    grads = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):  # optax itself promotes its step counts
        return optimizer.update(grads, optimizer.init(params), params)[1]


TREES = {
    "normalized": normalized_params,
    "log": partial(normalized_params, log_scale=True),
    "bfloat16": partial(normalized_params, jnp.bfloat16),
    "some": lambda: kernels(toys.mlp_params()),
    "frozen_dict": lambda: wnjax.weight_norm(toys.TREES["frozen_dict"]()),
    "nnx_state": lambda: wnjax.weight_norm(toys.nnx_state()),
    "partitioned": lambda: wnjax.weight_norm(toys.boxed(toys.mlp_params())),
    "adam": adam_state,
    "weight_normalized": optimizer_form_state,
}
every_tree = pytest.mark.parametrize("tree", TREES)


def orbax_v0(path, tree, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "tree", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "tree", target)


def orbax_v1(path, tree, target):
    v1.save(path / "tree", tree)
    return v1.load(path / "tree", target)


ORBAX = {"v0": orbax_v0, "v1": orbax_v1}
every_orbax = pytest.mark.parametrize("orbax", ORBAX.values(), ids=ORBAX.keys())


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(actual, expected):
    """Bit for bit, with the same containers and dtypes."""
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal(actual, expected)
    chex.assert_trees_all_equal_dtypes(actual, expected)


@every_tree
@every_orbax
def test_orbax_with_a_target(orbax, tree, tmp_path):
    tree = TREES[tree]()
    assert_same(orbax(tmp_path, tree, shapes(tree)), tree)


@pytest.mark.parametrize("tree", ["normalized", "log", "bfloat16", "some"])
@every_orbax
def test_orbax_without_a_target(orbax, tree, tmp_path):
    tree = TREES[tree]()
    restored = orbax(tmp_path, tree, None)
    assert isinstance(restored["first"]["kernel"], dict)
    assert_same(from_dicts(restored), tree)


@every_orbax
def test_boxes_without_a_target(orbax, tmp_path):
    """Axis names are lost, values are not."""
    tree = TREES["partitioned"]()
    restored = from_dicts(orbax(tmp_path, tree, None))
    assert_same(restored, nn.unbox(tree))


@every_orbax
def test_nnx_variables_without_a_target(orbax, tmp_path):
    tree = TREES["nnx_state"]()
    restored = from_dicts(orbax(tmp_path, tree, None))
    gv = restored["first"]["kernel"]["value"]
    assert_same(gv, tree["first"]["kernel"].get_value())


@every_orbax
def test_optimizer_states_without_a_target_are_refused(orbax, tmp_path):
    """By the optimizer: they are dicts, in which `from_dicts` finds moments and no lengths."""
    state, params = optimizer_form_state(), toys.mlp_params()
    restored = from_dicts(orbax(tmp_path, state, None))
    chex.assert_trees_all_equal(
        wnjax.fold(restored["lengths"])["first"]["kernel"], state.lengths["first"]["kernel"]
    )
    optimizer = wnjax.weight_normalized(optax.adam(1e-2))
    with pytest.raises(TypeError, match=r"a WeightNormalizedState, got a dict.* without a target"):
        optimizer.update(params, restored, params)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@every_orbax
def test_orbax_onto_other_shardings(orbax, axis_type, tmp_path):
    """Saved whole, restored over eight devices: the shapes of a sharded model are the target."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)
    tree = wnjax.weight_norm({"kernel": jnp.arange(1.0, 65).reshape(8, 8)})
    split = NamedSharding(mesh, jax.P("fsdp", "tensor"))
    plain = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=split)}
    restored = orbax(tmp_path, tree, wnjax.weight_norm(plain))
    assert_same(restored, tree)
    g, v = restored["kernel"]
    assert v.sharding.spec == jax.P("fsdp", "tensor")
    assert g.sharding.spec == jax.P(None, "tensor")
    assert {shard.data.shape for shard in g.addressable_shards} == {(1, 2)}
    assert len(v.addressable_shards) == 8


@every_orbax
def test_orbax_from_other_shardings(orbax, tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, jax.P("fsdp"))
    tree = wnjax.weight_norm({"kernel": jnp.arange(1.0, 65).reshape(8, 8)})
    sharded = wnjax.weight_norm({"kernel": jax.device_put(tree["kernel"].v, split)})
    assert_same(orbax(tmp_path, sharded, shapes(tree)), tree)


@every_orbax
def test_orbax_checkpoint_of_plain_weights(orbax, tmp_path):
    """Of a run before weight norm: the target is what was saved, and then normalized."""
    params = toys.mlp_params()
    restored = orbax(tmp_path, params, shapes(params))
    assert_same(wnjax.fold(wnjax.weight_norm(restored)), params)


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


@pytest.mark.parametrize("tree", [name for name in TREES if name != "nnx_state"])
def test_flax_serialization_with_a_target(tree):
    tree = TREES[tree]()
    assert_same(serialization.from_bytes(zeros(tree), serialization.to_bytes(tree)), tree)
    assert_same(serialization.from_state_dict(zeros(tree), serialization.to_state_dict(tree)), tree)


@pytest.mark.parametrize("tree", ["normalized", "log", "bfloat16", "some"])
def test_flax_serialization_without_a_target(tree):
    tree = TREES[tree]()
    assert_same(from_dicts(serialization.to_state_dict(tree)), tree)
    restored = serialization.msgpack_restore(serialization.to_bytes(tree))
    chex.assert_trees_all_equal(from_dicts(restored), tree)
    chex.assert_trees_all_equal_dtypes(from_dicts(restored), tree)


def test_nnx_state_as_a_pure_dict():
    """With (g, v) leaves in its Params, which `nnx.to_pure_dict` takes as they are."""
    state = TREES["nnx_state"]()
    pure = nnx.to_pure_dict(state)
    restored = from_dicts(serialization.msgpack_restore(serialization.to_bytes(pure)))
    chex.assert_trees_all_equal(jax.tree.leaves(restored), jax.tree.leaves(pure))
    restored = nnx.restore_int_paths(restored)
    target = jax.tree.map(jnp.zeros_like, state)
    nnx.replace_by_pure_dict(target, restored)
    chex.assert_trees_all_equal(target, state)


def test_nnx_module(tmp_path):
    """The module's g is a Param as any: nothing is special."""
    make = partial(wnjax.nnx.WeightNorm, axes={"first/kernel": -1, "rest/0/kernel": -1})
    model = make(toys.TwoLayers(nnx.Rngs(0)))
    other = make(toys.TwoLayers(nnx.Rngs(1)))
    x = jnp.ones((2, 3))
    restored = orbax_v0(tmp_path, nnx.state(model), shapes(nnx.state(other)))
    nnx.update(other, restored)
    chex.assert_trees_all_equal(nnx.state(other), nnx.state(model))
    np.testing.assert_array_equal(other(x), model(x))


SAFETENSORS = {
    "flax": (safetensors.save_file, safetensors.load_file),
    "numpy": (
        lambda flat, path: safetensors_numpy.save_file(jax.device_get(flat), path),
        safetensors_numpy.load_file,
    ),
}


@pytest.mark.parametrize("api", SAFETENSORS)
@pytest.mark.parametrize("tree", ["normalized", "log", "bfloat16", "frozen_dict"])
def test_safetensors(tree, api, tmp_path):
    save, load = SAFETENSORS[api]
    tree = TREES[tree]()
    flat = flatten_dict(serialization.to_state_dict(tree), sep="/")
    assert {"first/kernel/v", "first/bias"} < flat.keys()
    save(flat, tmp_path / "tree.safetensors")
    restored = from_dicts(unflatten_dict(load(tmp_path / "tree.safetensors"), sep="/"))
    chex.assert_trees_all_equal(jax.tree.leaves(restored), jax.tree.leaves(tree))
    chex.assert_trees_all_equal_dtypes(jax.tree.leaves(restored), jax.tree.leaves(tree))
    assert type(restored["first"]["kernel"]) is type(tree["first"]["kernel"])


@pytest.mark.parametrize("tree", [name for name in TREES if name != "nnx_state"])
def test_pickle_and_deepcopy(tree):
    """But for variables: of `nnx.Param(array)` Python makes a deep copy that is the bare array."""
    tree = TREES[tree]()
    assert_same(pickle.loads(pickle.dumps(tree)), tree)
    copied = copy.deepcopy(tree)
    assert_same(copied, tree)
    assert jax.tree.leaves(copied)[-1] is not jax.tree.leaves(tree)[-1]


def test_training_goes_on_from_a_checkpoint(tmp_path):
    """Parameters and optimizer state together, bit for bit."""
    optimizer = optax.adam(1e-2)
    step = toys.make_step(
        optimizer, lambda p: jnp.sum(wnjax.wrap(toys.mlp)(p, jnp.ones((2, 3))) ** 2)
    )
    params = normalized_params()
    state = step(params, optimizer.init(params))
    expected = step(*state)
    restored = orbax_v1(tmp_path, list(state), shapes(list(state)))
    assert_same(step(*restored), expected)


WITHOUT_LIBRARY = """
import sys
sys.modules["wnjax"] = None  # makes its import fail
import numpy as np
try:
    import wnjax
except ImportError:
    pass
else:
    raise AssertionError("wnjax can be imported")

def restored(path):
    if {kind!r} == "orbax":
        import orbax.checkpoint as ocp
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path)
    if {kind!r} == "msgpack":
        from flax import serialization
        with open(path, "rb") as file:
            return serialization.msgpack_restore(file.read())
    from safetensors.numpy import load_file
    from flax.traverse_util import unflatten_dict
    return unflatten_dict(load_file(path), sep="/")

gv = restored({path!r})["first"]["kernel"]
g, v = np.asarray(gv["g"], np.float64), np.asarray(gv["v"], np.float64)
fan_in = tuple(axis for axis, size in enumerate(g.shape) if size == 1)
np.save({out!r}, g * v / np.sqrt((v * v).sum(fan_in, keepdims=True)))
"""


@pytest.mark.parametrize("kind", ["orbax", "msgpack", "safetensors"])
def test_without_the_library(kind, tmp_path):
    """Any reader gets g and v by name, and w = g·v/‖v‖ from them."""
    tree, path, out = normalized_params(), tmp_path / "tree", tmp_path / "w.npy"
    if kind == "orbax":
        orbax_v0(tmp_path, tree, None)
    elif kind == "msgpack":
        path.write_bytes(serialization.to_bytes(tree))
    else:
        flat = flatten_dict(serialization.to_state_dict(tree), sep="/")
        safetensors.save_file(flat, path)
    code = WITHOUT_LIBRARY.format(kind=kind, path=str(path), out=str(out))
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    np.testing.assert_allclose(
        wnjax.fold(tree)["first"]["kernel"], np.load(out), rtol=1e-6, atol=1e-7
    )


def test_pickles_need_the_library(tmp_path):
    """Unlike the other files: a pickle names the class."""
    path = tmp_path / "tree.pickle"
    path.write_bytes(pickle.dumps(jax.device_get(normalized_params())))
    code = f"""
import pickle, sys
sys.modules["wnjax"] = None
with open({str(path)!r}, "rb") as file:
    pickle.load(file)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "ModuleNotFoundError: No module named 'wnjax" in done.stderr
