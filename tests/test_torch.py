"""Gradients and training against PyTorch's own weight_norm: recorded, and live where installed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnjax
from tests.golden import torch_weight_norm
from tests.toys import train

pytestmark = [pytest.mark.accelerator, pytest.mark.usefixtures("optimized", "x64")]

LAYERS = {
    "linear": nn.Dense(4),
    "conv1d": nn.Conv(4, (3,), padding=1),
    "conv2d": nn.Conv(4, (3, 3), strides=2, padding=1),
}


def to_flax(x):
    """Output axis first and channels second (PyTorch) to last (Flax), for 2 or more axes."""
    return jnp.asarray(np.moveaxis(x, (0, 1), (-1, -2)) if x.ndim >= 2 else x)


def channels_last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


@pytest.fixture(params=["recorded", "live"])
def record(request, case):
    if request.param == "recorded":
        return torch_weight_norm.recorded(case)
    pytest.importorskip("torch", reason="the recorded arrays stand in for PyTorch")
    return torch_weight_norm.run(case)


@pytest.mark.parametrize("case", torch_weight_norm.CASES)
def test_gradients_and_training_equal_pytorch(case, record):
    layer = LAYERS[case.split("_")[0]]
    x, target = channels_last(record["x"]), channels_last(record["target"])
    w = to_flax(record["v"])  # PyTorch starts at v = w
    axes = {"kernel": () if case == "linear_whole" else -1}
    params = {"kernel": w, "bias": jnp.asarray(record["bias"])}
    params = wnjax.weight_norm(params, axes={"bias": None} | axes)

    def expected(prefix, like):
        g = to_flax(record[f"{prefix}g"]).reshape(like["kernel"].g.shape)
        kernel = wnjax.WeightNorm(g, to_flax(record[f"{prefix}v"]))
        return {"kernel": kernel, "bias": jnp.asarray(record[f"{prefix}bias"])}

    def loss(params):
        return jnp.mean((layer.apply({"params": wnjax.fold(params)}, x) - target) ** 2)

    assert_close(params, expected("", params), rtol=1e-14)
    assert_close(jax.grad(loss)(params), expected("grad_", params), rtol=1e-12)

    optimizer = optax.adam(0.1) if case == "linear_adam" else optax.sgd(0.1, momentum=0.9)
    params = train(optimizer, loss, params, torch_weight_norm.STEPS)
    assert_close(params, expected("last_", params), rtol=1e-12)


def assert_close(actual, expected, rtol):
    """Every array within `rtol` of the other, in units of its largest element."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=rtol * np.abs(e).max()),
        actual,
        expected,
    )
