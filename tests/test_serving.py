"""Folded weights, exported, and run by a process that has no wnjax."""

import subprocess
import sys
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import wnjax
from tests import toys

pytestmark = pytest.mark.usefixtures("optimized")
X = jax.random.normal(jax.random.key(1), (5, 3))

SERVER = """
import sys
sys.modules["wnjax"] = sys.modules["flax"] = None  # makes their import fail
import jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
from jax import export

outputs = []
for call in range({calls}):
    with open(f"program-{{call}}", "rb") as file:
        program = export.deserialize(file.read())
    outputs.append(program.call(np.load(f"input-{{call}}.npy")))
np.savez("outputs.npz", *outputs)
"""


def served(calls, path):
    """What another process gets from the bytes of programs, and an input for each."""
    for i, (program, x) in enumerate(calls):
        (path / f"program-{i}").write_bytes(program)
        np.save(path / f"input-{i}.npy", x)
    code = SERVER.format(calls=len(calls))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=path)
    outputs = np.load(path / "outputs.npz")
    return [outputs[key] for key in outputs.files]


def trained(fn, params, x):
    """(g, v) leaves after some steps, so that they are not where they began."""
    axes = wnjax.infer_axes(fn)(params, x)
    normalized_params = wnjax.weight_norm(params, axes)
    grads = jax.grad(lambda p: jnp.mean(wnjax.wrap(fn)(p, x) ** 2))(normalized_params)
    return jax.tree.map(lambda p, grad: p - 0.5 * grad, normalized_params, grads)


def linen():
    """A network with a convolution, as a function of x alone: its weights are in the program."""
    fn, params, x = toys.linen("conv1d")
    normalized_params = trained(fn, params, x)
    weights = wnjax.fold(normalized_params)
    return lambda x: fn(weights, x), lambda x: wnjax.wrap(fn)(normalized_params, x), x


def plain():
    normalized_params = trained(toys.mlp, toys.mlp_params(), X)
    weights = wnjax.fold(normalized_params)
    return lambda x: toys.mlp(weights, x), lambda x: wnjax.wrap(toys.mlp)(normalized_params, x), X


def nnx_module():
    layer = wnjax.nnx.WeightNorm(toys.TwoLayers(nnx.Rngs(0)))
    layer(X)
    grads = nnx.grad(lambda layer: jnp.mean(layer(X) ** 2))(layer)
    params = nnx.state(layer, nnx.Param)
    nnx.update(layer, jax.tree.map(lambda p, grad: p - 0.5 * grad, params, grads))
    folded = layer.folded()
    return folded, layer, X


MODELS = {"linen": linen, "plain": plain, "nnx": nnx_module}


def has_norm(program):
    text = program.mlir_module()
    return "sqrt" in text or "stablehlo.divide" in text


@pytest.mark.parametrize("name", MODELS)
def test_served_without_the_library(name, tmp_path):
    """At the batch size that it was exported for, and at any."""
    folded, normalized, x = MODELS[name]()
    fixed = export.export(jax.jit(folded))(x)
    shape = export.symbolic_shape(", ".join(["batch", *map(str, x.shape[1:])]))
    of_any_size = export.export(jax.jit(folded))(jax.ShapeDtypeStruct(shape, x.dtype))
    assert not has_norm(fixed)
    assert not has_norm(of_any_size)

    inputs = [x, x, x[:1], jnp.concatenate([x, x])]
    programs = [program.serialize() for program in (fixed, *[of_any_size] * 3)]
    outputs = served(list(zip(programs, inputs, strict=True)), tmp_path)
    for y, x in zip(outputs, inputs, strict=True):
        np.testing.assert_array_equal(y, jax.jit(folded)(x))
        np.testing.assert_allclose(y, normalized(x), rtol=1e-5, atol=1e-5)


def test_gv_leaves_in_the_program_take_their_norm_at_every_call():
    """What folding spares: so the absence of a norm above means something."""
    normalized_params = trained(toys.mlp, toys.mlp_params(), X)
    program = export.export(
        jax.jit(lambda normalized_params, x: toys.mlp(wnjax.fold(normalized_params), x))
    )(normalized_params, X)
    assert has_norm(program)


def test_weights_as_an_argument(tmp_path):
    """One program for many sets of weights, in a file of their own."""
    weights = wnjax.fold(trained(toys.mlp, toys.mlp_params(), X))
    program = export.export(jax.jit(toys.mlp))(weights, X)
    assert not has_norm(program)
    again = export.deserialize(program.serialize())
    np.testing.assert_array_equal(again.call(weights, X), jax.jit(toys.mlp)(weights, X))


@pytest.mark.parametrize("log_scale", [False, True])
def test_gv_leaves_as_an_argument(log_scale):
    """One program for many (g, v): its bytes say what the (g, v) leaves are."""
    axes = wnjax.infer_axes(toys.mlp)(toys.mlp_params(), X)
    normalized_params = wnjax.weight_norm(toys.mlp_params(), axes, log_scale=log_scale)
    program = export.export(jax.jit(wnjax.wrap(toys.mlp)))(normalized_params, X)
    again = export.deserialize(program.serialize())
    other = jax.tree.map(lambda p: 1.5 * p, normalized_params)
    want = toys.mlp(wnjax.fold(other), X)
    np.testing.assert_allclose(again.call(other, X), want, rtol=1e-5, atol=1e-5)


class Mixed(nn.Module):
    """Convolution, attention, and the merged axes that JAX writes as one symbol."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3,))(x))
        x = nn.MultiHeadDotProductAttention(2)(x)
        return nn.Dense(2)(x.reshape(-1, x.shape[-1]))


@pytest.mark.parametrize("form", ["module", "init", "data_init"])
def test_sizes_left_open_in_the_other_forms(form):
    """Of batch and length, at two sizes each; `wrap` has tests of its own."""
    model = Mixed()
    layer = wnjax.linen.WeightNorm(model)
    x = 1 + jax.random.normal(jax.random.key(0), (40, 6, 3))
    variables = layer.init(jax.random.key(1), x)
    params = model.init(jax.random.key(1), x)["params"]

    def fn(params, x):
        return model.apply({"params": params}, x)

    functions = {
        "module": partial(layer.apply, variables),
        "init": partial(layer.init, jax.random.key(2)),
        "data_init": partial(wnjax.data_init(fn), params),
    }
    sizes = jax.ShapeDtypeStruct(export.symbolic_shape("b, t, 3"), x.dtype)
    program = export.export(jax.jit(functions[form]))(sizes)
    for rows, length in ((40, 6), (20, 5)):
        some = x[:rows, :length]
        found, want = program.call(some), functions[form](some)
        chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-5)
