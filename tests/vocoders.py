"""The Flax counterparts of the PyTorch modules in tests/golden/torch_modules.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from wnjax.pytorch import Part


def transposed_padding(taps, padding, output_padding=0, dilation=1):
    """PyTorch's padding of a transposed convolution, as Flax takes it, for one axis."""
    before = dilation * (taps - 1) - padding
    return before, before + output_padding


class GroupedConvTranspose(nn.Module):
    """A transposed convolution in groups, which Flax does not have.

    The kernel is (*taps, out/groups, in), as with `ConvTranspose(transpose_kernel=True)`: so
    the gain of an input channel, which is what PyTorch's are, is that of a slice.
    """

    features: int
    taps: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @nn.compact
    def __call__(self, x):
        inputs, outputs = x.shape[-1] // self.groups, self.features // self.groups
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (*self.taps, outputs, x.shape[-1]))
        kernel = kernel.reshape(*self.taps, outputs, self.groups, inputs)
        kernel = jnp.moveaxis(kernel, (-1, -2, -3), (-3, -2, -1))
        kernel = kernel.reshape(*self.taps, inputs, self.features)
        letters = "DHW"[-len(self.taps) :]
        y = jax.lax.conv_general_dilated(
            x,
            jnp.flip(kernel, range(len(self.taps))),
            (1,) * len(self.taps),
            self.padding,
            lhs_dilation=self.strides,
            rhs_dilation=self.dilation,
            feature_group_count=self.groups,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class Positional(nn.Module):
    """The positional embedding of wav2vec2."""

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(4, (6,), padding=3, feature_group_count=2, name="conv")
        return x + nn.gelu(conv(x)[:, :-1], approximate=False)


def leaky(x, slope=0.01):
    return jax.nn.leaky_relu(x, slope)


class Residuals(nn.Module):
    channels: int
    taps: int

    @nn.compact
    def __call__(self, x):
        for i, dilation in enumerate((1, 3)):
            conv = nn.Conv(self.channels, (self.taps,), kernel_dilation=dilation, name=f"first_{i}")
            y = conv(leaky(x, 0.1))
            conv = nn.Conv(self.channels, (self.taps,), name=f"second_{i}")
            x = x + conv(leaky(y, 0.1))
        return x


class Generator(nn.Module):
    """The vocoder's generator, in Linen."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (7,), name="pre")(x)
        for i, (channels, stride) in enumerate(((4, 2), (2, 4))):
            pad = (transposed_padding(2 * stride, stride // 2),)
            up = nn.ConvTranspose(channels, (2 * stride,), (stride,), padding=pad, name=f"up_{i}")
            x = up(leaky(x, 0.1))
            x = (
                sum(Residuals(channels, 3 + 2 * j, name=f"stack_{2 * i + j}")(x) for j in (0, 1))
                / 2
            )
        return jnp.tanh(nn.Conv(1, (7,), name="post")(leaky(x)))


GENERATOR_NAMES = {
    r"(pre|post)/(.*)": r"conv_\1.\2",
    r"up_(\d)/(.*)": r"ups.\1.\2",
    r"stack_(\d)/first_(\d)/(.*)": r"resblocks.\1.convs1.\2.\3",
    r"stack_(\d)/second_(\d)/(.*)": r"resblocks.\1.convs2.\2.\3",
}


class NNXResiduals(nnx.Module):
    def __init__(self, channels, taps, rngs):
        def convs(*dilations):
            return nnx.List(
                nnx.Conv(channels, channels, (taps,), kernel_dilation=d, rngs=rngs)
                for d in dilations
            )

        self.convs1, self.convs2 = convs(1, 3), convs(1, 1)

    def __call__(self, x):
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + second(leaky(first(leaky(x, 0.1)), 0.1))
        return x


class NNXGenerator(nnx.Module):
    """The vocoder's generator, in NNX, with PyTorch's names."""

    def __init__(self, rngs):
        self.conv_pre = nnx.Conv(5, 8, (7,), rngs=rngs)

        def up(inputs, outputs, stride):
            pad = [transposed_padding(2 * stride, stride // 2)]
            taps = (2 * stride,)
            return nnx.ConvTranspose(inputs, outputs, taps, stride, padding=pad, rngs=rngs)

        self.ups = nnx.List([up(8, 4, 2), up(4, 2, 4)])
        self.resblocks = nnx.List(
            NNXResiduals(channels, k, rngs) for channels in (4, 2) for k in (3, 5)
        )
        self.conv_post = nnx.Conv(2, 1, (7,), rngs=rngs)

    def __call__(self, x):
        x = self.conv_pre(x)
        for i, up in enumerate(self.ups):
            x = up(leaky(x, 0.1))
            x = (self.resblocks[2 * i](x) + self.resblocks[2 * i + 1](x)) / 2
        return jnp.tanh(self.conv_post(leaky(x)))


class Sequence(nn.Module):
    """What is not normalized: a table, an LSTM, batch norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(7, 3, name="table")(x)
        x = nn.RNN(nn.OptimizedLSTMCell(4), name="lstm")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x[:, -1])
        return nn.Dense(2, name="head")(x)


def snake(x, alpha):
    alpha = alpha[None, None]
    return x + jnp.sin(alpha * x) ** 2 / alpha


class Codec(nn.Module):
    """The decoder of a codec, in Linen, with PyTorch's names: one of its layers is a `Dense`."""

    @nn.compact
    def __call__(self, x):
        x = Snake(name="snake")(x)
        pad = (transposed_padding(4, 1),)
        x = nn.ConvTranspose(4, (4,), (2,), padding=pad, name="up")(x)
        pad = (transposed_padding(3, 1),)
        x = nn.ConvTranspose(4, (3,), padding=pad, name="smooth")(x)
        y = jnp.tanh(nn.Conv(4, (3,), name="conv")(x))
        return x + nn.Dense(4, name="mix")(y)


class Snake(nn.Module):
    @nn.compact
    def __call__(self, x):
        return snake(x, self.param("alpha", nn.initializers.ones, x.shape[-1:]))


class NNXSnake(nnx.Module):
    def __init__(self, channels):
        self.alpha = nnx.Param(jnp.ones(channels))

    def __call__(self, x):
        return snake(x, self.alpha)


class NNXCodec(nnx.Module):
    """The same in NNX; one of its transposed convolutions keeps PyTorch's order of the kernel."""

    def __init__(self, rngs):
        self.snake = NNXSnake(4)
        pad = [transposed_padding(4, 1)]
        self.up = nnx.ConvTranspose(4, 4, (4,), 2, padding=pad, rngs=rngs)
        pad = [transposed_padding(3, 1)]
        self.smooth = nnx.ConvTranspose(4, 4, (3,), padding=pad, transpose_kernel=True, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3,), rngs=rngs)
        self.mix = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x = self.smooth(self.up(self.snake(x)))
        return x + self.mix(jnp.tanh(self.conv(x)))


CODEC_LAYOUTS = {"snake/alpha": "channels1d", "mix/kernel": "pointwise1d"}


class Attention(nn.Module):
    """Attention in Linen, whose query, key and value are parameters of their own."""

    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2, name="attend")(x)
        return nn.Dense(4, name="head")(x)


class NNXAttention(nnx.Module):
    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.head = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attend(x))


ATTENTION_NAMES = {
    **{
        f"attend/{name}/{leaf}": Part(f"attend.in_proj_{to}", i, 3)
        for i, name in enumerate(("query", "key", "value"))
        for leaf, to in (("kernel", "weight"), ("bias", "bias"))
    },
    r"attend/out/(.*)": r"attend.out_proj.\1",
}
