"""Whole models in which every leaf's role is known, with axes worked out by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests import traced_models_generative as generative


class Model(NamedTuple):
    """A model and what each leaf of its parameters is.

    build: build(True) is (fn, params, args) at full size with only shapes; build(False) is the
      same code at a tiny size, where many axes are equally long, with values.
    expected: a regular expression for slash paths -> the feature axes of a weight, or words of
      the reason why a leaf is no weight; each leaf fully matches exactly one.
    biases: a regular expression for the paths of weights -> template of the path of the bias;
      a weight that matches none has no bias. None: not checked.
    """

    build: Callable[[bool], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
    expected: dict[str, tuple[int, ...] | str]
    biases: dict[str, str] | None


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def concrete(tree, std=None):
    """Random values for a tree of shapes: all scales and variances are near one."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(8, size=leaf.shape), leaf.dtype)
        noise = rng.normal(size=leaf.shape)
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if {"scale", "var"} & set(names):
            noise = 1 + 0.1 * noise
        elif std is not None:
            noise *= std
        elif leaf.ndim < 2:
            noise *= 0.1
        else:
            noise *= (leaf.size / leaf.shape[-1]) ** -0.5
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


BIASES = {r"(.*)/kernel": r"\1/bias"}
HEAD_BIAS = {r"(Dense_0)/kernel": r"\1/bias"}


def linen(module, sizes, inputs, expected, biases=BIASES):
    """A `Model` of a Linen module.

    sizes: its attributes at full and at tiny size, the latter over the former.
    inputs: a function from the module to the shapes of its inputs.
    fn takes the other collections, such as batch_stats, right after the parameters; a module
    with `train` set also returns them.
    """

    def build(abstract):
        full, tiny = sizes
        net = module(**(full if abstract else full | tiny))
        mutable = ["batch_stats"] if getattr(net, "train", False) else False
        args = inputs(net)
        state = dict(jax.eval_shape(net.init, jax.random.key(0), *args))
        params = state.pop("params")

        def fn(params, state, *args):
            return net.apply({"params": params, **state}, *args, mutable=mutable)

        if not abstract:
            params, state, args = concrete(params), concrete(state), concrete(args, std=1)
        return fn, params, (state, *args)

    return Model(build, expected, biases)


def floats(net):
    return (spec(2, *net.shape),)


def tokens(net):
    return (spec(2, net.length, dtype=jnp.int32),)


def with_key(*args):
    return (*args, jax.eval_shape(jax.random.key, 0))


NORM = {r"(.*/)?\w*Norm_\d+/scale": "scale", r"(.*/)?\w*Norm_\d+/bias": "added"}
DENSE = {r"(.*/)?Dense_\d+/kernel": (1,), r"(.*/)?Dense_\d+/bias": "bias of"}
CONV1D = {
    r"(.*/)?Conv(Transpose)?_\d+/kernel": (2,),
    r"(.*/)?Conv(Transpose)?_\d+/bias": "bias of",
}
CONV2D = {
    r"(.*/)?Conv(Transpose)?_\d+/kernel": (3,),
    r"(.*/)?Conv(Transpose)?_\d+/bias": "bias of",
}
ATTENTION = {
    r".*/(query|key|value)/kernel": (1, 2),  # (d, heads, d / heads)
    r".*/out/kernel": (2,),  # (heads, d / heads, d)
    r".*/(query|key|value|out)/bias": "bias of",
}


# Residual networks ---------------------------------------------------------------------------


class Bottleneck(nn.Module):
    width: int
    strides: int
    train: bool

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not self.train)
        y = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.width, (3, 3), strides=self.strides)(y)))
        y = norm()(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.width, (1, 1), strides=self.strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    shape: tuple[int, ...]
    stages: tuple[int, ...]
    width: int
    classes: int
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (7, 7), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = Bottleneck(self.width * 2**i, 2 if i and not j else 1, self.train)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


# Transformers --------------------------------------------------------------------------------


class Mlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(self.hidden)(x))
        return nn.Dense(x.shape[-1])(y)


class Layer(nn.Module):
    """A transformer layer, with cross attention if there is a memory."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x, mask=None, memory=None):
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        if memory is not None:
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), memory)
        return x + Mlp(self.hidden)(nn.LayerNorm()(x))


class Vit(nn.Module):
    shape: tuple[int, ...]
    patch: int
    dim: int
    layers: int
    heads: int
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.dim, (self.patch,) * 2, strides=self.patch)(x)
        x = x.reshape(len(x), -1, self.dim)
        first = self.param("class", nn.initializers.zeros, (1, 1, self.dim))
        x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x], 1)
        x = x + self.param("positions", nn.initializers.zeros, (1, *x.shape[1:]))
        for _ in range(self.layers):
            x = Layer(self.heads, self.hidden)(x)
        return nn.Dense(self.classes)(nn.LayerNorm()(x[:, 0]))


class GptLayer(nn.Module):
    """A decoder layer whose queries, keys and values come from one kernel."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(3 * x.shape[-1])(nn.LayerNorm()(x))
        qkv = (z.reshape(*z.shape[:-1], self.heads, -1) for z in jnp.split(y, 3, -1))
        causal = nn.make_causal_mask(x[..., 0])
        x = x + nn.Dense(x.shape[-1])(nn.dot_product_attention(*qkv, mask=causal).reshape(x.shape))
        return x + Mlp(self.hidden)(nn.LayerNorm()(x)), None


class Gpt(nn.Module):
    vocab: int
    length: int
    dim: int
    layers: int
    heads: int
    hidden: int
    scan: bool = False

    @nn.compact
    def __call__(self, tokens):
        tokens = tokens[:, :-1]
        table = nn.Embed(self.vocab, self.dim, name="tokens")
        x = table(tokens)
        if self.scan:
            shape = (self.length, self.dim)
            x = x + self.param("positions", nn.initializers.zeros, shape)[None, : x.shape[1]]
            layer = nn.scan(
                nn.remat(GptLayer, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.layers,
            )
            x, _ = layer(self.heads, self.hidden, name="layers")(x, None)
        else:
            index = jnp.arange(x.shape[1])[None]
            x = x + nn.Embed(self.length, self.dim, name="positions")(index)
            for _ in range(self.layers):
                x, _ = GptLayer(self.heads, self.hidden)(x, None)
        return table.attend(nn.LayerNorm()(x))


class Seq2Seq(nn.Module):
    """An encoder and a decoder that share both tables."""

    vocab: int
    length: int
    dim: int
    layers: int
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, source, target):
        table = nn.Embed(self.vocab, self.dim, name="tokens")
        shape = (self.length, self.dim)
        positions = self.param("positions", nn.initializers.zeros, shape)[None]
        x = table(source) + positions
        for _ in range(self.layers):
            x = Layer(self.heads, self.hidden)(x)
        memory = nn.LayerNorm()(x)
        target = target[:, :-1]
        y = table(target) + positions[:, :-1]
        for _ in range(self.layers):
            y = Layer(self.heads, self.hidden)(y, nn.make_causal_mask(target), memory)
        return table.attend(nn.LayerNorm()(y))


class NnxLayer(nnx.Module):
    def __init__(self, dim, heads, hidden, rngs):
        self.norm_1 = nnx.LayerNorm(dim, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, dim, decode=False, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(dim, rngs=rngs)
        self.up = nnx.Linear(dim, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, dim, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm_1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class NnxGpt(nnx.Module):
    def __init__(self, sizes, rngs):
        vocab, dim = sizes["vocab"], sizes["dim"]
        self.tokens = nnx.Embed(vocab, dim, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((sizes["length"], dim)))
        layer = partial(NnxLayer, dim, sizes["heads"], sizes["hidden"], rngs)
        self.layers = nnx.List([layer() for _ in range(sizes["layers"])])
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.head = nnx.Linear(dim, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions[...][None]
        for layer in self.layers:
            x = layer(x, nnx.make_causal_mask(tokens))
        return self.head(self.norm(x))


def build_gpt_nnx(abstract):
    sizes = {**GPT2[0], "layers": 8} if abstract else SMALL
    args = (spec(2, sizes["length"], dtype=jnp.int32),)
    net = nnx.eval_shape(lambda: NnxGpt(sizes, nnx.Rngs(0)))
    graph, params = nnx.split(net, nnx.Param)
    if not abstract:
        params, args = concrete(params), concrete(args)
    return lambda params, tokens: nnx.merge(graph, params)(tokens), params, args


class Mixer(nn.Module):
    shape: tuple[int, ...]
    patch: int
    dim: int
    layers: int
    hidden: tuple[int, int]
    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.dim, (self.patch,) * 2, strides=self.patch)(x)
        x = x.reshape(len(x), -1, self.dim)
        for _ in range(self.layers):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            x = x + Mlp(self.hidden[0])(y).swapaxes(1, 2)
            x = x + Mlp(self.hidden[1])(nn.LayerNorm()(x))
        return nn.Dense(self.classes)(nn.LayerNorm()(x).mean(1))


class LstmLm(nn.Module):
    vocab: int
    length: int
    dim: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab, self.dim)(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(self.dim, name="cell"))(x)
        return nn.Dense(self.vocab)(x)


# The table -----------------------------------------------------------------------------------


def stylegan(on_output, weight):
    """Demodulation or noise comes between a convolution and its bias."""
    widths = (512, 512, 512, 512, 256, 128, 64)
    full = {"latent": 512, "mapping": 8, "start": 4, "widths": widths, "on_output": on_output}
    return linen(
        generative.StyleGan,
        (full, {"latent": 4, "mapping": 1, "widths": (4, 4)}),
        lambda net: with_key(spec(2, net.latent)),
        {
            **DENSE,
            r"constant": "added",
            r"(conv|up)_\d+/weight": weight,
            r"(conv|up)_\d+/strength": "scale",
            r"(conv|up)_\d+/bias": "added",
            r"rgb_\d+/weight": (3,),
            r"rgb_\d+/bias": "bias of",
        },
        BIASES | {r"(rgb_\d+)/weight": r"\1/bias"},
    )


SMALL = {"vocab": 16, "length": 16, "dim": 16, "layers": 1, "heads": 4, "hidden": 16}
GPT2 = (
    {"vocab": 50257, "length": 1024, "dim": 1024, "layers": 24, "heads": 16, "hidden": 4096},
    SMALL,
)
SCANNED = ({**GPT2[0], "scan": True}, {**SMALL, "layers": 16})
BASE = (
    {"vocab": 32000, "length": 256, "dim": 512, "layers": 6, "heads": 8, "hidden": 2048},
    SMALL,
)
B16 = {"patch": 16, "dim": 768, "layers": 12, "classes": 1000, "shape": (224, 224, 3)}
PATCHES = {"patch": 4, "dim": 16, "layers": 1, "classes": 16, "shape": (16, 16, 16)}
VIT = ({**B16, "heads": 12, "hidden": 3072}, {**PATCHES, "heads": 4, "hidden": 16})
MIXER = ({**B16, "hidden": (384, 3072)}, {**PATCHES, "hidden": (16, 16)})
LSTM = ({"vocab": 10000, "length": 64, "dim": 512}, {"vocab": 16, "length": 16, "dim": 16})
RESNET50 = {"shape": (224, 224, 3), "stages": (3, 4, 6, 3), "width": 64, "classes": 1000}
RESNET14 = {"shape": (64, 64, 3), "stages": (2, 2), "width": 32, "classes": 10, "train": True}
BOTTLENECKS = {"shape": (32, 32, 8), "stages": (1, 1), "width": 8, "classes": 8}
BOTTLENECK = {**BOTTLENECKS, "stages": (1,)}
UNET = (
    {"shape": (64, 64, 3), "widths": (128, 256, 512), "groups": 32},
    {"shape": (8, 8, 8), "widths": (8, 8, 8), "groups": 4},
)
WAVENET = (
    {"shape": (4096, 1), "width": 64, "layers": 30, "outputs": 256},
    {"shape": (8, 8), "width": 8, "layers": 3, "outputs": 8},
)
HIFIGAN = (
    {
        "shape": (64, 80),
        "widths": (512, 256, 128, 64, 32),
        "rates": (8, 8, 2, 2),
        "kernels": (3, 7, 11),
        "dilations": (1, 3, 5),
    },
    {"shape": (8, 8), "widths": (8, 8, 8), "rates": (2, 2), "kernels": (2, 3), "dilations": (1, 2)},
)
VAE = (
    {"shape": (32, 32, 3), "widths": (64, 128), "latent": 64},
    {"shape": (8, 8, 8), "widths": (8, 8), "latent": 8},
)
TABLE = {r"tokens/embedding": (0,)}  # (vocab, d): the head sums over d
CONVNET = CONV2D | DENSE | NORM
TRANSFORMER = DENSE | NORM | ATTENTION


MODELS = {
    "resnet50": linen(ResNet, (RESNET50, BOTTLENECKS), floats, CONVNET, HEAD_BIAS),
    "resnet_train": linen(ResNet, (RESNET14, BOTTLENECK), floats, CONVNET, HEAD_BIAS),
    "vit": linen(Vit, VIT, floats, TRANSFORMER | CONV2D | {r"class|positions": "added"}),
    "gpt": linen(Gpt, GPT2, tokens, DENSE | NORM | TABLE | {r"positions/embedding": "added"}),
    "gpt_scan": linen(
        Gpt,
        SCANNED,
        tokens,
        {
            **NORM,
            **TABLE,
            r"layers/.*Dense_\d/kernel": (0, 2),  # (layers, inputs, outputs)
            r"layers/.*Dense_\d/bias": "bias of",
            r"positions": "added",
        },
    ),
    "gpt_nnx": Model(
        build_gpt_nnx,
        {
            **ATTENTION,
            r"tokens/embedding": "lookup table",
            r"positions": "added",
            r"(.*/)?norm\w*/scale": "scale",
            r"(.*/)?norm\w*/bias": "added",
            r".*/(up|down)/kernel|head/kernel": (1,),
            r".*/(up|down)/bias": "bias of",
        },
        {r"(layers/.*)/kernel": r"\1/bias"},
    ),
    "seq2seq": linen(
        Seq2Seq,
        BASE,
        lambda net: tokens(net) * 2,
        TRANSFORMER | TABLE | {r"positions": "added"},
    ),
    "mixer": linen(Mixer, MIXER, floats, CONVNET),
    "lstm_lm": linen(
        LstmLm,
        LSTM,
        tokens,
        {
            **DENSE,
            r"Embed_0/embedding": "lookup table",
            r"cell/[ih][ifgo]/kernel": (1,),
            r"cell/h[ifgo]/bias": "bias of",
        },
        # A gate adds its bias to the sum over the state, and then the sum over the input.
        HEAD_BIAS | {r"(cell/h[ifgo])/kernel": r"\1/bias"},
    ),
    "unet": linen(
        generative.Unet,
        UNET,
        lambda net: (*floats(net), spec(2)),
        {
            **CONVNET,
            r"transposed/kernel": (2,),  # transpose_kernel: (height, width, outputs, inputs)
            r"transposed/bias": "bias of",
        },
    ),
    "wavenet": linen(
        generative.Wavenet,
        WAVENET,
        floats,
        {
            **CONV1D,
            r".*/(gate|skip)/kernel|layer_\d+/residual/kernel": (2,),
            r".*/(gate|skip)/bias|layer_\d+/residual/bias": "bias of",
            r"last/residual/.*": "unused",
        },
    ),
    "vocoder": linen(generative.Vocoder, HIFIGAN, floats, CONV1D),
    "vae": linen(generative.Vae, VAE, lambda net: with_key(*floats(net)), CONV2D | DENSE),
    "stylegan": stylegan(False, "own statistics"),
    "stylegan_out": stylegan(True, (3,)),
}
