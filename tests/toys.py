"""Small models and parameter trees that several tests share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.core import freeze


class Attention(nn.Module):
    """Self-attention, whose projections have two feature or two fan-in axes."""

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)(x, x)


# name: (module, input shape, the shape of g in every normalized leaf by the naming rules)
LAYERS = {
    "dense": (nn.Dense(4), (5, 3), {"kernel": (1, 4)}),
    "dense_general_in": (
        nn.DenseGeneral(4, axis=(-2, -1)),
        (5, 2, 3),
        {"kernel": (1, 1, 4)},
    ),
    "conv1d": (nn.Conv(4, (3,)), (5, 8, 2), {"kernel": (1, 1, 4)}),
    "conv2d": (nn.Conv(4, (3, 3), strides=2), (5, 8, 8, 2), {"kernel": (1, 1, 1, 4)}),
    "conv3d": (nn.Conv(4, (3, 3, 3)), (5, 4, 4, 4, 2), {"kernel": (1, 1, 1, 1, 4)}),
    "conv_transpose": (nn.ConvTranspose(4, (3, 3)), (5, 4, 4, 2), {"kernel": (1, 1, 1, 4)}),
    "attention": (
        Attention(),
        (5, 7, 4),
        {
            "MultiHeadDotProductAttention_0/query/kernel": (1, 2, 3),
            "MultiHeadDotProductAttention_0/key/kernel": (1, 2, 3),
            "MultiHeadDotProductAttention_0/value/kernel": (1, 2, 3),
            "MultiHeadDotProductAttention_0/out/kernel": (1, 1, 4),
        },
    ),
}


def linen(name, dtype=jnp.float32):
    """A function of (params, x), its params and an input, for a name in `LAYERS`."""
    module, shape, _ = LAYERS[name]
    module = module.clone()
    x = jax.random.normal(jax.random.key(1), shape, jnp.float32)
    params = module.init(jax.random.key(0), x)["params"]
    params, x = jax.tree.map(lambda a: a.astype(dtype), (params, x))
    return lambda params, x: module.apply({"params": params}, x), params, x


class TwoLayers(nnx.Module):
    """An NNX network with a list of layers."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(8, 16, rngs=rngs)])

    def __call__(self, x):
        return self.rest[0](nnx.relu(self.first(x)))


def mlp_params(dtype=jnp.float32):
    """Two dense layers, 3-8-4, as a plain dict."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    return {
        name: {
            "kernel": jax.random.normal(next(keys), (inputs, outputs), dtype),
            "bias": jax.random.normal(next(keys), (outputs,), dtype),
        }
        for name, inputs, outputs in (("first", 3, 8), ("second", 8, 16))
    }


def mlp(params, x):
    """The network of `mlp_params`, with tanh between its layers."""

    def dense(layer, x):
        y = x @ layer["kernel"]
        return y + jnp.broadcast_to(layer["bias"], y.shape)

    return dense(params["second"], jnp.tanh(dense(params["first"], x)))


def boxed(params, names=("in", "out"), box=nn.Partitioned):
    """`params` with every kernel in a box that names its axes."""
    return jax.tree.map(lambda p: box(p, names=names) if p.ndim == 2 else p, params)


def nnx_state():
    """The parameters of `TwoLayers`."""
    return nnx.state(TwoLayers(nnx.Rngs(0)), nnx.Param)


TREES = {
    "dict": mlp_params,
    "frozen_dict": lambda: freeze(mlp_params()),
    "nnx_state": nnx_state,
    "partitioned": lambda: boxed(mlp_params()),
    "logically_partitioned": lambda: boxed(mlp_params(), box=nn.LogicallyPartitioned),
}


def in_float64(tree):
    """The tree with float64 in place of float32; only where x64 is on."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


def ulps(a, b):
    """The largest distance of two trees of equal structure, in b's epsilons relative to b."""

    def distance(x, y):
        limits = jnp.finfo(y.dtype)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return np.max(abs(x - y) / (abs(y) * float(limits.eps) + float(limits.tiny)), initial=0)

    return max(jax.tree.leaves(jax.tree.map(distance, a, b)))


def make_step(optimizer, loss):
    """A jitted step (params, state) -> (params, state) of `optimizer` on `loss(params)`."""

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax itself promotes its step counts
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(optimizer, loss, params, steps):
    """`params` after some steps of `optimizer` on `loss(params)`."""
    step, state = make_step(optimizer, loss), optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params
