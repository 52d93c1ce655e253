"""The networks of `experiments.models` once more, of layers of Equinox or PyTorch.

Both frameworks have weights of shape (out, in, ...) and images of shape (channels, height,
width), so that one description of each network serves both. The layers get the weights of
the Linen network: all compute the same function. Both packages are optional.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments.networks.classifiers import MLP, ConvPoolCNN
from experiments.networks.transformer import Transformer

TABLES = ("positions", "Embed_0/embedding")  # arrays, not layers
EPSILON = 1e-6  # Linen's for layer normalization

Layers = dict[str, Any]  # by the path of the Linen layer, such as "Conv_0"


class Framework(NamedTuple):
    """How to make layers with given weights, to call them on batches, and what lies between."""

    linear: Callable[[np.ndarray, np.ndarray], Any]
    conv: Callable[[np.ndarray, np.ndarray, int], Any]  # the last: the padding
    layer_norm: Callable[[np.ndarray, np.ndarray], Any]
    table: Callable[[np.ndarray], Any]
    call: Callable[[Any, Any], Any]
    relu: Callable[[Any], Any]
    leaky_relu: Callable[[Any], Any]
    gelu: Callable[[Any], Any]
    max_pool: Callable[[Any], Any]  # of 2x2, stride 2
    attention: Callable[[Any, Any, Any], Any]  # causal; of (batch, length, heads, features)


def layers(params: Any, framework: Framework) -> Layers:
    """The layers of a Linen network in another framework."""
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    made = {path: framework.table(flat.pop(path)) for path in TABLES if path in flat}
    for path in dict.fromkeys(path.rpartition("/")[0] for path in flat):
        bias = flat[f"{path}/bias"].ravel()
        if f"{path}/scale" in flat:
            made[path] = framework.layer_norm(flat[f"{path}/scale"], bias)
        elif (kernel := flat[f"{path}/kernel"]).ndim == 4:
            padding = 1 if len(kernel) == 3 and path != "Conv_6" else 0  # that one is VALID
            made[path] = framework.conv(np.moveaxis(kernel, (3, 2), (0, 1)), bias, padding)
        else:  # attention's projections too are linear layers here
            made[path] = framework.linear(kernel.reshape(-1, bias.size).T, bias)
    return made


def channels_first(x: jax.Array) -> np.ndarray:
    """A batch as these networks take it: images with their channels before height and width."""
    array = np.asarray(x)
    return np.moveaxis(array, -1, 1) if array.ndim == 4 else array


def forward(model: nn.Module, framework: Framework) -> Callable[[Layers, Any], Any]:
    """The function (layers, inputs) -> logits that a Linen network is with `layers`."""
    network: Any = {MLP: _mlp, ConvPoolCNN: _conv_pool_cnn, Transformer: _transformer}[type(model)]

    def apply(layers: Layers, x: Any) -> Any:
        callables = {
            path: layer if path in TABLES else partial(framework.call, layer)
            for path, layer in layers.items()
        }
        return network(model, framework, callables, x)

    return apply


def _mlp(model: MLP, f: Framework, layers: Mapping[str, Any], x: Any) -> Any:
    for i in range(len(model.widths)):
        x = f.relu(layers[f"Dense_{i}"](x))
    return layers[f"Dense_{len(model.widths)}"](x)


def _conv_pool_cnn(model: ConvPoolCNN, f: Framework, layers: Mapping[str, Any], x: Any) -> Any:
    if model.noise or model.dropout:
        raise ValueError("the ports have no noise and no dropout; make them 0")
    for i in range(9):
        x = f.leaky_relu(layers[f"Conv_{i}"](x))
        if i in (2, 5):
            x = f.max_pool(x)
    return layers["Dense_0"](x.mean((2, 3)))


def _transformer(model: Transformer, f: Framework, layers: Mapping[str, Any], tokens: Any) -> Any:
    x = layers["Embed_0/embedding"][tokens] + layers["positions"][None, : tokens.shape[1]]
    for i in range(model.layers):
        y = layers[f"LayerNorm_{2 * i}"](x)
        attention = f"MultiHeadDotProductAttention_{i}"
        q, k, v = (
            layers[f"{attention}/{name}"](y).reshape((*y.shape[:2], model.heads, -1))
            for name in ("query", "key", "value")
        )
        x = x + layers[f"{attention}/out"](f.attention(q, k, v).reshape(x.shape))
        y = layers[f"LayerNorm_{2 * i + 1}"](x)
        x = x + layers[f"Dense_{2 * i + 1}"](f.gelu(layers[f"Dense_{2 * i}"](y)))
    return layers[f"Dense_{2 * model.layers}"](layers[f"LayerNorm_{2 * model.layers}"](x))


def equinox() -> Framework:
    """Equinox, whose layers take one example: they are called under `jax.vmap`."""
    eqx = importlib.import_module("equinox")
    shapes = eqx.filter_eval_shape  # of a new layer, without drawing weights

    def filled(layer: Any, weight: np.ndarray, bias: np.ndarray) -> Any:
        """A layer, of which only the shapes are known, with its weights."""
        arrays = jnp.asarray(weight), jnp.asarray(bias).reshape(layer.bias.shape)
        return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, arrays)

    def linear(weight: np.ndarray, bias: np.ndarray) -> Any:
        layer = shapes(lambda key: eqx.nn.Linear(*weight.shape[::-1], key=key), jax.random.key(0))
        return filled(layer, weight, bias)

    def conv(weight: np.ndarray, bias: np.ndarray, padding: int) -> Any:
        out, into, *size = weight.shape
        layer = shapes(
            lambda key: eqx.nn.Conv2d(into, out, size, padding=padding, key=key), jax.random.key(0)
        )
        return filled(layer, weight, bias)

    def call(layer: Any, x: Any) -> Any:
        axes = 3 if isinstance(getattr(layer, "layer", layer), eqx.nn.Conv2d) else 1
        for _ in range(x.ndim - axes):
            layer = jax.vmap(layer)
        return layer(x)

    return Framework(
        linear=linear,
        conv=conv,
        layer_norm=lambda weight, bias: filled(
            eqx.nn.LayerNorm(len(weight), eps=EPSILON), weight, bias
        ),
        table=jnp.asarray,
        call=call,
        relu=jax.nn.relu,
        leaky_relu=partial(jax.nn.leaky_relu, negative_slope=0.1),
        gelu=jax.nn.gelu,
        max_pool=jax.vmap(eqx.nn.MaxPool2d(2, stride=2)),
        attention=partial(jax.nn.dot_product_attention, is_causal=True),
    )


def pytorch() -> Framework:
    """PyTorch, run eagerly."""
    torch = importlib.import_module("torch")

    def filled(layer: Any, weight: np.ndarray, bias: np.ndarray) -> Any:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
        return layer

    def conv(weight: np.ndarray, bias: np.ndarray, padding: int) -> Any:
        out, into, *size = weight.shape
        return filled(torch.nn.Conv2d(into, out, size, padding=padding), weight, bias)

    def attention(*qkv: Any) -> Any:
        by_head = (x.transpose(1, 2) for x in qkv)
        functional = torch.nn.functional
        return functional.scaled_dot_product_attention(*by_head, is_causal=True).transpose(1, 2)

    return Framework(
        linear=lambda weight, bias: filled(torch.nn.Linear(*weight.shape[::-1]), weight, bias),
        conv=conv,
        layer_norm=lambda weight, bias: filled(
            torch.nn.LayerNorm(len(weight), eps=EPSILON), weight, bias
        ),
        table=lambda x: torch.nn.Parameter(torch.tensor(x)),
        call=lambda layer, x: layer(x),
        relu=torch.relu,
        leaky_relu=partial(torch.nn.functional.leaky_relu, negative_slope=0.1),
        gelu=partial(torch.nn.functional.gelu, approximate="tanh"),
        max_pool=partial(torch.nn.functional.max_pool2d, kernel_size=2),
        attention=attention,
    )
