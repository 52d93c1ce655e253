"""What every parameter of a Flax layer is, derived by hand: Linen and NNX.

As in `traced_layers`, all sizes are 4 where possible, heads, head sizes and kernel sizes too.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.traced_layers import IDS, NO_BIASES, X3, X4, Case, arrays


def linen(module, expected, *inputs, biases=NO_BIASES):
    """A case of a Linen module; other collections than its params are constants."""

    def build():
        args = tuple(arrays(inputs or [(4, 4)], 1))
        variables = module.clone().init(jax.random.key(0), *args)
        params = variables.pop("params")

        def fn(params, *args):
            return module.apply({"params": params, **variables}, *args, mutable=list(variables))[0]

        return fn, params, args

    return Case(build, expected, biases)


def from_nnx(make, expected, *inputs, biases=NO_BIASES):
    """A case of the NNX module that `make` gives for some `nnx.Rngs`."""

    def build():
        graph, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)

        def fn(params, *args):
            return nnx.merge(graph, params, rest, copy=True)(*args)

        return fn, params, tuple(arrays(inputs or [(4, 4)], 1))

    return Case(build, expected, biases)


def layer(axes):
    """What a layer of a kernel and a bias is, by the feature axes of its kernel."""
    return {"kernel": axes, "bias": "bias of"}


def biased(*modules):
    """The biases of these modules, each of which has a kernel and a bias."""
    return {f"{module}/kernel": f"{module}/bias" for module in modules}


BIASED = {"kernel": "bias"}
PARTITIONED = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))

LINEAR = {
    "dense": linen(nn.Dense(4), layer((1,)), biases=BIASED),
    "dense_no_bias": linen(nn.Dense(4, use_bias=False), {"kernel": (1,)}),
    "dense_of_a_vector": linen(nn.Dense(4), layer((1,)), (4,), biases=BIASED),
    "dense_one_unit": linen(nn.Dense(1), layer((1,)), biases=BIASED),
    "dense_bfloat16": linen(nn.Dense(4, dtype=jnp.bfloat16), layer((1,)), biases=BIASED),
    "dense_partitioned": linen(nn.Dense(4, kernel_init=PARTITIONED), layer((1,)), biases=BIASED),
    "dense_general_in": linen(nn.DenseGeneral(4, axis=(-2, -1)), layer((2,)), X3, biases=BIASED),
    "dense_general_in_middle": linen(nn.DenseGeneral(4, axis=1), layer((1,)), X3, biases=BIASED),
    "dense_general_out": linen(nn.DenseGeneral((4, 4)), layer((1, 2)), X3, biases=BIASED),
    "dense_general_both": linen(
        nn.DenseGeneral((4, 4), axis=(-2, -1)), layer((2, 3)), X3, biases=BIASED
    ),
    "dense_general_batch_dims": linen(
        nn.DenseGeneral(4, batch_dims=(0,)), layer((0, 2)), X3, biases=BIASED
    ),
    "einsum": linen(nn.Einsum((4, 4, 4), "bti,hik->bthk"), layer((0, 2)), X3, biases=BIASED),
    "einsum_kernel_order": linen(
        nn.Einsum((4, 4, 4), "bti,khi->bthk"), layer((0, 1)), X3, biases=BIASED
    ),
    "embed": linen(nn.Embed(4, 4), {"embedding": "lookup table"}, IDS),
}


def conv(inputs, *args, axes=(3,), kind=nn.Conv, **kwargs):
    return linen(kind(*args, **kwargs), layer(axes), inputs, biases=BIASED)


SQUARE = (4, 4)
CONVS = {
    "conv_1d": conv(X3, 4, (4,), axes=(2,)),
    "conv_2d": conv(X4, 4, SQUARE),
    "conv_3d": conv((2, 4, 4, 4, 4), 4, (4, 4, 4), axes=(4,)),
    "conv_strided": conv(X4, 4, SQUARE, strides=2),
    "conv_kernel_dilation": conv(X4, 4, SQUARE, kernel_dilation=2),
    "conv_input_dilation": conv(X4, 4, SQUARE, input_dilation=2, padding=[(2, 2), (2, 2)]),
    "conv_circular": conv(X4, 4, SQUARE, padding="CIRCULAR"),
    "conv_causal": conv(X3, 4, (4,), padding="CAUSAL", axes=(2,)),
    "conv_no_batch": conv(X3, 4, SQUARE),
    "conv_one_by_one": conv(X4, 4, (1, 1)),
    "conv_grouped": conv(X4, 4, SQUARE, feature_group_count=2),
    "conv_depthwise": conv(X4, 4, SQUARE, feature_group_count=4),
    "conv_depthwise_multiplier": conv(X4, 8, SQUARE, feature_group_count=4),
    "conv_masked": conv(X3, 4, (4,), mask=np.ones((4, 4, 4), np.float32), axes=(2,)),
    "conv_no_bias": linen(nn.Conv(4, SQUARE, use_bias=False), {"kernel": (3,)}, X4),
    "conv_transpose_2d": conv(X4, 4, SQUARE, strides=(2, 2), kind=nn.ConvTranspose),
    "conv_transpose_kernel": conv(
        X4, 4, SQUARE, kind=nn.ConvTranspose, transpose_kernel=True, axes=(2,)
    ),
    "conv_transpose_circular": conv(
        X4, 4, SQUARE, strides=(2, 2), padding="CIRCULAR", kind=nn.ConvTranspose
    ),
    "conv_local_1d": conv(X3, 4, (4,), kind=nn.ConvLocal, axes=(0, 2)),
    "conv_local_2d": conv(X4, 4, SQUARE, kind=nn.ConvLocal, axes=(0, 1, 3)),
}

ATTENTION = {
    "(.*/)?(query|key|value)/kernel": (1, 2),
    "(.*/)?out/kernel": (2,),
    "(.*/)?(query|key|value|out)/bias": "bias of",
}
ATTENTION_BIASES = biased("query", "key", "value", "out")
HEADS = {"num_heads": 4, "qkv_features": 16}


class FusedQKV(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.split(nn.Dense(48, name="qkv")(x).reshape(4, 4, 4, 12), 3, axis=-1)
        y = nn.dot_product_attention(q, k, v)
        return nn.DenseGeneral(4, axis=(-2, -1), name="out")(y)


class Probe(nn.Module):
    """Attention pooling, whose query is a parameter."""

    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.normal(), (1, 4, 4))
        probe = jnp.tile(probe, (x.shape[0], 1, 1))
        return nn.MultiHeadDotProductAttention(**HEADS, name="attention")(probe, x)


class Block(nn.Module):
    """A Transformer block, to be called in a loop."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        x += nn.MultiHeadDotProductAttention(**HEADS, name="attention")(y, y)
        return x + nn.Dense(4, name="down")(nn.gelu(nn.Dense(4, name="up")(x))), None


BLOCK_LAYERS = [*(f"attention/{n}" for n in ("query", "key", "value", "out")), "up", "down"]


def block(projection, out, dense):
    """What a block is at any depth, by the feature axes of its kernels."""
    return {
        "(.*/)?(query|key|value)/kernel": projection,
        "(.*/)?out/kernel": out,
        "(.*/)?(up|down)/kernel": dense,
        "(.*/)?(query|key|value|out|up|down)/bias": "bias of",
        "(.*/)?LayerNorm_0/scale": "scale",
        "(.*/)?LayerNorm_0/bias": "added",
    }


def stack(module, axis):
    return nn.scan(module, variable_axes={"params": axis}, split_rngs={"params": True}, length=4)


def stacked(module, prefix, *axes):
    expected = block(*axes)
    biases = biased(*(prefix + name for name in BLOCK_LAYERS))
    return linen(module, expected, X3, biases=biases)


class VisionTransformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (4, 1), strides=(4, 1), name="patches")(x)[:, 0]
        token = self.param("token", nn.initializers.normal(), (1, 1, 4))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x += self.param("positions", nn.initializers.normal(), (1, 5, 4))
        x, _ = Block(name="block")(x)
        return nn.Dense(4, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


class LanguageModel(nn.Module):
    """A Transformer whose embedding is its head as well."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(4, 4, name="embed")
        positions = nn.Embed(4, 4, name="positions")
        x, _ = Block(name="block")(embed(ids) + positions(jnp.arange(4))[None])
        return embed.attend(x)


TRANSFORMERS = {
    "attention_self": linen(
        nn.MultiHeadDotProductAttention(**HEADS), ATTENTION, X3, biases=ATTENTION_BIASES
    ),
    "attention_cross": linen(
        nn.MultiHeadDotProductAttention(**HEADS), ATTENTION, X3, X3, biases=ATTENTION_BIASES
    ),
    "attention_no_bias": linen(
        nn.MultiHeadDotProductAttention(**HEADS, use_bias=False),
        {"(query|key|value)/kernel": (1, 2), "out/kernel": (2,)},
        X3,
    ),
    "attention_normalized": linen(
        nn.MultiHeadDotProductAttention(**HEADS, normalize_qk=True),
        {**ATTENTION, "(query|key)_ln/scale": "scale"},
        X3,
        biases=ATTENTION_BIASES,
    ),
    "attention_fused": linen(
        FusedQKV(),
        {"qkv/kernel": (1,), "out/kernel": (2,), "(qkv|out)/bias": "bias of"},
        X3,
        biases=biased("qkv", "out"),
    ),
    "attention_probe": linen(
        Probe(),
        {**ATTENTION, "probe": "input of"},
        X3,
        biases=biased(*BLOCK_LAYERS[:4]),
    ),
    "vision_transformer": linen(
        VisionTransformer(),
        {
            **block((1, 2), (2,), (1,)),
            "patches/kernel": (3,),
            "head/kernel": (1,),
            "(patches|head)/bias": "bias of",
            "token|positions|norm/bias": "added",
            "norm/scale": "scale",
        },
        X4,
        biases=biased("patches", "head", *(f"block/{name}" for name in BLOCK_LAYERS)),
    ),
    "language_model_tied": linen(
        LanguageModel(),
        {
            **block((1, 2), (2,), (1,)),
            "embed/embedding": (0,),
            "positions/embedding": "added",
        },
        np.stack([IDS, IDS]),
        biases=biased(*(f"block/{name}" for name in BLOCK_LAYERS)),
    ),
    "stack_axis_0": stacked(stack(Block, 0)(), "", (0, 2, 3), (0, 3), (0, 2)),
    "stack_axis_1": stacked(stack(Block, 1)(), "", (1, 2, 3), (1, 3), (1, 2)),
    "stack_remat": stacked(
        stack(nn.remat(Block, prevent_cse=False), 1)(), "", (1, 2, 3), (1, 3), (1, 2)
    ),
    "stack_nested": stacked(stack(stack(Block, 0), 0)(), "", (0, 1, 3, 4), (0, 1, 4), (0, 1, 3)),
    "stack_nested_axes": stacked(
        stack(stack(Block, 1), 0)(), "", (0, 2, 3, 4), (0, 2, 4), (0, 2, 3)
    ),
}


def recurrent(cell, kernels, biases, reverse=False):
    return linen(
        nn.RNN(cell, reverse=reverse),
        {"cell/[^/]*/kernel": kernels, "cell/[^/]*/bias": "bias of"},
        X3 if kernels == (1,) else X4,
        biases=biases,
    )


LSTM_BIASES = biased("cell/hi", "cell/hf", "cell/hg", "cell/ho")
GRU_BIASES = biased("cell/ir", "cell/iz", "cell/in", "cell/hn")
RECURRENT = {
    "lstm": recurrent(nn.LSTMCell(4), (1,), LSTM_BIASES),
    "lstm_reverse": recurrent(nn.LSTMCell(4), (1,), LSTM_BIASES, reverse=True),
    "lstm_optimized": recurrent(nn.OptimizedLSTMCell(4), (1,), None),
    "lstm_conv": recurrent(nn.ConvLSTMCell(4, (4,)), (2,), biased("cell/ih", "cell/hh")),
    "gru": recurrent(nn.GRUCell(4), (1,), GRU_BIASES),
    "mgu": recurrent(nn.MGUCell(4), (1,), biased("cell/if", "cell/in", "cell/hn")),
    "simple_cell": recurrent(nn.SimpleCell(4), (1,), biased("cell/i")),
    "bidirectional": linen(
        nn.Bidirectional(nn.RNN(nn.LSTMCell(4)), nn.RNN(nn.GRUCell(4))),
        {".*/kernel": (1,), ".*/bias": "bias of"},
        X3,
        biases={
            f"{direction}_rnn/{kernel}": f"{direction}_rnn/{bias}"
            for direction, pairs in (("forward", LSTM_BIASES), ("backward", GRU_BIASES))
            for kernel, bias in pairs.items()
        },
    ),
}


class SpectrallyNormalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, use_bias=False, name="dense")
        return nn.SpectralNorm(layer, name="norm")(x, update_stats=True)


class DenseStep(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(4)(x))


def experts(module, in_axes, out_axis=0, axis=0):
    return nn.vmap(
        module,
        in_axes=in_axes,
        out_axes=out_axis,
        axis_size=4,
        variable_axes={"params": axis},
        split_rngs={"params": True},
    )


def normalized(norm):
    """A convolution and a normalization of its sums, whose bias is no neuron's bias."""
    return linen(
        nn.Sequential([nn.Conv(4, SQUARE, use_bias=False), norm]),
        {"layers_0/kernel": (3,), "layers_1/scale": "scale", "layers_1/bias": "added"},
        X4,
    )


OTHERS = {
    "batch_norm": normalized(nn.BatchNorm(use_running_average=False)),
    "group_norm": normalized(nn.GroupNorm(2)),
    "layer_norm_of_sums": normalized(nn.LayerNorm()),
    "rms_norm": linen(nn.RMSNorm(), {"scale": "scale"}),
    "weight_norm_wrapper": linen(
        nn.WeightNorm(nn.Dense(4, use_bias=False)),
        {".*/kernel": "own statistics", ".*/scale": "scale"},
    ),
    "spectral_norm_wrapper": linen(SpectrallyNormalized(), {".*kernel": "own statistics"}),
    "experts_vmapped": linen(experts(nn.Dense, 0)(4), layer((0, 2)), X3, biases=BIASED),
    "experts_vmapped_shared_input": linen(
        experts(nn.Dense, None, 1, 1)(4), layer((1, 2)), biases=BIASED
    ),
    "experts_vmapped_conv": linen(
        experts(nn.Conv, None)(4, SQUARE), layer((0, 4)), X4, biases=BIASED
    ),
    "remat_scan": linen(
        nn.remat_scan(DenseStep, lengths=(2, 2))(),
        {".*/kernel": (0, 1, 3), ".*/bias": "bias of"},
        biases=biased("Dense_0"),
    ),
}


class NnxStack(nnx.Module):
    """Four layers in one, made by `nnx.vmap` and called by `nnx.scan`."""

    def __init__(self, rngs, axis):
        def make(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.axis = axis
        self.layers = nnx.split_rngs(splits=4)(nnx.vmap(make, out_axes=axis))(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(self.axis, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def step(layer, x):
            return jnp.tanh(layer(x))

        return step(self.layers, x)


class NnxTied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(4, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs)])

    def __call__(self, ids):
        return self.embed.attend(self.layers[0](self.embed(ids)))


def nnx_layer(make, axes, inputs=(4, 4)):
    return from_nnx(make, layer(axes), inputs, biases=BIASED)


def nnx_attention(rngs):
    return nnx.MultiHeadAttention(4, 4, qkv_features=16, decode=False, rngs=rngs)


def nnx_recurrent(cell, biases):
    return from_nnx(
        lambda rngs: nnx.RNN(cell(4, 4, rngs=rngs), rngs=rngs),
        {"cell/[^/]*/kernel": (1,), "cell/[^/]*/bias": "bias of"},
        X3,
        biases=biases,
    )


def nnx_bidirectional(rngs):
    first, second = (nnx.RNN(nnx.GRUCell(4, 4, rngs=rngs), rngs=rngs) for _ in range(2))
    return nnx.Bidirectional(first, second, rngs=rngs)


NNX = {
    "nnx_linear": nnx_layer(lambda rngs: nnx.Linear(4, 4, rngs=rngs), (1,)),
    "nnx_linear_general": nnx_layer(
        lambda rngs: nnx.LinearGeneral((4, 4), (4, 4), axis=(-2, -1), rngs=rngs), (2, 3), X3
    ),
    "nnx_conv": nnx_layer(lambda rngs: nnx.Conv(4, 4, SQUARE, rngs=rngs), (3,), X4),
    "nnx_conv_grouped": nnx_layer(
        lambda rngs: nnx.Conv(4, 4, SQUARE, feature_group_count=2, rngs=rngs), (3,), X4
    ),
    "nnx_conv_transpose": nnx_layer(
        lambda rngs: nnx.ConvTranspose(4, 4, SQUARE, rngs=rngs), (3,), X4
    ),
    "nnx_conv_transpose_kernel": nnx_layer(
        lambda rngs: nnx.ConvTranspose(4, 4, SQUARE, transpose_kernel=True, rngs=rngs), (2,), X4
    ),
    "nnx_einsum": nnx_layer(
        lambda rngs: nnx.Einsum("bti,hik->bthk", (4, 4, 4), (4, 4), rngs=rngs), (0, 2), X3
    ),
    "nnx_attention_self": from_nnx(nnx_attention, ATTENTION, X3, biases=ATTENTION_BIASES),
    "nnx_attention_cross": from_nnx(nnx_attention, ATTENTION, X3, X3, biases=ATTENTION_BIASES),
    "nnx_lora": from_nnx(
        lambda rngs: nnx.LoRA(4, 4, 4, base_module=nnx.Linear(4, 4, rngs=rngs), rngs=rngs),
        {"lora_[ab]": (1,), "base_module/kernel": (1,), "base_module/bias": "bias of"},
        biases=biased("base_module"),
    ),
    "nnx_lora_linear": from_nnx(
        lambda rngs: nnx.LoRALinear(4, 4, lora_rank=4, use_bias=False, rngs=rngs),
        {"lora/lora_[ab]": (1,), "kernel": (1,)},
    ),
    "nnx_lstm": nnx_recurrent(nnx.LSTMCell, LSTM_BIASES),
    "nnx_lstm_optimized": nnx_recurrent(nnx.OptimizedLSTMCell, biased("cell/dense_h")),
    "nnx_gru": nnx_recurrent(nnx.GRUCell, biased("cell/dense_i")),
    "nnx_bidirectional": from_nnx(
        nnx_bidirectional,
        {".*/kernel": (1,), ".*/bias": "bias of"},
        X3,
        biases=biased("forward_rnn/cell/dense_i", "backward_rnn/cell/dense_i"),
    ),
    "nnx_embed_tied": from_nnx(
        NnxTied,
        {"embed/embedding": (0,), "layers/0/kernel": (1,), "layers/0/bias": "bias of"},
        IDS,
        biases=biased("layers/0"),
    ),
    "nnx_stack_axis_0": from_nnx(
        lambda rngs: NnxStack(rngs, 0),
        {"layers/kernel": (0, 2), "layers/bias": "bias of"},
        biases=biased("layers"),
    ),
    "nnx_stack_axis_1": from_nnx(
        lambda rngs: NnxStack(rngs, 1),
        {"layers/kernel": (1, 2), "layers/bias": "bias of"},
        biases=biased("layers"),
    ),
    "nnx_batch_norm": from_nnx(
        lambda rngs: nnx.Sequential(
            nnx.Linear(4, 4, use_bias=False, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        ),
        {"layers/0/kernel": (1,), "layers/1/scale": "scale", "layers/1/bias": "added"},
    ),
}

CASES = {**LINEAR, **CONVS, **TRANSFORMERS, **RECURRENT, **OTHERS, **NNX}
