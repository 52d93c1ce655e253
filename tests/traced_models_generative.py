"""Convolutional generators: the modules of some of the models in `traced_models`."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class UnetBlock(nn.Module):
    width: int
    groups: int

    @nn.compact
    def __call__(self, x, time):
        y = nn.Conv(self.width, (3, 3))(nn.silu(nn.GroupNorm(self.groups)(x)))
        y = y + nn.Dense(self.width)(nn.silu(time))[:, None, None]
        y = nn.Conv(self.width, (3, 3))(nn.silu(nn.GroupNorm(self.groups)(y)))
        return y + (x if x.shape == y.shape else nn.Conv(self.width, (1, 1))(x))


class Unet(nn.Module):
    shape: tuple[int, ...]
    widths: tuple[int, int, int]
    groups: int

    @nn.compact
    def __call__(self, x, time):
        frequencies = jnp.exp(-jnp.arange(0.0, 8.0))
        time = nn.Dense(self.widths[0])(jnp.sin(time[:, None] * frequencies[None]))
        time = nn.Dense(self.widths[0])(nn.silu(time))
        block = partial(UnetBlock, groups=self.groups)
        a = nn.Conv(self.widths[0], (3, 3))(x)
        b = block(self.widths[1])(nn.Conv(self.widths[1], (3, 3), strides=2)(a), time)
        x = nn.Conv(self.widths[2], (3, 3), strides=2)(b)
        up = partial(nn.ConvTranspose, kernel_size=(4, 4), strides=(2, 2))
        x = up(self.widths[1])(x)
        x = block(self.widths[1])(jnp.concatenate([x, b], -1), time)
        x = up(self.widths[0], transpose_kernel=True, name="transposed")(x)
        x = block(self.widths[0])(jnp.concatenate([x, a], -1), time)
        return nn.Conv(self.shape[-1], (3, 3))(nn.silu(nn.GroupNorm(self.groups)(x)))


class WavenetLayer(nn.Module):
    width: int
    dilation: int

    @nn.compact
    def __call__(self, x):
        gate = partial(nn.Conv, kernel_dilation=self.dilation, padding="CAUSAL", name="gate")
        a, b = jnp.split(gate(2 * self.width, (2,))(x), 2, -1)
        y = jnp.tanh(a) * nn.sigmoid(b)
        skip = nn.Conv(self.width, (1,), name="skip")(y)
        return x + nn.Conv(self.width, (1,), name="residual")(y), skip


class Wavenet(nn.Module):
    """Its output needs only the skip of the last layer."""

    shape: tuple[int, int]
    width: int
    layers: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        x, skips = nn.Conv(self.width, (1,))(x), []
        for i in range(self.layers):
            name = f"layer_{i}" if i < self.layers - 1 else "last"
            x, skip = WavenetLayer(self.width, 2 ** (i % 10), name=name)(x)
            skips.append(skip)
        x = nn.Conv(self.outputs, (1,))(nn.relu(sum(skips)))
        return nn.Conv(self.outputs, (1,))(nn.relu(x))


class Vocoder(nn.Module):
    shape: tuple[int, int]
    widths: tuple[int, ...]
    rates: tuple[int, ...]
    kernels: tuple[int, ...]
    dilations: tuple[int, ...]

    def residual(self, x, kernel):
        conv = partial(nn.Conv, x.shape[-1], (kernel,))
        for dilation in self.dilations:
            y = conv(kernel_dilation=dilation)(nn.leaky_relu(x, 0.1))
            x = x + conv()(nn.leaky_relu(y, 0.1))
        return x

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.widths[0], (7,))(x)
        for width, rate in zip(self.widths[1:], self.rates, strict=True):
            x = nn.leaky_relu(x, 0.1)
            x = nn.ConvTranspose(width, (2 * rate,), strides=(rate,))(x)
            x = sum(self.residual(x, kernel) for kernel in self.kernels) / len(self.kernels)
        return jnp.tanh(nn.Conv(1, (7,))(nn.leaky_relu(x, 0.1)))


class Vae(nn.Module):
    shape: tuple[int, ...]
    widths: tuple[int, int]
    latent: int

    @nn.compact
    def __call__(self, x, key):
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (4, 4), strides=2)(x))
        shape = x.shape[1:]
        mean, log_var = jnp.split(nn.Dense(2 * self.latent)(x.reshape(len(x), -1)), 2, -1)
        z = mean + jnp.exp(log_var / 2) * jax.random.normal(key, mean.shape)
        x = nn.relu(nn.Dense(np.prod(shape))(z)).reshape(-1, *shape)
        x = nn.relu(nn.ConvTranspose(self.widths[0], (4, 4), strides=(2, 2))(x))
        return nn.ConvTranspose(self.shape[-1], (4, 4), strides=(2, 2))(x)


def convolve(x, w):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class StyleConv(nn.Module):
    width: int
    kernel: int
    on_output: bool  # demodulation scales the outputs instead of the kernel
    rgb: bool = False  # no demodulation, no noise

    @nn.compact
    def __call__(self, x, latent, noise):
        inputs, normal = x.shape[-1], nn.initializers.normal()
        style = nn.Dense(inputs, bias_init=nn.initializers.ones)(latent)
        w = self.param("weight", normal, (self.kernel, self.kernel, inputs, self.width))
        bias = self.param("bias", normal, (self.width,))[None, None, None]
        if self.on_output and not self.rgb:
            x = convolve(x * style[:, None, None], w)
            squares = jnp.einsum("hwio,bi->bo", w**2, style**2)
            x = x * lax.rsqrt(squares + 1e-8)[:, None, None]
        else:  # each example has its own kernel
            w = w[None] * style[:, None, None, :, None]
            if not self.rgb:
                w = w * lax.rsqrt(jnp.sum(w**2, (1, 2, 3), keepdims=True) + 1e-8)
            x = jax.vmap(lambda x, w: convolve(x[None], w)[0])(x, w)
        if self.rgb:
            return x + bias
        noise = noise[:, : x.shape[1], : x.shape[2]]
        return nn.leaky_relu(x + self.param("strength", normal, ()) * noise + bias, 0.2)


class StyleGan(nn.Module):
    latent: int
    mapping: int
    start: int
    widths: tuple[int, ...]
    on_output: bool = False

    @nn.compact
    def __call__(self, z, key):
        size = self.start * 2 ** (len(self.widths) - 1)
        noise = jax.random.normal(key, (len(z), size, size, 1))
        for _ in range(self.mapping):
            z = nn.leaky_relu(nn.Dense(self.latent)(z), 0.2)
        shape = (self.start, self.start, self.widths[0])
        x = self.param("constant", nn.initializers.normal(), shape)[None]
        x = x + noise[:, : self.start, : self.start]
        image = None
        conv = partial(StyleConv, on_output=self.on_output)
        for i, width in enumerate(self.widths):
            if i:
                x, image = (jnp.repeat(jnp.repeat(y, 2, 1), 2, 2) for y in (x, image))
                x = conv(width, 3, name=f"up_{i}")(x, z, noise)
            x = conv(width, 3, name=f"conv_{i}")(x, z, noise)
            rgb = conv(3, 1, rgb=True, name=f"rgb_{i}")(x, z, None)
            image = rgb if image is None else image + rgb
        return image
