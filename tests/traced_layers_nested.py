"""What every parameter of a function is, derived by hand: loops, branches, transformations.

As in `traced_layers`, all sizes are 4 where possible, the numbers of steps and layers too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tests.traced_layers import (
    BIAS,
    IN_OUT,
    MLP,
    MLP_BIASES,
    OUT_IN,
    STACKED,
    X3,
    X4,
    mlp,
    plain,
)

STACKED_BIAS = ((4, 4), "bias of")
STACKED_INSIDE = ((4, 4, 4), (1, 2))


def layer(h, w):
    return jnp.tanh(h @ w)


def scan(h, w, **kwargs):
    """`h` after one layer for each step of `w`."""
    return lax.scan(lambda h, w: (layer(h, w), None), h, w, **kwargs)[0]


def scan_with_bias(p, x):
    def step(h, p):
        return jnp.tanh(h @ p["w"] + p["b"][None]), None

    return lax.scan(step, x, p)[0]


def scan_carrying(p, x):
    """The weight is a part of the carry."""
    return lax.scan(lambda c, _: ((layer(*c), c[1]), None), (x, p["w"]), length=4)[0][0]


def scan_recurrent(p, x):
    """A recurrent layer over the first axis of x, whose parameters are constants of the loop."""

    def step(h, x):
        h = jnp.tanh((x @ p["w"] + p["b"][None]) + h @ p["v"])
        return h, h

    return lax.scan(step, jnp.zeros_like(x[0]), x)[1]


def python_loop(p, x):
    for i in range(4):
        x = layer(x, p["w"][i])
    return x


def fori_loop(p, x):
    return lax.fori_loop(0, 4, lambda i, h: layer(h, p["w"][i]), x)


def fori_loop_shared(p, x):
    return lax.fori_loop(0, 4, lambda i, h: layer(h, p["w"]), x)


def while_loop(p, x):
    """Layers of the stack while the activations are large; the number of steps is not known."""

    def step(carry):
        i, h = carry
        return i + 1, layer(h, lax.dynamic_index_in_dim(p["w"], i, keepdims=False))

    return lax.while_loop(lambda c: (c[0] < 4) & (jnp.sum(c[1] ** 2) > 1), step, (0, x))[1]


def while_loop_shared(p, x):
    def step(carry):
        return carry[0] + 1, layer(carry[1], p["w"])

    return lax.while_loop(lambda c: c[0] < 4, step, (0, x))[1]


def while_loop_condition(p, x):
    """The weight of the condition is a weight too."""
    return lax.while_loop(lambda h: jnp.sum(h @ p["v"]) > 1, lambda h: layer(h, p["w"]) / 2, x)


LOOPS = {
    "scan": plain(lambda p, x: scan(x, p["w"]), {"w": STACKED}),
    "scan_bias": plain(scan_with_bias, {"w": STACKED, "b": STACKED_BIAS}, biases={"w": "b"}),
    "scan_reverse": plain(lambda p, x: scan(x, p["w"], reverse=True, unroll=2), {"w": STACKED}),
    "scan_middle_axis": plain(
        lambda p, x: scan(x, jnp.moveaxis(p["w"], 1, 0)), {"w": STACKED_INSIDE}
    ),
    "scan_last_axis": plain(
        lambda p, x: scan(x, jnp.moveaxis(p["w"], -1, 0)), {"w": STACKED_INSIDE}
    ),
    "scan_transposed": plain(
        lambda p, x: scan(x, p["w"].swapaxes(1, 2)), {"w": ((4, 4, 4), (0, 1))}
    ),
    "scan_nested": plain(
        lambda p, x: lax.scan(lambda h, w: (scan(h, w), None), x, p["w"])[0],
        {"w": (X4, (0, 1, 3))},
    ),
    "scan_groups": plain(
        lambda p, x: lax.scan(lambda h, w: (scan(h, w), None), x, p["w"].reshape(2, 2, 4, 4))[0],
        {"w": STACKED},
    ),
    "scan_constant": plain(
        lambda p, x: lax.scan(lambda h, _: (layer(h, p["w"]), None), x, length=4)[0],
        {"w": IN_OUT},
    ),
    "scan_carry": plain(scan_carrying, {"w": IN_OUT}),
    "scan_recurrent": plain(
        scan_recurrent, {"w": IN_OUT, "b": BIAS, "v": IN_OUT}, X3, biases={"w": "b"}
    ),
    "scan_remat": plain(
        lambda p, x: lax.scan(jax.checkpoint(lambda h, w: (layer(h, w), None)), x, p["w"])[0],
        {"w": STACKED},
    ),
    "map_over_experts": plain(lambda p, x: lax.map(lambda w: x @ w, p["w"]), {"w": STACKED}),
    "python_loop": plain(python_loop, {"w": STACKED}),
    "fori_loop": plain(fori_loop, {"w": STACKED}),
    "fori_loop_shared": plain(fori_loop_shared, {"w": IN_OUT}),
    "while_loop": plain(while_loop, {"w": STACKED}),
    "while_loop_shared": plain(while_loop_shared, {"w": IN_OUT}),
    "while_loop_condition": plain(while_loop_condition, {"w": IN_OUT, "v": IN_OUT}),
}


def switch(p, x, i):
    branches = [
        lambda x: jnp.tanh(x @ p["w"] + p["b"][None]),
        lambda x: x @ p["v"].T,
        lambda x: x,
    ]
    return lax.switch(i, branches, x)


TWO = (4, 4), (4, 4)
BRANCHES = {
    "cond": plain(
        lambda p, x: lax.cond(jnp.sum(x) > 0, layer, lambda x, w: -(x @ w), x, p["w"]),
        {"w": IN_OUT},
    ),
    "cond_with_different_weights": plain(
        lambda p, x: lax.cond(jnp.sum(x) > 0, lambda x: x @ p["w"], lambda x: x @ p["v"].T, x),
        {"w": IN_OUT, "v": OUT_IN},
    ),
    "cond_with_different_roles": plain(
        lambda p, x: lax.cond(jnp.sum(x) > 0, lambda x: x @ p["w"], lambda x: x @ p["w"].T, x),
        {"w": ((4, 4), "two roles")},
    ),
    "switch": plain(
        switch,
        {"w": IN_OUT, "b": BIAS, "v": OUT_IN},
        (4, 4),
        np.int32(0),
        biases={"w": "b"},
    ),
}


def moe_gather(p, x):
    gates = jax.nn.softmax(x @ p["router"])
    y = jnp.einsum("bd,bdf->bf", x, p["w"][jnp.argmax(gates, axis=-1)])
    return y * jnp.max(gates, axis=-1, keepdims=True)


def moe_combined(p, x):
    """The second einsum sums over the experts too: each neuron has a fan-in of experts x hidden."""
    hidden = jnp.einsum("bd,edf->bef", x, p["up"])
    gates = jax.nn.softmax(x @ p["router"])[..., None]
    return jnp.einsum("bef,efd->bd", jax.nn.relu(hidden) * gates, p["down"])


EXPERTS = {
    "moe_dense": plain(lambda p, x: jnp.einsum("bd,edf->bef", x, p["w"]), {"w": STACKED}),
    "moe_gather": plain(moe_gather, {"router": IN_OUT, "w": STACKED}),
    "moe_combined": plain(
        moe_combined, {"router": IN_OUT, "up": STACKED, "down": ((4, 4, 4), (2,))}
    ),
    "moe_ragged_dot": plain(
        lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes),
        {"w": STACKED},
        (4, 4),
        np.array([1, 2, 0, 1], np.int32),
    ),
}


def energy_gradient(p, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x)


@jax.custom_jvp
def dot_with_jvp(x, w):
    return x @ w


@dot_with_jvp.defjvp
def dot_jvp(primals, tangents):
    x, w = primals
    return x @ w, tangents[0] @ w + x @ tangents[1]


@jax.custom_vjp
def dot_with_vjp(x, w):
    return x @ w


dot_with_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def tensor_parallel(p, x):
    """Two layers on two devices: the first weight is split by columns, the second by rows."""

    @functools.partial(
        jax.shard_map,
        mesh=Mesh(np.array(jax.devices()[:2]), ("model",)),
        in_specs=(P(None, "model"), P("model"), P("model", None), P(), P()),
        out_specs=P(),
    )
    def local(w, b, v, c, x):
        return lax.psum(jnp.tanh(x @ w + b[None]) @ v, "model") + c[None]

    return local(p["w"], p["b"], p["v"], p["c"], x)


def sharded_and_gathered(p, x):
    """Manual FSDP: every device has a part of the weights, and gathers all to use them."""

    @functools.partial(
        jax.shard_map,
        mesh=Mesh(np.array(jax.devices()[:2]), ("data",)),
        in_specs=(P("data"), P(None, "data"), P("data"), P("data")),
        out_specs=P("data"),
    )
    def local(w, v, b, x):
        w, b = (lax.all_gather(one, "data", axis=0, tiled=True) for one in (w, b))
        v = lax.all_gather(v, "data", axis=1, tiled=True)
        return jnp.tanh(x @ w + b[None]) @ v

    return local(p["w"], p["v"], p["b"], x)


def vmapped_bias(p, x):
    return jax.vmap(lambda x, w, b: x @ w + b[None])(x, p["w"], p["b"])


TRANSFORMATIONS = {
    "jit": plain(jax.jit(mlp), MLP, biases=MLP_BIASES),
    "jit_of_the_dot": plain(lambda p, x: jax.jit(jnp.dot)(x, p["w"]), {"w": IN_OUT}),
    "checkpoint": plain(jax.checkpoint(mlp), MLP, biases=MLP_BIASES),
    "checkpoint_policy": plain(
        jax.checkpoint(mlp, policy=jax.checkpoint_policies.dots_saveable), MLP, biases=MLP_BIASES
    ),
    "custom_jvp": plain(lambda p, x: dot_with_jvp(x, p["w"]), {"w": IN_OUT}),
    "custom_vjp": plain(lambda p, x: dot_with_vjp(x, p["w"]), {"w": IN_OUT}),
    "energy_gradient": plain(energy_gradient, {"w": IN_OUT}),
    "tensor_parallel": plain(tensor_parallel, MLP, biases=MLP_BIASES),
    "sharded_and_gathered": plain(
        sharded_and_gathered, {"w": IN_OUT, "v": IN_OUT, "b": BIAS}, biases={"w": "b"}
    ),
    "vmap_over_inputs": plain(jax.vmap(mlp, (None, 0)), MLP, X3, biases=MLP_BIASES),
    "vmap_over_examples": plain(
        lambda p, x: jax.vmap(lambda x: x @ p["w"] + p["b"])(x),
        {"w": IN_OUT, "b": BIAS},
        biases={"w": "b"},
    ),
    "vmap_over_weights": plain(lambda p, x: jax.vmap(jnp.dot)(x, p["w"]), {"w": STACKED}, X3),
    "vmap_over_weights_bias": plain(
        vmapped_bias, {"w": STACKED, "b": STACKED_BIAS}, X3, biases={"w": "b"}
    ),
    "vmap_over_weights_only": plain(
        lambda p, x: jax.vmap(jnp.dot, (None, 2))(x, p["w"]), {"w": STACKED_INSIDE}
    ),
    "vmap_of_vmap": plain(
        lambda p, x: jax.vmap(jax.vmap(jnp.dot), (None, 2))(x, p["w"]),
        {"w": (X4, (0, 2, 3))},
        X3,
    ),
    "vmap_of_scan": plain(lambda p, x: jax.vmap(scan)(x, p["w"]), {"w": (X4, (0, 1, 3))}, X3),
}

CASES = {**LOOPS, **BRANCHES, **EXPERTS, **TRANSFORMATIONS}
