"""What every parameter of a function is, derived by hand: neurons and others, in plain JAX.

A neuron sums over the fan-in axes of its weight; every other axis of the weight is a feature axis.
All sizes are 4 where the layer permits, so that no guess from shapes can be right by luck.
Loops, branches and transformations are in `traced_layers_nested`, Flax in `traced_layers_flax`.
"""

import functools
import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NO_BIASES = MappingProxyType({})
STACK = np.arange(4)


class Case(NamedTuple):
    """A function and what each of its parameters is.

    Attributes:
        build: Gives the function of (params, *args), its params and its args.
        expected: By a regular expression that fully matches slash paths: the feature axes of
            a weight, or words of the reason why a parameter is not a weight.
        biases: The bias of each weight that has one, as slash paths; None if not checked.
    """

    build: Callable[[], tuple[Callable, Any, tuple]]
    expected: dict[str, tuple[int, ...] | str]
    biases: dict[str, str] | MappingProxyType | None = NO_BIASES


def arrays(specs, seed=0):
    """An array for each spec: normal numbers for a shape, any other array as it is."""
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.normal(size=s), jnp.float32) if isinstance(s, tuple) else jnp.asarray(s)
        for s in specs
    ]


def plain(fn, leaves, *inputs, biases=NO_BIASES):
    """A case with a dict of arrays as params.

    Args:
        fn: The function of (params, *inputs).
        leaves: By name: the shape of the parameter and what is expected of it.
        *inputs: Shapes or arrays; by default one 4x4 array.
        biases: As in `Case`.

    Returns:
        The case.
    """

    def build():
        params = dict(zip(leaves, arrays([s for s, _ in leaves.values()]), strict=True))
        return fn, params, tuple(arrays(inputs or [(4, 4)], 1))

    return Case(build, {re.escape(name): what for name, (_, what) in leaves.items()}, biases)


IN_OUT = ((4, 4), (1,))
OUT_IN = ((4, 4), (0,))
STACKED = ((4, 4, 4), (0, 2))
BIAS = ((4,), "bias of")
X3, X4 = (4, 4, 4), (4, 4, 4, 4)


def mlp(p, x):
    """Two layers; the parameters are called w, b and v, c."""
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"] + p["c"][None]


MLP = {"w": IN_OUT, "b": BIAS, "v": IN_OUT, "c": BIAS}
MLP_BIASES = {"w": "b", "v": "c"}

DOTS = {
    "matmul": plain(lambda p, x: x @ p["w"], {"w": IN_OUT}),
    "matmul_of_a_vector": plain(lambda p, x: x @ p["w"], {"w": IN_OUT}, (4,)),
    "matmul_bias": plain(
        lambda p, x: x @ p["w"] + p["b"][None], {"w": IN_OUT, "b": BIAS}, biases={"w": "b"}
    ),
    "bias_before_the_sum": plain(
        lambda p, x: p["b"][None] + x @ p["w"], {"w": IN_OUT, "b": BIAS}, biases={"w": "b"}
    ),
    "linear_regression": plain(
        lambda p, x: x @ p["w"] + p["b"], {"w": ((4,), ()), "b": ((), "bias of")}, biases={"w": "b"}
    ),
    "two_layers": plain(mlp, MLP, biases=MLP_BIASES),
    "torch_linear": plain(
        lambda p, x: x @ p["w"].T + p["b"][None], {"w": OUT_IN, "b": BIAS}, biases={"w": "b"}
    ),
    "weight_left": plain(lambda p, x: p["w"] @ x.T, {"w": OUT_IN}),
    "weight_left_transposed": plain(lambda p, x: p["w"].T @ x.T, {"w": IN_OUT}),
    "einsum_weight_left": plain(lambda p, x: jnp.einsum("oi,bi->bo", p["w"], x), {"w": OUT_IN}),
    "einsum_middle_axis": plain(lambda p, x: jnp.einsum("bi,oip->bop", x, p["w"]), {"w": STACKED}),
    "dot_general_two_axes": plain(
        lambda p, x: lax.dot_general(x, p["w"], (((0, 2), (2, 0)), ((), ()))),
        {"w": (X3, (1,))},
        X3,
    ),
    "dot_general_batch_axis": plain(
        lambda p, x: lax.dot_general(p["w"], x, (((0,), (1,)), ((2,), (2,)))),
        {"w": (X3, (1, 2))},
        X3,
    ),
    "broadcast_over_the_batch": plain(
        lambda p, x: x @ jnp.broadcast_to(p["w"], (4, 4, 4)), {"w": IN_OUT}, X3
    ),
    "token_mixing": plain(
        lambda p, x: jnp.einsum("bpc,pq->bqc", x, p["w"]) + p["b"][None, :, None],
        {"w": IN_OUT, "b": BIAS},
        X3,
        biases={"w": "b"},
    ),
    "merged_rows": plain(lambda p, x: x @ p["w"].reshape(16, 4), {"w": ((4, 4, 4), (2,))}, (4, 16)),
    "merged_columns": plain(lambda p, x: x @ p["w"].reshape(4, 16), {"w": (X3, (1, 2))}),
    "merged_transposed_columns": plain(
        lambda p, x: x @ p["w"].transpose(2, 0, 1).reshape(4, 16), {"w": (X3, (0, 1))}
    ),
    "split_columns": plain(
        lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["w"].reshape(4, 2, 2)), {"w": IN_OUT}
    ),
    "split_rows": plain(
        lambda p, x: jnp.tensordot(x.reshape(4, 2, 2), p["w"].reshape(2, 2, 4)), {"w": IN_OUT}
    ),
    "block_diagonal": plain(
        lambda p, x: jnp.einsum("bgi,gio->bgo", x.reshape(4, 2, 2), p["w"].reshape(2, 2, 4)),
        {"w": ((4, 4), "part of axis")},
    ),
    "flipped": plain(lambda p, x: x @ p["w"][::-1, ::-1], {"w": IN_OUT}),
    "permuted_rows": plain(lambda p, x: x @ p["w"][np.array([2, 0, 3, 1])], {"w": IN_OUT}),
    "permuted_columns": plain(lambda p, x: x @ p["w"][:, np.array([2, 0, 3, 1])], {"w": IN_OUT}),
    "padded_rows": plain(lambda p, x: x @ jnp.pad(p["w"], ((2, 2), (0, 0))), {"w": IN_OUT}, (4, 8)),
    "rows_sliced": plain(
        lambda p, x, h: x @ p["w"][:2] + h @ p["w"][2:], {"w": IN_OUT}, (4, 2), (4, 2)
    ),
    "columns_sliced": plain(
        lambda p, x: jnp.tanh(x @ p["w"][:, :2]) + x @ p["w"][:, 2:], {"w": IN_OUT}
    ),
    "kernels_concatenated": plain(
        lambda p, x: jnp.stack(jnp.split(x @ jnp.concatenate([p["w"], p["v"]], axis=1), 2, axis=1)),
        {"w": IN_OUT, "v": IN_OUT},
    ),
    "siamese": plain(
        lambda p, x, y: (x @ p["w"] + p["b"][None]) * jnp.tanh(y @ p["w"] + p["b"][None]),
        {"w": IN_OUT, "b": BIAS},
        (4, 4),
        (4, 4),
        biases={"w": "b"},
    ),
    "tied_autoencoder": plain(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": ((4, 4), "two roles")}
    ),
    "lora": plain(
        lambda p, x: x @ p["a"] @ p["b"] + x @ p["w"], {"a": IN_OUT, "b": IN_OUT, "w": IN_OUT}
    ),
    "hypernetwork": plain(
        lambda p, x, z: jnp.einsum("bi,bio->bo", x, (z @ p["w"]).reshape(4, 4, 4)),
        {"w": ((4, 16), (1,))},
        (4, 4),
        (4, 4),
    ),
    "bfloat16_compute": plain(
        lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), {"w": IN_OUT}
    ),
    "loss_with_l2_penalty": plain(
        lambda p, x, y: jnp.mean((x @ p["w"] + p["b"][None] - y) ** 2) + 0.1 * jnp.sum(p["w"] ** 2),
        {"w": IN_OUT, "b": BIAS},
        (4, 4),
        (4, 4),
        biases={"w": "b"},
    ),
}


def attend(q, k, v):
    """Attention between arrays of (batch, sequence, heads, head_dim)."""
    scores = jax.nn.softmax(jnp.einsum("bqnh,bknh->bnqk", q, k))
    return jnp.einsum("bnqk,bknh->bqnh", scores, v)


def gemma_attention(p, x):
    q = jnp.einsum("BTD,NDH->BTNH", x, p["q"])
    k, v = jnp.einsum("BSD,CKDH->CBSKH", x, p["kv"])
    return jnp.einsum("BTNH,NHD->BTD", attend(q, k, v), p["out"])


def gemma_feed_forward(p, x):
    gates = jnp.einsum("...F,NFH->...NH", x, p["gating"])
    return (jax.nn.gelu(gates[..., 0, :]) * gates[..., 1, :]) @ p["linear"]


def heads(y):
    return y.reshape(4, 4, 2, 2)


ATTENTION = {
    "gemma_attention": plain(
        gemma_attention,
        {"q": (X3, (0, 2)), "kv": ((2, 4, 4, 4), (0, 1, 3)), "out": (X3, (2,))},
        X3,
    ),
    "gemma_feed_forward": plain(
        gemma_feed_forward, {"gating": ((2, 4, 4), (0, 2)), "linear": IN_OUT}, X3
    ),
    "fused_qkv_split_before_the_dots": plain(
        lambda p, x: attend(*(heads(x @ w) for w in jnp.split(p["w"], 3, axis=1))),
        {"w": ((4, 12), (1,))},
        X3,
    ),
    "fused_qkv_stacked": plain(
        lambda p, x: attend(*(jnp.einsum("btd,dnh->btnh", x, p["w"][i]) for i in range(3))),
        {"w": ((3, 4, 4, 4), (0, 2, 3))},
        X3,
    ),
    "fused_qkv_bias": plain(
        lambda p, x: attend(*map(heads, jnp.split(x @ p["w"] + p["b"][None, None], 3, axis=-1))),
        {"w": ((4, 12), (1,)), "b": ((12,), "bias of")},
        X3,
        biases={"w": "b"},
    ),
}


def conv(x, w, layout="NHWC,HWIO,NHWC", **kwargs):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=tuple(layout.split(",")), **kwargs
    )


def laid_out(layout, what):
    return plain(lambda p, x: conv(x, p["w"], layout), {"w": (X4, what)}, X4)


def modulated_per_sample(p, x, z, demodulate):
    def one(x, style):
        w = p["w"] * style[None, None, :, None]
        if demodulate:
            w *= lax.rsqrt(jnp.sum(w**2, axis=(0, 1, 2), keepdims=True) + 1e-8)
        return conv(x[None], w)[0]

    return jax.vmap(one)(x, z @ p["style"] + p["bias"][None])


def modulated_by_groups(p, x, z, demodulate):
    style = z @ p["style"] + p["bias"][None]
    w = p["w"][None] * style[:, None, None, :, None]
    if demodulate:
        w *= lax.rsqrt(jnp.sum(w**2, axis=(1, 2, 3), keepdims=True) + 1e-8)
    w = w.transpose(1, 2, 3, 0, 4).reshape(4, 4, 4, 16)
    x = x.transpose(1, 2, 0, 3).reshape(1, 4, 4, 16)
    return conv(x, w, feature_group_count=4)


def modulated(fn, demodulate, what):
    leaves = {"w": (X4, what), "style": IN_OUT, "bias": BIAS}
    fn = functools.partial(fn, demodulate=demodulate)
    return plain(fn, leaves, X4, (4, 4), biases={"style": "bias"})


def transposed(flag, what):
    def fn(p, x):
        return lax.conv_transpose(x, p["w"], (2, 2), "SAME", transpose_kernel=flag)

    return plain(fn, {"w": (X4, what)}, X4)


CONVS = {
    "conv_hwio": laid_out("NHWC,HWIO,NHWC", (3,)),
    "conv_oihw": laid_out("NCHW,OIHW,NCHW", (0,)),
    "conv_hwoi": laid_out("NHWC,HWOI,NHWC", (2,)),
    "conv_ohwi": laid_out("NHWC,OHWI,NHWC", (0,)),
    "conv_howi": laid_out("CHWN,HOWI,NCHW", (1,)),
    "conv_oihw_bias": plain(
        lambda p, x: conv(x, p["w"], "NCHW,OIHW,NCHW") + p["b"][None, :, None, None],
        {"w": (X4, (0,)), "b": BIAS},
        X4,
        biases={"w": "b"},
    ),
    "conv_oihw_grouped": plain(
        lambda p, x: conv(x, p["w"], "NCHW,OIHW,NCHW", feature_group_count=2),
        {"w": ((4, 2, 4, 4), (0,))},
        X4,
    ),
    "conv_oihw_depthwise": plain(
        lambda p, x: conv(x, p["w"], "NCHW,OIHW,NCHW", feature_group_count=4),
        {"w": ((4, 1, 4, 4), (0,))},
        X4,
    ),
    "conv_transpose": transposed(False, (3,)),
    "conv_transpose_swapped": transposed(True, (2,)),
    "conv_of_a_matrix": plain(lambda p, x: conv(x, p["w"][None, None]), {"w": IN_OUT}, X4),
    "conv_vmapped": plain(
        lambda p, x: jax.vmap(conv)(x, p["w"]), {"w": ((4, 4, 4, 4, 4), (0, 4))}, (4, 4, 4, 4, 4)
    ),
    "conv_vmapped_kernels_only": plain(
        lambda p, x: jax.vmap(conv, (None, 3))(x, p["w"]), {"w": ((4, 4, 4, 4, 4), (3, 4))}, X4
    ),
    "conv_vmapped_inputs_only": plain(
        lambda p, x: jax.vmap(conv, (0, None))(x, p["w"]), {"w": (X4, (3,))}, (4, 4, 4, 4, 4)
    ),
    "modulated_per_sample": modulated(modulated_per_sample, False, (3,)),
    "modulated_by_groups": modulated(modulated_by_groups, False, (3,)),
    "demodulated_per_sample": modulated(modulated_per_sample, True, "own statistics"),
    "demodulated_by_groups": modulated(modulated_by_groups, True, "own statistics"),
    "depthwise_by_hand": plain(
        lambda p, x: jnp.sum(x * p["w"][None], axis=1), {"w": ((4, 4), "scale")}, X3
    ),
}


def standardized(w):
    return (w - jnp.mean(w, axis=0, keepdims=True)) / jnp.std(w, axis=0, keepdims=True)


def spectrally_normalized(w, u):
    v = lax.stop_gradient(u @ w.T)
    v /= jnp.linalg.norm(v)
    return w / jnp.linalg.norm(v @ w)


FUNCTION_OF = ((4, 4), "function of")
PRODUCT = ((4, 4), "product of two parameters")
OWN_STATISTICS = ((4, 4), "own statistics")
UNKNOWN = ((4, 4), "unknown operation")
MASK = np.tri(4, dtype=np.float32)

FACTORS = {
    "equalized_learning_rate": plain(lambda p, x: x @ (p["w"] * 0.3), {"w": IN_OUT}),
    "negated_and_divided": plain(lambda p, x: x @ (-p["w"] / np.float32(2)), {"w": IN_OUT}),
    "masked": plain(lambda p, x: x @ (p["w"] * MASK), {"w": IN_OUT}),
    "masked_by_where": plain(lambda p, x: x @ jnp.tril(p["w"]), {"w": IN_OUT}),
    "stop_gradient": plain(lambda p, x: x @ lax.stop_gradient(p["w"]), {"w": IN_OUT}),
    "optimization_barrier": plain(lambda p, x: x @ lax.optimization_barrier(p["w"]), {"w": IN_OUT}),
    "feature_factor": plain(
        lambda p, x: x @ (p["w"] * p["gamma"][None]), {"w": IN_OUT, "gamma": ((4,), "scale")}
    ),
    "temperature": plain(lambda p, x: (x @ p["w"]) * p["t"], {"w": IN_OUT, "t": ((), "scale")}),
    "exponential": plain(lambda p, x: x @ jnp.exp(p["w"]), {"w": FUNCTION_OF}),
    "squared": plain(lambda p, x: x @ (p["w"] * p["w"]), {"w": FUNCTION_OF}),
    "symmetrized": plain(lambda p, x: x @ (p["w"] + p["w"].T), {"w": FUNCTION_OF}),
    "straight_through": plain(
        lambda p, x: x @ (p["w"] + lax.stop_gradient(jnp.round(p["w"]) - p["w"])),
        {"w": FUNCTION_OF},
    ),
    "masked_inputs": plain(lambda p, x: x @ (p["w"] * MASK[0, :, None]), {"w": IN_OUT}),
    "masked_in_one_einsum": plain(
        lambda p, x: jnp.einsum("bi,io,i->bo", x, p["w"], MASK[0]), {"w": IN_OUT}
    ),
    "masked_and_expanded": plain(
        lambda p, x: x @ (p["w"][:, None] * MASK[:, :, None]).reshape(4, 16), {"w": IN_OUT}
    ),
    "rows_set_to_zero": plain(lambda p, x: x @ p["w"].at[0].set(0.0), {"w": IN_OUT}),
    "pruned_by_size": plain(
        lambda p, x: x @ jnp.where(abs(p["w"]) > 0.5, p["w"], 0.0), {"w": FUNCTION_OF}
    ),
    "features_scaled_by_a_constant": plain(lambda p, x: x @ (p["w"] * MASK[:1]), {"w": IN_OUT}),
    "scaled_in_one_einsum": plain(
        lambda p, x: jnp.einsum("bi,io,o->bo", x, p["w"], p["g"]),
        {"w": IN_OUT, "g": ((4,), "scale")},
    ),
    "modulated_by_an_einsum": plain(
        lambda p, x, z: jnp.einsum("bi,bio->bo", x, jnp.einsum("bi,io->bio", z, p["w"])),
        {"w": IN_OUT},
        (4, 4),
        (4, 4),
    ),
    "factorized": plain(lambda p, x: x @ (p["u"] @ p["v"]), {"u": PRODUCT, "v": PRODUCT}),
    "lora_merged": plain(
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), {"w": FUNCTION_OF, "a": PRODUCT, "b": PRODUCT}
    ),
    "weight_standardization": plain(lambda p, x: x @ standardized(p["w"]), {"w": OWN_STATISTICS}),
    "spectral_norm": plain(
        lambda p, x, u: x @ spectrally_normalized(p["w"], u), {"w": OWN_STATISTICS}, (4, 4), (4,)
    ),
    "own_weight_norm": plain(
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True) * p["g"][None]),
        {"w": OWN_STATISTICS, "g": ((4,), "scale")},
    ),
    "fft": plain(lambda p, x: x @ jnp.fft.fft(p["w"], axis=0).real, {"w": UNKNOWN}),
    "cumsum": plain(lambda p, x: x @ jnp.cumsum(p["w"], axis=0), {"w": UNKNOWN}),
    "sort": plain(lambda p, x: x @ jnp.sort(p["w"], axis=0), {"w": UNKNOWN}),
}


def bilinear(spec, shape, what, *inputs):
    """One call of `einsum` of some inputs and a weight, whose order of sums the sizes decide."""

    def fn(p, *xs):
        return jnp.einsum(spec, *xs[:-1], p["w"], xs[-1])

    return plain(fn, {"w": (shape, what)}, *inputs)


def stacked_bilinear(p, x, y):
    """Two calls of the same `einsum`, of which the second sums over the output of the first."""
    h = jnp.einsum("bi,bj,ijo->bo", x, y, p["w"])
    return jnp.einsum("bi,bj,ijo->bo", h, y, p["v"])


SIZES = [(7, 7, 3), (4, 16, 3), (4, 4, 64), (64, 2, 2), (2, 64, 2)]  # of inputs, inputs, outputs
SEVERAL = "several weights in one einsum"

BILINEAR = {
    **{
        f"bilinear_{i}_{j}_{o}": bilinear("bi,ijo,bj->bo", (i, j, o), (2,), (4, i), (4, j))
        for i, j, o in SIZES
    },
    **{
        f"bilinear_form_{i}_{j}": bilinear("bi,ij,bj->b", (i, j), (), (4, i), (4, j))
        for i, j in ((2, 16), (16, 2))
    },
    **{
        f"trilinear_{i}_{j}_{k}": bilinear(
            "bi,bj,ijko,bk->bo", (i, j, k, 4), (3,), (64, i), (64, j), (64, k)
        )
        for i, j, k in ((7, 7, 3), (2, 16, 2))
    },
    **{
        f"bilinear_weights_{r}": plain(
            lambda p, x: jnp.einsum("bi,ir,ro->bo", x, p["a"], p["b"]),
            {"a": ((4, r), SEVERAL), "b": ((r, 4), SEVERAL)},
        )
        for r in (2, 64)
    },
    # Without a string nothing names the call.
    **{
        f"bilinear_by_lists_{i}_{j}_{o}": plain(
            lambda p, x, y: jnp.einsum(x, [0, 1], p["w"], [1, 2, 3], y, [0, 2], [0, 3]),
            {"w": ((i, j, o), (2,))},
            (4, i),
            (4, j),
        )
        for i, j, o in SIZES
    },
    **{
        f"multi_dot_with_data_{i}_{j}": plain(
            lambda p, x, y: jnp.linalg.multi_dot([x, p["w"], y]),
            {"w": ((i, j), ())},
            (4, i),
            (j, 3),
        )
        for i, j in ((2, 64), (64, 2))
    },
    **{
        f"multi_dot_of_weights_{b}_{r}": plain(
            lambda p, x: jnp.linalg.multi_dot([x, p["a"], p["b"]]),
            {"a": ((8, r), SEVERAL), "b": ((r, 8), SEVERAL)},
            (b, 8),
        )
        for b, r in ((2, 64), (64, 2))
    },
    "einsums_by_lists": plain(
        lambda p, x: jnp.einsum(
            jnp.tanh(jnp.einsum(x, [0, 1], p["a"], [1, 2])), [0, 1], p["b"], [1, 2]
        ),
        {"a": IN_OUT, "b": IN_OUT},
    ),
    "einsum_by_lists_of_a_scale": plain(
        lambda p, x: jnp.einsum(x, [0, 1], p["w"], [1], [0, 1]) @ p["a"],
        {"w": ((4,), "scale"), "a": IN_OUT},
    ),
    "bilinear_summed_outputs": bilinear("bi,ijo,bj->b", X3, "reduce_sum", (4, 4), (4, 4)),
    "bilinear_per_example": plain(
        jax.vmap(lambda p, x, y: jnp.einsum("i,ijo,j->o", x, p["w"], y), (None, 0, 0)),
        {"w": (X3, (2,))},
        (4, 4),
        (4, 4),
    ),
    "bilinear_stacked": plain(stacked_bilinear, {"w": (X3, (2,)), "v": (X3, (2,))}, (4, 4), (4, 4)),
    "pooled_in_one_einsum": plain(
        lambda p, x, a: jnp.einsum("bti,io,bt->bo", x, p["w"], a), {"w": IN_OUT}, X3, (4, 4)
    ),
    # Two calls are two layers: the first makes the weights of the second.
    "bilinear_of_two_einsums": plain(
        lambda p, x, y: jnp.einsum("bj,bjo->bo", y, jnp.einsum("bi,ijo->bjo", x, p["w"])),
        {"w": (X3, (1, 2))},
        (4, 4),
        (4, 4),
    ),
}

RANDOM = np.random.default_rng(2).normal(size=(4, 4, 4)).astype(np.float32)
MATRIX, DATA = RANDOM[0], RANDOM[1]
BETWEEN = ((4, 4), "constant array as well as by data")
COEFFICIENTS = (X3, "constant array as well as by data")


def graph_network(p):
    """(g, v) leaves and edges are closed over."""
    h = jnp.tanh(MATRIX @ (DATA @ p["w"]) + p["b"][None])
    return MATRIX @ h @ p["v"]


def memory_attention(p, x, memory=DATA):
    q, k, v = x @ p["q"] + p["b"][None], memory @ p["k"] + p["c"][None], memory @ p["v"]
    return jax.nn.softmax(q @ k.T) @ v @ p["o"]


CAPTURED = {
    "basis": plain(lambda p, x: x @ (p["w"] @ MATRIX), {"w": BETWEEN}),
    "basis_left": plain(lambda p, x: x @ (MATRIX @ p["w"]), {"w": IN_OUT}),
    "basis_in_jax": plain(
        lambda p, x: x @ jax.jit(jnp.matmul)(p["w"], jnp.asarray(MATRIX)), {"w": BETWEEN}
    ),
    "basis_made_inside": plain(lambda p, x: x @ (p["w"] @ jnp.eye(4)), {"w": ((4, 4), "constant")}),
    "basis_of_a_convolution": plain(
        lambda p, x: conv(x, jnp.einsum("iok,khw->hwio", p["w"], RANDOM)), {"w": COEFFICIENTS}, X4
    ),
    "basis_of_a_convolution_first": plain(
        lambda p, x: conv(x, jnp.tensordot(RANDOM, p["w"], ((0,), (2,)))), {"w": COEFFICIENTS}, X4
    ),
    "basis_twice": plain(lambda p, x: x @ (p["w"] @ MATRIX @ DATA), {"w": BETWEEN}),
    "basis_scaled": plain(lambda p, x: x @ (-2 * (p["w"] @ MATRIX) * MASK), {"w": BETWEEN}),
    "basis_transformed": plain(lambda p, x: x @ jnp.fft.fft(p["w"] @ MATRIX).real, {"w": BETWEEN}),
    "basis_and_more": plain(
        lambda p, x: x @ (p["w"] @ MATRIX + p["v"]), {"w": BETWEEN, "v": ((4, 4), "added")}
    ),
    "basis_beside_a_basis": plain(
        lambda p, x: x @ jnp.concatenate([p["w"] @ MATRIX, p["v"] @ DATA], axis=1),
        {"w": BETWEEN, "v": BETWEEN},
    ),
    "basis_of_two_weights": plain(
        lambda p, x: x @ ((MATRIX @ p["w"]) @ p["v"]), {"w": BETWEEN, "v": IN_OUT}
    ),
    "basis_in_one_einsum": plain(
        lambda p, x: jnp.einsum("bi,ij,jo->bo", x, p["w"], MATRIX), {"w": BETWEEN}
    ),
    "basis_in_one_wide_einsum": plain(
        lambda p, x: jnp.einsum("bi,ij,jo->bo", x, p["w"], MATRIX[:, :2]),
        {"w": BETWEEN},
        (64, 4),
    ),
    "basis_of_a_loop": plain(
        lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["w"] @ MATRIX)[0],
        {"w": COEFFICIENTS},
    ),
    "basis_made_in_a_loop": plain(
        lambda p, x: jnp.einsum("bi,lio->lbo", x, lax.map(lambda w: w @ MATRIX, p["w"])),
        {"w": COEFFICIENTS},
    ),
    "basis_by_hand": plain(
        lambda p, x: x @ jnp.sum(p["w"][:, :, None] * MATRIX[None], axis=1),
        {"w": ((4, 4), "unknown operation reduce_sum")},
    ),
    "basis_summed_by_hand": plain(
        lambda p, x: jnp.sum(x[:, :, None] * (p["w"] @ MATRIX)[None], axis=1),
        {"w": ((4, 4), "unknown operation reduce_sum")},
    ),
    "basis_of_a_loop_over_constants": plain(
        lambda p, _: lax.scan(
            lambda h, w: (h @ w, None), MATRIX.astype(p["w"].dtype), p["w"] @ MATRIX
        )[0],
        {"w": COEFFICIENTS},
    ),
    "basis_summed_by_hand_over_constants": plain(
        lambda p, _: jnp.sum(DATA[:, :, None] * (p["w"] @ MATRIX)[None], axis=1),
        {"w": ((4, 4), "unknown operation reduce_sum")},
    ),
    "closed_over_mean": plain(
        lambda p, _: DATA @ p["w"] - jnp.mean(DATA @ p["w"], -1, keepdims=True), {"w": IN_OUT}
    ),
    "readout": plain(lambda p, x: x @ p["w"] @ MATRIX, {"w": IN_OUT}),
    "closed_over_data": plain(lambda p, _: mlp(p, DATA), MLP, biases=MLP_BIASES),
    "closed_over_data_without_biases": plain(
        lambda p, _: DATA @ p["a"] @ p["b"], {"a": IN_OUT, "b": IN_OUT}
    ),
    "closed_over_graph": plain(
        lambda p, _: graph_network(p), {"w": IN_OUT, "b": ((4,), "added"), "v": IN_OUT}
    ),
    "closed_over_memory": plain(
        memory_attention,
        dict.fromkeys("qkvo", IN_OUT) | {"b": BIAS, "c": BIAS},
        biases={"q": "b", "k": "c"},
    ),
}


def unstacked(p, x):
    q, k, v = jnp.unstack(p["w"], axis=1)
    return attend(*((x @ w)[:, :, None] for w in (q, k, v)))


PAIR = {"a": IN_OUT, "b": IN_OUT}
PARTS = {
    "stacked_and_scanned": plain(
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.stack([p["a"], p["b"]]))[
            0
        ],
        PAIR,
    ),
    "stacked_and_indexed": plain(
        lambda p, x: lax.fori_loop(
            0, 2, lambda i, h: jnp.tanh(h @ jnp.stack([p["a"], p["b"]])[i]), x
        ),
        PAIR,
    ),
    "stacked": plain(lambda p, x: jnp.einsum("bi,nio->nbo", x, jnp.stack([p["a"], p["b"]])), PAIR),
    "stacked_in_the_middle": plain(
        lambda p, x: jnp.einsum("bi,ino->nbo", x, jnp.stack([p["a"], p["b"]], axis=1)), PAIR
    ),
    "stacked_and_merged": plain(
        lambda p, x: x @ jnp.stack([p["a"], p["b"]], axis=1).reshape(4, 8), PAIR
    ),
    "unstacked": plain(unstacked, {"w": ((4, 3, 4), (1, 2))}, X3),
    "stacked_and_unstacked": plain(
        lambda p, x: [x @ w for w in jnp.unstack(jnp.stack([p["a"], p["b"].T]))],
        {"a": IN_OUT, "b": OUT_IN},
    ),
    "part_updated": plain(
        lambda p, x: x @ lax.dynamic_update_slice(p["w"], p["u"], (0, 1)),
        {"w": IN_OUT, "u": ((4, 2), (1,))},
    ),
    "part_of_zeros": plain(
        lambda p, x: x @ lax.dynamic_update_slice(jnp.zeros((4, 4)), p["u"], (1, 0)),
        {"u": ((2, 4), (1,))},
    ),
    "part_somewhere": plain(
        lambda p, x, i: x @ lax.dynamic_update_slice(jnp.zeros((4, 4)), p["u"], (i, np.int32(0))),
        {"u": ((2, 4), "unknown operation dynamic_update_slice")},
        (4, 4),
        np.int32(1),
    ),
    "part_set": plain(
        lambda p, x: x @ jnp.zeros((4, 4)).at[np.tril_indices(4)].set(p["u"]),
        {"u": ((10,), "unknown operation scatter")},
    ),
    "padded_inside": plain(
        lambda p, x: x @ lax.pad(p["w"], jnp.zeros((), p["w"].dtype), ((0, 0, 1), (0, 0, 0))),
        {"w": ((4, 4), "unknown operation pad")},
        (4, 7),
    ),
}


def tied_embedding(p, ids):
    return jnp.tanh(p["table"][ids]) @ p["table"].T + p["b"][None]


def tied_one_hot(p, ids):
    return jnp.tanh(jax.nn.one_hot(ids, 4) @ p["table"]) @ p["table"].T


def relative_positions(p, x):
    distances = jax.nn.one_hot(abs(STACK[:, None] - STACK[None]), 4)
    scores = jnp.einsum("bqnh,bknh->bnqk", x, x)
    return scores + jnp.einsum("qkr,rn->nqk", distances, p["table"])[None]


def relative_positions_gathered(p, x):
    offsets = p["table"][abs(STACK[:, None] - STACK[None])]
    return jnp.einsum("bqnh,bknh->bnqk", x, x) + offsets.transpose(2, 0, 1)[None]


def latents(p, x):
    queries = jnp.broadcast_to(p["latents"][None], (4, 4, 4)) @ p["w"]
    return jax.nn.softmax(queries @ x.swapaxes(1, 2)) @ x


def vision_transformer_input(p, x):
    token = jnp.broadcast_to(p["token"][None, None], (4, 1, 4))
    x = jnp.concatenate([token, x @ p["w"] + p["b"][None, None]], axis=1)
    return (x + p["positions"][None]) @ p["head"]


def layer_norm(p, x):
    y = x - jnp.mean(x, axis=-1, keepdims=True)
    y *= lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)
    return y * p["scale"][None] + p["bias"][None]


def mean_only_batch_norm(p, x):
    y = x @ p["w"]
    return y - jnp.mean(y, axis=0, keepdims=True) + p["b"][None]


def prelu(p, x):
    y = x @ p["w"]
    return jnp.where(y > 0, y, y * p["slope"][None])


def unused(p, x):
    _ = x @ p["v"]
    return x @ p["w"]


IDS = np.array([2, 0, 3, 0], np.int32)
ADDED = ((4, 4), "added")
ADDED_VECTOR, SCALE = ((4,), "added"), ((4,), "scale")

OTHERS = {
    "embedding": plain(
        lambda p, ids: p["table"][ids] @ p["w"],
        {"table": ((4, 4), "lookup table"), "w": IN_OUT},
        IDS,
    ),
    "embedding_tied": plain(
        tied_embedding, {"table": OUT_IN, "b": BIAS}, IDS, biases={"table": "b"}
    ),
    "embedding_one_hot_tied": plain(tied_one_hot, {"table": ((4, 4), "two roles")}, IDS),
    "relative_positions": plain(relative_positions, {"table": ((4, 4), "constant")}, X4),
    "relative_positions_gathered": plain(relative_positions_gathered, {"table": ADDED}, X4),
    "latents": plain(latents, {"latents": ((4, 4), "input of"), "w": IN_OUT}, X3),
    "vision_transformer_input": plain(
        vision_transformer_input,
        {"token": ADDED_VECTOR, "positions": ADDED, "w": IN_OUT, "b": BIAS, "head": IN_OUT},
        (4, 3, 4),
        biases={"w": "b"},
    ),
    "positions_after_a_sum": plain(
        lambda p, x: x @ p["w"] + p["positions"][None], {"w": IN_OUT, "positions": ADDED}, X3
    ),
    "positions_gathered": plain(
        lambda p, x: x @ p["w"] + p["positions"][jnp.arange(4)][None],
        {"w": IN_OUT, "positions": ADDED},
        X3,
    ),
    "added_along_the_batch": plain(
        lambda p, x: x @ p["w"] + p["b"][:, None], {"w": IN_OUT, "b": ADDED_VECTOR}
    ),
    "added_to_two_neurons": plain(
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) * (x @ p["v"] + p["b"][None]),
        {"w": IN_OUT, "v": IN_OUT, "b": ADDED_VECTOR},
    ),
    "added_to_the_sum_of_two_neurons": plain(
        lambda p, x, h: jnp.tanh((x @ p["w"] + h @ p["v"]) + p["b"][None]),
        {"w": IN_OUT, "v": IN_OUT, "b": ADDED_VECTOR},
        (4, 4),
        (4, 4),
    ),
    "layer_norm": plain(layer_norm, {"scale": SCALE, "bias": ADDED_VECTOR}),
    "layer_norm_after_a_sum": plain(
        lambda p, x: layer_norm(p, x @ p["w"]),
        {"w": IN_OUT, "scale": SCALE, "bias": ADDED_VECTOR},
    ),
    "mean_only_batch_norm": plain(
        mean_only_batch_norm, {"w": IN_OUT, "b": BIAS}, biases={"w": "b"}
    ),
    "prelu": plain(prelu, {"w": IN_OUT, "slope": SCALE}),
    "unused": plain(unused, {"w": IN_OUT, "v": ((4, 4), "unused")}),
}

CASES = {**DOTS, **ATTENTION, **CONVS, **FACTORS, **BILINEAR, **CAPTURED, **PARTS, **OTHERS}

# Their norms count entries that the neurons do not sum over.
MASKED = {
    "masked", "masked_by_where", "masked_inputs", "masked_in_one_einsum", "masked_and_expanded",
    "rows_set_to_zero", "part_updated", "conv_masked",
}  # fmt: skip
