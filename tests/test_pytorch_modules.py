"""Real PyTorch modules, recorded and, where PyTorch is installed, live.

Their state dicts become Flax trees that compute the same, take the same step of SGD, and
go back bit for bit.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import wnjax
from tests.golden import torch_modules
from tests.vocoders import (
    ATTENTION_NAMES,
    CODEC_LAYOUTS,
    GENERATOR_NAMES,
    Attention,
    Codec,
    Generator,
    GroupedConvTranspose,
    NNXAttention,
    NNXCodec,
    NNXGenerator,
    Positional,
    Sequence,
    transposed_padding,
)
from wnjax.pytorch import from_state_dict, lstm, to_state_dict

RTOL = 1e-5  # of the largest element, in float32


def pads(taps, padding, output_padding=None, dilation=None):
    zeros, ones = (0,) * len(taps), (1,) * len(taps)
    axes = zip(taps, padding, output_padding or zeros, dilation or ones, strict=True)
    return tuple(transposed_padding(*axis) for axis in axes)


def grouped(features, taps, strides=None, padding=None, dilation=None):
    ones = (1,) * len(taps)
    padding, dilation = padding or (0,) * len(taps), dilation or ones
    pad = pads(taps, padding, dilation=dilation)
    return GroupedConvTranspose(features, taps, strides or ones, pad, dilation, groups=2)


UP3 = pads((4,), (1,), (2,), (2,))
FLIPPED, UNFLIPPED = {"kernel": "conv_transpose"}, {"kernel": "conv"}
GENERATOR_LAYOUTS = {r"up_\d/kernel": "conv_transpose", r"stack_.*/kernel": "conv"}
CELL = lstm("OptimizedLSTMCell_0", "lstm")
# case: (the Flax module, names, layouts)
MODELS = {
    "linear": (nn.Dense(4), None, None),
    "linear_dim1": (nn.Dense(4), None, None),
    "linear_whole": (nn.Dense(4), None, None),
    "conv1d": (
        nn.Conv(6, (3,), strides=2, padding=2, kernel_dilation=2, feature_group_count=2),
        None,
        None,
    ),
    "conv2d": (
        nn.Conv(
            4,
            (3, 2),
            strides=(2, 1),
            padding=((1, 1), (0, 0)),
            kernel_dilation=(1, 2),
            feature_group_count=2,
        ),
        None,
        None,
    ),
    "conv3d": (nn.Conv(3, (2, 3, 2), padding=((0, 0), (1, 1), (1, 1))), None, None),
    "conv_transpose1d": (
        nn.ConvTranspose(4, (4,), strides=(3,), padding=UP3, kernel_dilation=(2,)),
        None,
        FLIPPED,
    ),
    "conv_transpose1d_dim1": (
        nn.ConvTranspose(3, (4,), strides=(2,), padding=pads((4,), (0,))),
        None,
        FLIPPED,
    ),
    "conv_transpose1d_taps": (
        nn.ConvTranspose(3, (4,), strides=(2,), padding=pads((4,), (0,))),
        None,
        FLIPPED,
    ),
    "conv_transpose2d": (
        nn.ConvTranspose(
            3, (3, 2), strides=(2, 1), padding=pads((3, 2), (1, 0), (1, 0)), transpose_kernel=True
        ),
        None,
        UNFLIPPED,
    ),
    "conv_transpose3d": (
        nn.ConvTranspose(2, (2, 2, 2), strides=(2, 2, 2), padding=pads((2,) * 3, (0,) * 3)),
        None,
        FLIPPED,
    ),
    "conv_transpose1d_groups": (grouped(6, (4,), (2,), (1,)), None, None),
    "conv_transpose2d_groups": (grouped(4, (3, 3), (2, 2), dilation=(2, 2)), None, None),
    "conv_transpose3d_groups": (grouped(4, (2, 2, 2)), None, UNFLIPPED),
    "positional": (Positional(), None, None),
    "generator": (Generator(), GENERATOR_NAMES, GENERATOR_LAYOUTS),
    "sequence": (Sequence(), CELL, None),
    "codec": (
        Codec(),
        None,
        CODEC_LAYOUTS | {"(up|smooth)/kernel": "conv_transpose", "conv/kernel": "conv"},
    ),
    "attention": (Attention(), ATTENTION_NAMES, {"attend/out/kernel": "linear"}),
}
# case: (the NNX module, names, layouts of what its modules do not tell)
NNX_MODELS = {
    "generator": (NNXGenerator, None, None),
    "codec": (NNXCodec, None, CODEC_LAYOUTS),
    "attention": (NNXAttention, ATTENTION_NAMES, None),
}


@pytest.fixture(params=["recorded", "live"])
def record(request, case, api):
    if request.param == "recorded":
        return torch_modules.recorded(case, api)
    pytest.importorskip("torch", reason="the recorded arrays stand in for PyTorch")
    return torch_modules.run(case, api)


def channels_last(x):
    return np.moveaxis(x, 1, -1) if x.ndim > 2 else x


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        np.testing.assert_allclose(
            actual[name], value, rtol=0, atol=RTOL * np.abs(value).max(), err_msg=name
        )


def step(fn, params, x, target):
    """The parameters after a step of SGD at rate 0.1, and the output before it."""

    @jax.jit
    def gradient(params):
        def loss(params):
            y = wnjax.wrap(fn)(params, x)
            return jnp.mean((y - target) ** 2), y

        return jax.grad(loss, has_aux=True)(params)

    grads, y = gradient(params)
    optimizer = optax.sgd(0.1)
    updates, _ = optimizer.update(grads, optimizer.init(params))
    return optax.apply_updates(params, updates), y


@pytest.mark.parametrize("api", torch_modules.APIS)
@pytest.mark.parametrize("case", torch_modules.CASES)
def test_linen_computes_and_trains_alike(case, api, record):
    module, names, layouts = MODELS[case]
    x = channels_last(record["call"]["x"])
    template = jax.eval_shape(module.init, jax.random.key(0), x)
    variables = from_state_dict(record["state"], template, names, layouts=layouts)
    params = variables.pop("params")

    def fn(params, x):
        return module.apply({"params": params, **variables}, x)

    target = channels_last(record["call"]["target"])
    stepped, y = step(fn, params, jnp.asarray(x), target)
    assert_close({"y": y}, {"y": channels_last(record["call"]["y"])})

    def back(params):
        tree = {"params": params, **variables}
        return to_state_dict(tree, names, layouts=layouts, style=api)

    assert_close(back(stepped), comparable(record["stepped"]))
    chex.assert_trees_all_equal(back(params), comparable(record["state"]), strict=True)


def comparable(expected):
    """PyTorch's state dict as ours can be: with one bias of the LSTM, without the count."""
    expected = {k: x for k, x in expected.items() if not k.endswith("num_batches_tracked")}
    if "lstm.bias_ih_l0" in expected:
        total = expected["lstm.bias_ih_l0"] + expected["lstm.bias_hh_l0"]
        expected |= {"lstm.bias_ih_l0": total, "lstm.bias_hh_l0": np.zeros_like(total)}
    return expected


@pytest.mark.parametrize("api", ["parametrizations"])
@pytest.mark.parametrize("case", NNX_MODELS)
def test_nnx_computes_and_trains_alike(case, api, record):
    make, names, layouts = NNX_MODELS[case]
    model = make(nnx.Rngs(0))
    graph, state = nnx.split(model)
    rules = {"names": names, "layouts": layouts, "model": model}
    params = from_state_dict(record["state"], state, **rules)
    x, target = (channels_last(record["call"][k]) for k in ("x", "target"))
    stepped, y = step(lambda p, x: nnx.merge(graph, p)(x), params, jnp.asarray(x), target)
    assert_close({"y": y}, {"y": channels_last(record["call"]["y"])})
    assert_close(to_state_dict(stepped, **rules, style=api), record["stepped"])

    nnx.update(model, params)
    layer = wnjax.nnx.WeightNorm(model)
    assert_close({"y": jax.jit(layer.folded())(x)}, {"y": channels_last(record["call"]["y"])})
    chex.assert_trees_all_equal(layer.normalized(), params)
    back = to_state_dict(layer.normalized(), **rules | {"model": layer}, style=api)
    chex.assert_trees_all_equal(back, record["state"])
