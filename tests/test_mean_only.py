"""Mean-only batch normalization against flax's BatchNorm with the variance fixed at 1."""

import inspect
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wnjax
from tests.test_sharding import JITS, everywhere, sgd_step, spread
from wnjax._modules.arguments import BATCH_NORM_INSTEAD


def data(*shape, seed=0):
    return 3 + jax.random.normal(jax.random.key(seed), shape)


def linen_layer(x, **options):
    """A function (bias, mean, x, train, mask) -> (y, new mean)."""
    layer = wnjax.linen.MeanOnlyBatchNorm(**options)

    def fn(bias, mean, x, train=True, mask=None):
        variables = {"batch_stats": {"mean": mean}} | (
            {} if bias is None else {"params": {"bias": bias}}
        )
        y, new = layer.apply(
            variables, x, use_running_average=not train, mask=mask, mutable=["batch_stats"]
        )
        return y, new["batch_stats"]["mean"]

    return fn


def nnx_layer(x, **options):
    layer = wnjax.nnx.MeanOnlyBatchNorm(
        x.shape[options.get("axis", -1)], rngs=nnx.Rngs(0), **options
    )
    graph, state = nnx.split(layer)

    def fn(bias, mean, x, train=True, mask=None):
        layer = nnx.merge(graph, state, copy=True)
        layer.mean[...] = mean
        if bias is not None:
            layer.bias[...] = bias
        y = layer(x, use_running_average=not train, mask=mask)
        return y, layer.mean[...]

    return fn


LAYERS = pytest.mark.parametrize("make", [linen_layer, nnx_layer])


@LAYERS
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_batch_norm_with_variance_one(make, axis, masked):
    x, momentum = data(8, 4, 6), 0.9
    size = x.shape[axis]
    bias, mean = data(size, seed=1), data(size, seed=2)
    mask = jax.random.bernoulli(jax.random.key(5), 0.7, (8, 4, 6)) if masked else None
    y, new = make(x, axis=axis, momentum=momentum)(bias, mean, x, mask=mask)

    features = axis % 3
    axes = tuple(i for i in range(3) if i != features)
    ours = np.mean(
        np.asarray(x, np.float64), axes, where=True if mask is None else np.asarray(mask)
    )
    shape = [size if i == features else 1 for i in range(3)]
    expected = x - ours.reshape(shape).astype(np.float32) + bias.reshape(shape)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        new, momentum * mean + (1 - momentum) * ours.astype(np.float32), rtol=1e-5
    )

    # flax's own running mean, and its output at inference with a variance of 1 - epsilon
    batch_norm = nn.BatchNorm(axis=axis, momentum=momentum, epsilon=0.0)
    variables = {
        "params": {"scale": jnp.ones(size), "bias": bias},
        "batch_stats": {"mean": mean, "var": jnp.ones(size)},
    }
    with jax.numpy_rank_promotion("allow"):
        _, flax_new = batch_norm.apply(
            variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"]
        )
        flax_y = batch_norm.apply(variables, x, use_running_average=True)
    np.testing.assert_allclose(new, flax_new["batch_stats"]["mean"], rtol=1e-5)
    inference, kept = make(x, axis=axis)(bias, mean, x, train=False)
    np.testing.assert_allclose(inference, flax_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(kept, mean)


@LAYERS
def test_gradient_is_the_centered_gradient(make):
    """∇x = ∇y − mean of ∇y: section 4 of the paper."""
    x, ct = data(32, 5), data(32, 5, seed=1)
    fn = make(x)
    _, pullback = jax.vjp(lambda x, b: fn(b, jnp.zeros(5), x)[0], x, jnp.zeros(5))
    dx, db = pullback(ct)
    np.testing.assert_allclose(dx, ct - jnp.broadcast_to(ct.mean(0), ct.shape), atol=1e-5)
    np.testing.assert_allclose(db, ct.sum(0), rtol=1e-5)


@LAYERS
@pytest.mark.parametrize("masked", [False, True])
def test_devices_share_a_mean(make, masked):
    x, mean = data(16, 5), jnp.zeros(5)
    mask = jnp.broadcast_to(jnp.arange(16)[:, None] % 5 > 1, x.shape) if masked else None
    expected, expected_new = make(x)(jnp.zeros(5), mean, x, mask=mask)
    shards = x.reshape(8, 2, 5)
    masks = None if mask is None else mask.reshape(8, 2, 5)
    fn = make(shards[0], axis_name="i")
    y, new = jax.vmap(
        lambda x, m: fn(jnp.zeros(5), mean, x, mask=m),
        axis_name="i",
        in_axes=(0, None if masks is None else 0),
    )(shards, masks)
    np.testing.assert_allclose(y.reshape(16, 5), expected, atol=1e-5)
    np.testing.assert_allclose(new, jnp.broadcast_to(expected_new, (8, 5)), atol=1e-5)


@LAYERS
def test_without_a_bias_and_in_bfloat16(make):
    x = data(64, 3).astype(jnp.bfloat16)
    y, new = make(x, use_bias=False)(None, jnp.zeros(3), x)
    assert y.dtype == jnp.bfloat16
    assert new.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32).mean(0), 0, atol=2e-2)
    y, _ = make(x, use_bias=False, dtype=jnp.float32)(None, jnp.zeros(3), x)
    assert y.dtype == jnp.float32


def test_initialization_leaves_the_running_mean_alone():
    layer, x = (
        wnjax.linen.MeanOnlyBatchNorm(use_running_average=False, axis_name="nowhere"),
        data(8, 3),
    )
    variables = layer.init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    assert variables["params"]["bias"].shape == (3,)


def test_train_and_eval_modes():
    layer, x = wnjax.nnx.MeanOnlyBatchNorm(3, rngs=nnx.Rngs(0)), data(8, 3)
    layer.eval()
    np.testing.assert_array_equal(layer(x), x)
    layer.train()
    np.testing.assert_allclose(layer(x).mean(0), 0, atol=1e-5)
    view = nnx.view(layer, use_running_average=True)
    assert float(jnp.abs(view(x).mean(0)).min()) > 1
    with pytest.raises(ValueError, match="pass use_running_average"):
        wnjax.nnx.MeanOnlyBatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))(x)


def test_data_init_with_mean_only_batch_norm():
    """The bias is that of the normalization, after the mean is gone."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.Conv(6, (3, 3), use_bias=False)(x)
                x = nn.relu(wnjax.linen.MeanOnlyBatchNorm(use_running_average=False)(x))
            return nn.Dense(4)(x.mean((1, 2)))

    model, x = Network(), data(100, 6, 6, 3)
    variables = model.init(jax.random.key(0), x)

    def fn(params, x):
        return model.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

    params, report = wnjax.data_init(fn, report=True)(variables["params"], x)
    assert report["Conv_1"]["kernel"].detail == "MeanOnlyBatchNorm_1/bias"
    _, state = model.apply(
        {**variables, "params": params},
        x,
        capture_intermediates=True,
        mutable=["batch_stats", "intermediates"],
    )
    for i in range(2):
        (y,) = state["intermediates"][f"MeanOnlyBatchNorm_{i}"]["__call__"]
        np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-4)
        np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-3)


@everywhere
@pytest.mark.parametrize("split", [False, True], ids=["batch", "batch and features"])
@LAYERS
def test_a_step_on_shards_is_that_on_the_whole(make, how, split):
    """The gradient of what comes before is centered, the bias trains, and the mean runs."""

    def step(tree, x, how=how):
        options = {} if how in (None, *JITS) else {"axis_name": "data"}

        def layer(trained, x):
            scaled = x * jnp.broadcast_to(trained["scale"], x.shape)
            fn = make(scaled, momentum=0.5, **options)
            return fn(trained["bias"], tree["mean"], scaled)

        def loss(trained, x):
            return jnp.mean(jnp.sin(layer(trained, x)[0]) * jnp.cos(x))

        trained = {name: tree[name] for name in ("scale", "bias")}
        return sgd_step(loss, how, trained, x) | {"mean": layer(trained, x)[1]}

    tree = {name: data(12, seed=i) for i, name in enumerate(("scale", "bias", "mean"))}
    x = data(16, 12, seed=4)
    features = "tensor" if split else None
    specs = ({name: jax.P(features) for name in tree}, jax.P("data", features))
    found = spread(how, step, specs, tree, x)
    expected = step(tree, x, how=None)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
    assert all(float(jnp.abs(expected[name] - tree[name]).max()) > 1e-4 for name in tree)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_integers_are_taken_as_batch_norm_takes_them(dtype, use_bias, param_dtype):
    x = jnp.arange(12).reshape(6, 2).astype(dtype)
    options = {"use_running_average": False, "use_bias": use_bias, "param_dtype": param_dtype}
    layer = wnjax.linen.MeanOnlyBatchNorm(**options)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    with jax.numpy_dtype_promotion("standard"):
        theirs = nn.BatchNorm(use_scale=False, **options)
        assert y.dtype == theirs.init_with_output(jax.random.key(0), x)[0].dtype
    by_hand = np.asarray(x, np.float64) - np.asarray(x, np.float64).mean(0)
    np.testing.assert_allclose(y.astype(jnp.float32), by_hand, rtol=1e-2)
    assert variables["batch_stats"]["mean"].dtype == jnp.float32
    np.testing.assert_array_equal(y, wnjax.nnx.MeanOnlyBatchNorm(2, rngs=nnx.Rngs(0), **options)(x))


NNX = partial(wnjax.nnx.MeanOnlyBatchNorm, 3, rngs=nnx.Rngs(0))
REFUSED = {
    "epsilon": ({"epsilon": 1e-5}, "epsilon=1e-05: the variance is not normalized"),
    "use_scale": ({"use_scale": True}, "use_scale=True: the gain g of the weight norm"),
    "scale_init": ({"scale_init": nn.initializers.ones}, "wnjax.data_init sets it"),
    "use_fast_variance": ({"use_fast_variance": True}, "the variance is not normalized"),
}
IN_LINEN = {"reductions": ({"force_float32_reductions": False}, "leave it out or say True")}
IN_NNX = {
    "promote_dtype": ({"promote_dtype": max}, "give dtype"),
    "scale_metadata": ({"scale_metadata": {}}, "the gain g"),
    "unknown": ({"epsilom": None}, "unexpected keyword argument 'epsilom'"),
}
LINEN = wnjax.linen.MeanOnlyBatchNorm
EACH = [(LINEN, *case) for case in (REFUSED | IN_LINEN).values()]
EACH += [(NNX, *case) for case in (REFUSED | IN_NNX).values()]


@pytest.mark.parametrize(("make", "arguments", "message"), EACH)
def test_arguments_of_batch_norm_without_a_meaning_are_refused(make, arguments, message):
    with pytest.raises(TypeError, match=message):
        make(**arguments)


def test_every_argument_of_batch_norm_is_known_in_its_place():
    theirs, ours = (inspect.signature(c.__init__).parameters for c in (nn.BatchNorm, LINEN))
    assert list(ours) == list(theirs)
    ours = inspect.signature(wnjax.nnx.MeanOnlyBatchNorm.__init__).parameters
    known = {*ours, *BATCH_NORM_INSTEAD}
    assert inspect.signature(nnx.BatchNorm.__init__).parameters.keys() <= known
    LINEN(use_scale=False, force_float32_reductions=True, epsilon=None)
    NNX(use_scale=False, epsilon=None)
