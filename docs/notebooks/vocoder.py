# ---
# jupytext:
#   text_representation:
#     extension: .py
#     format_name: percent
# kernelspec:
#   display_name: Python 3
#   language: python
#   name: python3
# ---

# %% [markdown]
# # A vocoder ported from PyTorch
#
# Vocoders and audio codecs are trained with weight norm on every convolution. This notebook takes
# the generator of one, in the manner of HiFi-GAN, from PyTorch to Flax: the same output, more
# training in JAX, and the way back. PyTorch itself is not needed; what it computed is in the file.
#
# This is the PyTorch model, with weight norm on all 28 of its convolutions, two of them transposed
# ({download}`the whole script <vocoder/generator_torch.py>`,
# {download}`the file that it leaves <vocoder/generator.safetensors>`):
#
# ```{literalinclude} vocoder/generator_torch.py
# :start-at: def conv(
# :end-before: def main
# ```

# %% [markdown]
# ## The model in Flax
#
# Plain layers: weight norm is not the model's business. In `flax.nnx` the layers can have PyTorch's
# names, so that nothing need be said about them. (In Linen, `names` maps them; see
# [](../pytorch.md).)
#
# Flax's padding of a transposed convolution is that of the stretched input: where PyTorch is told
# `padding=p`, Flax is told `dilation · (taps − 1) − p`, plus `output_padding` after the last.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file

import wnjax

# %%


class Residuals(nnx.Module):
    def __init__(self, channels, taps, rngs):
        def convs(*dilations):
            return nnx.List(
                nnx.Conv(channels, channels, (taps,), kernel_dilation=d, rngs=rngs)
                for d in dilations
            )

        self.convs1, self.convs2 = convs(1, 3, 5), convs(1, 1, 1)

    def __call__(self, x):
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + second(nnx.leaky_relu(first(nnx.leaky_relu(x, 0.1)), 0.1))
        return x


class Generator(nnx.Module):
    """From a mel spectrogram, (batch, frames, 40), to a waveform, (batch, 64 · frames, 1)."""

    def __init__(self, rngs):
        def up(inputs, outputs):
            padding = [(15 - 4, 15 - 4)]  # taps - 1 - PyTorch's padding
            return nnx.ConvTranspose(inputs, outputs, (16,), 8, padding=padding, rngs=rngs)

        self.conv_pre = nnx.Conv(40, 32, (7,), rngs=rngs)
        self.ups = nnx.List([up(32, 16), up(16, 8)])
        self.resblocks = nnx.List(Residuals(c, taps, rngs) for c in (16, 8) for taps in (3, 7))
        self.conv_post = nnx.Conv(8, 1, (7,), rngs=rngs)

    def __call__(self, x):
        x = self.conv_pre(x)
        for i, up in enumerate(self.ups):
            x = up(nnx.leaky_relu(x, 0.1))
            x = (self.resblocks[2 * i](x) + self.resblocks[2 * i + 1](x)) / 2
        return jnp.tanh(self.conv_post(nnx.leaky_relu(x)))


# %% [markdown]
# ## Its parameters, from PyTorch's file
#
# The state of the model leads. Shapes are checked, and nothing may be left over: of the file, only
# what begins with `generator.` is looked at. The model tells which of its convolutions are
# transposed: PyTorch keeps their kernels in another order, and a shape does not show the order
# where a layer has as many inputs as outputs.

# %%
file = "vocoder/generator.safetensors"  # beside this notebook
model = Generator(nnx.Rngs(0))
graph, template = nnx.split(model)
params = wnjax.pytorch.from_state_dict(file, template, model=model, prefix="generator.")
heading, *lines = wnjax.summary(params).splitlines()
print(heading, *lines[:4], "...", *lines[-5:], sep="\n")

# %% [markdown]
# Every weight is a (g, v) leaf with the very g and v of the file. PyTorch's g of a transposed
# convolution
# belongs to an *input* channel, which is why the norms of `ups` run over other axes than
# those of the other kernels.
#
# ## The same output

# %%
example = load_file(file)
mel = example["example.mel"].transpose(0, 2, 1)  # channels last
expected = example["example.waveform"][0, 0]


def fn(params, mel):
    return nnx.merge(graph, params)(mel)


waveform = np.asarray(jax.jit(wnjax.wrap(fn))(params, mel))[0, :, 0]
largest = np.abs(waveform - expected).max()
print(f"{waveform.size} samples from {mel.shape[1]} frames")
print(f"farthest from PyTorch's: {largest:.1e}, of amplitudes up to {np.abs(expected).max():.2f}")
assert largest < 1e-5

# %% mystnb={"image": {"alt": "The waveforms of PyTorch and of Flax lie on each other"}}
figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained", facecolor="white")
axes.plot(expected[:256], color="0.7", linewidth=4, label="PyTorch")
axes.plot(waveform[:256], color="C0", linewidth=1, label="Flax, (g, v) from PyTorch")
axes.set(xlabel="sample", ylabel="amplitude")
_ = axes.legend(loc="upper right", frameon=False)

# %% [markdown]
# ## It trains
#
# g and v are leaves of the tree, so any optax optimizer trains them. Here, to a given waveform:

# %%
target = jnp.sin(jnp.arange(waveform.size) / 8)[None, :, None] / 2
optimizer = optax.adam(1e-3)


def loss(params):
    return jnp.mean((wnjax.wrap(fn)(params, mel) - target) ** 2)


@jax.jit
def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


trained, state = params, optimizer.init(params)
losses = []
for _ in range(60):
    trained, state, value = step(trained, state)
    losses.append(value)
print(f"mean square: {losses[0]:.3f} at first, {losses[-1]:.3f} after 60 steps")
assert losses[-1] < losses[0] / 2

# %% [markdown]
# ## What one serves
#
# `fold` makes plain weights, once. The model is then a plain Flax model, without the cost of weight
# norm: see [](../serving.md).

# %%
nnx_model = nnx.merge(graph, wnjax.fold(trained))
served = nnx_model(mel)
np.testing.assert_allclose(served, wnjax.wrap(fn)(trained, mel), atol=1e-5)

# %% [markdown]
# ## And back
#
# The same arguments write PyTorch's names and shapes again, in either style of keys. Untouched
# parameters come back bit for bit. The arrays are copies: `torch.from_numpy` makes the tensors of
# them that `generator.load_state_dict` takes.

# %%
back = wnjax.pytorch.to_state_dict(params, model=model, prefix="generator.")
assert all((back[name] == example[name]).all() for name in back)
print(len(back), "arrays, equal to those of the file; for example")
for name in list(back)[:3]:
    print(f"  {name}: {back[name].shape}")
older = wnjax.pytorch.to_state_dict(trained, model=model, style="weight_g")
print("in the older style:", ", ".join(list(older)[:3]))
