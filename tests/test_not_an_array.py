"""(g, v) leaves where somebody takes them for arrays: what still works, and what is refused."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import wnjax

X = jnp.ones((4, 3))
AS_AN_ARRAY = {
    "leaf + leaf": lambda leaf: leaf + leaf,
    "leaf - 1": lambda leaf: leaf - 1,
    "1 - leaf": lambda leaf: 1 - leaf,
    "leaf * 2": lambda leaf: leaf * 2,
    "2 * leaf": lambda leaf: 2 * leaf,
    "leaf / 2": lambda leaf: leaf / 2,
    "2 / leaf": lambda leaf: 2 / leaf,
    "leaf**2": lambda leaf: leaf**2,
    "-leaf": lambda leaf: -leaf,
    "abs(leaf)": abs,
    "leaf < 0": lambda leaf: leaf < 0,
    "tuple + leaf": lambda leaf: (1,) + leaf,  # noqa: RUF005 - the sum is what is tested
    "sum": lambda leaf: sum([leaf, leaf]),
    "array @ leaf": lambda leaf: X @ leaf,
    "leaf @ array": lambda leaf: leaf @ X,
    "array * leaf": lambda leaf: X * leaf,
    "leaf == array": lambda leaf: leaf == X,
    "array.dot": X.dot,
    "numpy @ leaf": lambda leaf: np.ones((4, 3)) @ leaf,
    "leaf @ numpy": lambda leaf: leaf @ np.ones((4, 3)),
    "numpy scalar * leaf": lambda leaf: np.float32(2) * leaf,
    "numpy integer * leaf": lambda leaf: np.int64(2) * leaf,
    "leaf * numpy scalar": lambda leaf: leaf * np.float32(2),
    "jnp.asarray": jnp.asarray,
    "jnp.array of leaves": lambda leaf: jnp.array([leaf, leaf]),
    "np.asarray": np.asarray,
    "np.array of leaves": lambda leaf: np.array([leaf, leaf]),
    "jnp.dot": lambda leaf: jnp.dot(X, leaf),
    "jnp.einsum": lambda leaf: jnp.einsum("bi,io->bo", X, leaf),
    "jnp.sum": jnp.sum,
    "jnp.where": lambda leaf: jnp.where(True, leaf, 0.0),
    "np.dot": lambda leaf: np.dot(np.ones((4, 3)), leaf),
    "np.exp": np.exp,
    "jax.nn.relu": jax.nn.relu,
    "leaf[:, 0]": lambda leaf: leaf[:, 0],
    "leaf[..., None]": lambda leaf: leaf[..., None],
    "leaf[...]": lambda leaf: leaf[...],
    "leaf['g']": lambda leaf: leaf["g"],
    "vmap": lambda leaf: jax.vmap(lambda x: x @ leaf)(X),
}


@pytest.mark.parametrize("kind", [wnjax.WeightNorm, wnjax.LogWeightNorm])
@pytest.mark.parametrize("form", AS_AN_ARRAY)
def test_a_leaf_is_not_an_array(form, kind):
    leaf = kind(jnp.ones((1, 2)), jnp.ones((3, 2)))
    says = f"^a {kind.__name__} was used as an array.* fold the parameters, .* or wrap the function"

    def use(leaf):
        return AS_AN_ARRAY[form](leaf)

    with pytest.raises(TypeError, match=says):
        use(leaf)
    with pytest.raises(TypeError, match=says):
        jax.eval_shape(use, leaf)  # of tracers


def test_methods_of_arrays_are_missed_with_a_word():
    leaf = wnjax.WeightNorm(jnp.ones((1, 2)), jnp.ones((3, 2)))
    for name in ("T", "astype", "at", "reshape", "sum"):
        with pytest.raises(AttributeError, match="was used as an array"):
            getattr(leaf, name)
        assert not hasattr(leaf, name)
    with pytest.raises(AttributeError, match=r"^'WeightNorm' object has no attribute 'w'$"):
        _ = leaf.w


def test_a_leaf_stays_a_tuple():
    leaf = wnjax.WeightNorm(jnp.ones((1, 2)), jnp.ones((3, 2)))
    g, v = leaf
    assert len(leaf) == 2
    assert leaf == (g, v)
    assert leaf[0] is leaf.g is g
    assert leaf[-1] is leaf.v is v
    assert leaf[:1] == (g,)
    assert leaf._replace(g=v) == wnjax.WeightNorm(v, v)
    assert copy.copy(leaf) == leaf
    assert wnjax.WeightNorm("g", "v") == wnjax.WeightNorm("g", "v")
    assert repr(wnjax.WeightNorm("g", "v")) == "WeightNorm(g='g', v='v')"


@pytest.mark.parametrize(
    "box",
    [
        lambda x: x,
        np.asarray,
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        lambda x: nn.Partitioned(x, (None, "model")),
        nnx.Param,
    ],
    ids=["array", "numpy", "shape", "partitioned", "param"],
)
@pytest.mark.parametrize("kind", [wnjax.WeightNorm, wnjax.LogWeightNorm])
def test_shape_and_dtype_are_those_of_the_weight(kind, box):
    leaf = kind(box(jnp.ones((1, 2))), box(jnp.ones((3, 2), jnp.bfloat16)))
    assert (leaf.shape, leaf.dtype, leaf.ndim) == ((3, 2), jnp.bfloat16, 2)
    zeros = jnp.zeros_like(leaf)
    assert (zeros.shape, zeros.dtype) == ((3, 2), jnp.bfloat16)


@pytest.mark.parametrize("content", ["v", None, 0, optax.MaskedNode()])
def test_what_holds_no_arrays_has_no_shape(content):
    """Labels, axes of `vmap`, and masked leaves."""
    leaf = wnjax.WeightNorm(content, content)
    assert not any(hasattr(leaf, name) for name in ("shape", "dtype", "ndim"))


@pytest.mark.parametrize("layer", ["linear", "conv", "attention", "einsum"])
def test_nnx_modules_that_were_not_wrapped(layer):
    rngs = nnx.Rngs(0)
    module, x = {
        "linear": lambda: (nnx.Linear(3, 4, rngs=rngs), jnp.ones((2, 3))),
        "conv": lambda: (nnx.Conv(3, 4, (3,), rngs=rngs), jnp.ones((2, 5, 3))),
        "attention": lambda: (
            nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs),
            jnp.ones((2, 3, 4)),
        ),
        "einsum": lambda: (nnx.Einsum("bi,io->bo", (3, 4), rngs=rngs), jnp.ones((2, 3))),
    }[layer]()
    graphdef, state = nnx.split(module)
    with pytest.raises(TypeError, match="a WeightNorm was used as an array"):
        nnx.merge(graphdef, wnjax.weight_norm(state))(x)
