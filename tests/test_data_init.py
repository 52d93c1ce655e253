"""`data_init` against the paper's algorithm by hand, and against what layers compute after it."""

import warnings
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import wnjax
from experiments.networks.classifiers import ConvPoolCNN
from experiments.networks.transformer import Transformer
from tests import toys, traced_layers, traced_layers_flax, traced_layers_nested

LAYERS = traced_layers.CASES | traced_layers_flax.CASES | traced_layers_nested.CASES
# It warns of few samples a neuron, which small batches have; the tests of the warnings catch them.
pytestmark = pytest.mark.filterwarnings("ignore:data_init")


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def apply(model, **options):
    """The function of a Linen model."""

    def fn(params, *args):
        return model.apply({"params": params}, *args, **options)

    return fn


def pre_activations(model, params, *args, **options):
    """By path: the outputs of all Linen layers that have a kernel."""
    _, found = model.apply(
        {"params": params}, *args, **options, mutable=["intermediates"], capture_intermediates=True
    )
    flat = jax.tree_util.tree_flatten_with_path(
        found["intermediates"], is_leaf=lambda x: isinstance(x, tuple)
    )[0]
    outputs = {jax.tree_util.keystr(p, simple=True, separator="/"): x[0] for p, x in flat}
    kernels = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in kernels]
    return {p: outputs[p.removesuffix("kernel") + "__call__"] for p in paths if "kernel" in p}


def assert_standardized(y, neurons=1, has_bias=True):
    """Over all axes but the last ones."""
    axes = tuple(range(y.ndim - neurons))
    y = np.asarray(y, np.float64)
    if has_bias:
        assert np.abs(y.mean(axes)).max() < 1e-4
    assert np.abs(y.std(axes) - 1).max() < 1e-3


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("as_gv_leaves", [False, True])
def test_every_pre_activation_of_a_convolutional_network(use_bias, as_gv_leaves):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for width in (6, 8):
                x = nn.leaky_relu(nn.Conv(width, (3, 3), use_bias=use_bias)(x), 0.1)
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
                x = nn.Dropout(0.5, deterministic=not train)(x)
            x = x + nn.Conv(8, (1, 1), use_bias=use_bias)(jnp.tanh(x))  # a residual branch
            return nn.Dense(5, use_bias=use_bias)(x.mean((1, 2)))

    model, x = Network(), 3 + normal(128, 8, 8, 3)
    params = model.init(jax.random.key(0), x, False)["params"]
    fn = apply(model, train=False)
    tree = wnjax.weight_norm(params, wnjax.infer_axes(fn)(params, x)) if as_gv_leaves else params
    found, report = wnjax.data_init(fn, report=True)(tree, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, tree)
    for y in pre_activations(model, wnjax.fold(found), x, train=False).values():
        assert_standardized(y, has_bias=use_bias)
    actions = [leaf.action for leaf in jax.tree.leaves(report, is_leaf=is_report)]
    expected = ["bias", "initialized"] if use_bias else ["scale only"]
    assert actions == expected * 4


def is_report(x):
    return isinstance(x, wnjax.Initialized)


def test_attention_and_transformer():
    model = Transformer(layers=2, width=16, heads=2, hidden=32, vocabulary=11, length=8)
    tokens = jax.random.randint(jax.random.key(0), (40, 8), 0, 11)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = model.init(jax.random.key(1), tokens, train=False)["params"]
        found = wnjax.data_init(apply(model, train=False))(params, tokens)
        outputs = pre_activations(model, found, tokens, train=False)
    assert len(outputs) == 13
    for path, y in outputs.items():
        assert_standardized(y, neurons=2 if path.split("/")[-2] in ("query", "key", "value") else 1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(12)(jnp.tanh(x))
        return x + nn.Dense(6)(nn.gelu(y)), None


@pytest.mark.parametrize("layer_axis", [0, 1])
def test_scanned_layers_get_what_unrolled_ones_get(layer_axis):
    stacked = nn.scan(
        nn.remat(Block, prevent_cse=False),
        variable_axes={"params": layer_axis},
        split_rngs={"params": True},
        length=3,
    )()
    x = 1 + normal(200, 6)
    params = stacked.init(jax.random.key(0), x, None)["params"]
    layers = [jax.tree.map(lambda p, i=i: jnp.take(p, i, layer_axis), params) for i in range(3)]

    def unrolled(layers, x):
        for layer in layers:
            x = Block().apply({"params": layer}, x, None)[0]
        return x

    init = wnjax.data_init(lambda p, x: stacked.apply({"params": p}, x, None)[0], report=True)
    found, report = init(params, x)
    one_by_one = wnjax.data_init(unrolled)(layers, x)
    together = jax.tree.map(lambda *p: jnp.stack(p, layer_axis), *one_by_one)
    chex.assert_trees_all_close(found, together, rtol=1e-5, atol=1e-6)
    assert report["Dense_0"]["kernel"].action == "initialized"
    for layer in one_by_one:
        for y in pre_activations(Block(), layer, x, None).values():
            assert_standardized(y)
        x = Block().apply({"params": layer}, x, None)[0]


def test_nnx():
    model, x = toys.TwoLayers(nnx.Rngs(0)), 2 + normal(300, 3)
    graph, state = nnx.split(model, nnx.Param)

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    found = wnjax.data_init(fn)(state, x)
    merged = nnx.merge(graph, found)
    assert_standardized(merged.first(x))
    assert_standardized(merged(x))


def convpool_by_hand(params, x):
    """The paper's algorithm for ConvPool-CNN-C, in the order of the authors' Lasagne code."""
    result, names = {}, iter([*(f"Conv_{i}" for i in range(9)), "Dense_0"])

    def layer(x, padding=None):
        name = next(names)
        v = params[name]["kernel"]
        v = v / jnp.sqrt((v**2).sum(tuple(range(v.ndim - 1))))
        if padding is None:
            t = x @ v
        else:
            numbers = ("NHWC", "HWIO", "NHWC")
            t = jax.lax.conv_general_dilated(x, v, (1, 1), padding, dimension_numbers=numbers)
        axes = tuple(range(t.ndim - 1))
        m = t.mean(axes)
        t = t - m
        std = jnp.sqrt((t**2).mean(axes))
        t = t / std
        result[name] = {"kernel": v / std, "bias": -m / std}
        return t

    def pool(x):
        n, height, width, c = x.shape
        return x.reshape(n, height // 2, 2, width // 2, 2, c).max((2, 4))

    for _ in range(2):
        for _ in range(3):
            x = jax.nn.leaky_relu(layer(x, "SAME"), 0.1)
        x = pool(x)
    for padding in ("VALID", "SAME", "SAME"):
        x = jax.nn.leaky_relu(layer(x, padding), 0.1)
    layer(x.mean((1, 2)))
    return result


@pytest.mark.usefixtures("x64")
def test_convpool_cnn_against_the_algorithm_by_hand():
    model, x = ConvPoolCNN(widths=(4, 6, 6)), normal(100, 16, 16, 3, dtype=jnp.float64)
    init = partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), x.astype(jnp.float32))["params"]
    keys = iter(range(100))
    params = jax.tree.map(
        lambda s: 0.05 * normal(*s.shape, seed=next(keys), dtype=jnp.float64), shapes
    )
    with jax.numpy_rank_promotion("allow"):
        found = wnjax.data_init(apply(model, train=False))(params, x)
        expected = convpool_by_hand(params, x)
    chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("while")])
def test_all_layers(name):
    """Twice is once, and values are finite."""
    fn, params, args = LAYERS[name].build()
    with jax.numpy_dtype_promotion("standard"):
        try:
            once, report = wnjax.data_init(fn, report=True)(params, *args)
        except ValueError as error:
            if "nothing to initialize" not in str(error):
                raise
            return
        twice = wnjax.data_init(fn)(once, *args)
    assert any(one.samples for one in jax.tree.leaves(report, is_leaf=is_report))
    for x, y in zip(*map(jax.tree.leaves, (once, twice)), strict=True):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        tolerance = 5e-2 if x.dtype == jnp.bfloat16 or "bfloat16" in name else 1e-3
        scale = max(float(jnp.max(jnp.abs(x), initial=0)), 1.0)
        assert jnp.isfinite(x).all()
        np.testing.assert_allclose(y, x, atol=tolerance * scale, rtol=0)


def dense(params, x):
    y = x @ params["kernel"]
    return y + jnp.broadcast_to(params["bias"], y.shape)


def test_constant_neurons_keep_their_gain_and_get_their_bias():
    params = {"kernel": normal(3, 4).at[0, 1:].set(0), "bias": normal(4, seed=1)}
    x = jnp.concatenate([normal(200, 1, seed=2), jnp.full((200, 2), 0.3)], 1)
    found, report = wnjax.data_init(dense, report=True)(params, x)
    assert int(report["kernel"].constant) == 3
    np.testing.assert_allclose(found["kernel"][:, 1:], params["kernel"][:, 1:], rtol=1e-6)
    np.testing.assert_allclose(dense(found, x)[:, 1:], 0, atol=1e-6)
    assert_standardized(dense(found, x)[:, :1])
    assert "3 neurons constant" in wnjax.summary(report)


@pytest.mark.parametrize("log_scale", [False, True])
def test_a_batch_of_one_stays_finite(log_scale):
    params = {"kernel": normal(3, 4), "bias": jnp.zeros(4)}
    axes = {"kernel": 1, "bias": None}
    tree = wnjax.weight_norm(params, axes, log_scale=log_scale)
    found = wnjax.data_init(dense)(tree, normal(1, 3))
    chex.assert_tree_all_finite(found)
    chex.assert_trees_all_close(found["kernel"], tree["kernel"], rtol=1e-6)


def test_zero_directions_stay_zero():
    gv = wnjax.WeightNorm(g=jnp.ones((1, 4)), v=jnp.zeros((3, 4)))
    found = wnjax.data_init(dense)({"kernel": gv, "bias": jnp.ones(4)}, normal(100, 3))
    np.testing.assert_array_equal(found["kernel"].g, 1)
    np.testing.assert_array_equal(found["bias"], 0)


def test_log_scale_gets_the_logarithm():
    params = {"kernel": normal(3, 4), "bias": jnp.zeros(4)}
    axes, x = {"kernel": 1, "bias": None}, normal(100, 3)
    plain = wnjax.data_init(dense)(wnjax.weight_norm(params, axes), x)
    log = wnjax.data_init(dense)(wnjax.weight_norm(params, axes, log_scale=True), x)
    np.testing.assert_allclose(jnp.exp(log["kernel"].log_g), plain["kernel"].g, rtol=1e-6)


def test_target_deviations():
    def fn(params, x):
        return dense(params["b"], jnp.tanh(dense(params["a"], x)))

    params = {k: {"kernel": normal(4, 4, seed=i), "bias": jnp.ones(4)} for i, k in enumerate("ab")}
    x = normal(500, 4, seed=3)
    found = wnjax.data_init(fn, std={"b/kernel": 0.5})(params, x)
    np.testing.assert_allclose(fn(found, x).std(0), 0.5, rtol=1e-4)
    assert_standardized(dense(found["a"], x))
    off = wnjax.data_init(fn, std={"b/.*": 0.0})(params, x)
    np.testing.assert_allclose(fn(off, x), 0, atol=1e-6)
    with pytest.raises(ValueError, match="matches no leaf"):
        wnjax.data_init(fn, std={"c/kernel": 0.5})(params, x)
    with pytest.raises(ValueError, match="must be 0 or positive, got -1"):
        wnjax.data_init(fn, std=-1.0)(params, x)


def test_a_mask_leaves_padding_out():
    params, x = {"kernel": normal(3, 4), "bias": jnp.zeros(4)}, normal(50, 7, 3)
    mask = jax.random.bernoulli(jax.random.key(5), 0.6, (50, 7))
    expected = wnjax.data_init(dense)(params, x[mask])
    padded = jnp.where(mask[..., None], x, 100.0)
    chex.assert_trees_all_close(
        wnjax.data_init(dense, mask=mask)(params, padded), expected, rtol=1e-4, atol=1e-5
    )

    def flat(params, x):
        return dense(params, x.reshape(-1, 3))

    chex.assert_trees_all_close(
        wnjax.data_init(flat, mask=mask)(params, padded), expected, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) does not fit .*\(50, 7, 4\)"):
        wnjax.data_init(dense, mask=jnp.ones(3, bool))(params, x)


@pytest.fixture(scope="module")
def network():
    model, x = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(4)]), 1 + normal(160, 3)
    return apply(model), model.init(jax.random.key(0), x)["params"], x


def test_plain_parameters_get_what_their_gv_leaves_get(network):
    fn, params, x = network
    normalized_params = wnjax.weight_norm(params, wnjax.infer_axes(fn)(params, x))
    chex.assert_trees_all_close(
        wnjax.data_init(fn)(params, x),
        wnjax.fold(wnjax.data_init(fn)(normalized_params, x)),
        rtol=1e-6,
    )


def test_inside_jit(network):
    fn, params, x = network
    count = chex.assert_max_traces(wnjax.data_init(fn, report=True), n=1)
    jitted = jax.jit(count)
    (found, report), _ = jitted(params, x), jitted(params, x)
    chex.assert_trees_all_close(found, wnjax.data_init(fn)(params, x), rtol=1e-5, atol=1e-6)
    assert report["layers_0"]["kernel"].samples == 160


def test_pmap(network):
    fn, params, x = network
    expected = wnjax.data_init(fn)(params, x)
    with jax.numpy_rank_promotion("allow"):
        replicated = jax.pmap(
            lambda x: wnjax.data_init(fn, axis_name="i")(params, x), axis_name="i"
        )(x.reshape(8, 20, 3))
    for i in range(8):
        one = jax.tree.map(lambda p, i=i: p[i], replicated)
        chex.assert_trees_all_close(one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_shard_map(network, masked):
    fn, params, x = network
    mask = jnp.arange(160) % 3 > 0 if masked else None
    expected = wnjax.data_init(fn, mask=mask)(params, x)
    mesh, spec = Mesh(jax.devices(), "i"), PartitionSpec("i")

    def init(params, x, mask):
        return wnjax.data_init(fn, axis_name="i", mask=mask)(params, x)

    sharded = jax.shard_map(
        init, mesh=mesh, in_specs=(PartitionSpec(), spec, spec), out_specs=PartitionSpec()
    )
    found = jax.jit(sharded)(params, x, mask)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sharded_batch_under_jit(network):
    fn, params, x = network
    sharding = NamedSharding(Mesh(jax.devices(), "i"), PartitionSpec("i"))
    found = jax.jit(wnjax.data_init(fn))(params, jax.device_put(x, sharding))
    expected = wnjax.data_init(fn)(params, x)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_left_alone_is_said():
    model, x = nn.RNN(nn.SimpleCell(4)), normal(30, 5, 3)

    def fn(params, x):
        return dense(params["head"], model.apply({"params": params["rnn"]}, x))

    params = {
        "rnn": model.init(jax.random.key(0), x)["params"],
        "head": {"kernel": normal(4, 2), "bias": jnp.zeros(2)},
    }
    with pytest.warns(UserWarning, match="leaves these weights alone"):
        found, report = wnjax.data_init(fn, report=True)(params, x)
    assert "shared by the steps of a loop" in report["rnn"]["cell"]["h"]["kernel"].detail
    chex.assert_trees_all_equal(found["rnn"]["cell"]["h"], params["rnn"]["cell"]["h"])
    assert_standardized(fn(found, x))
    with pytest.raises(ValueError, match="nothing to initialize"):
        wnjax.data_init(lambda p, x: model.apply({"params": p}, x))(params["rnn"], x)


@pytest.mark.parametrize("used", ["twice", "branch", "penalty"])
def test_no_single_use(used):
    def fn(params, x):
        w = params["w"]
        if used == "twice":
            return jnp.tanh(x @ w) @ w
        if used == "penalty":
            return (x @ w).sum() + (w**2).sum()
        return jax.lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x, w)

    reasons = {"twice": "used 2 times", "branch": "branch alone", "penalty": "otherwise"}
    with pytest.raises(ValueError, match=reasons[used]):
        wnjax.data_init(fn)({"w": normal(3, 3)}, normal(100, 3))


def test_gv_leaves_that_stay_are_warned_of():
    def fn(params, x):
        return dense(params["a"], x) + jnp.tanh(x @ params["b"]) @ params["b"].T

    params = {"a": {"kernel": normal(4, 4), "bias": jnp.zeros(4)}, "b": normal(4, 4, seed=1)}
    tree = wnjax.weight_norm(params, {"a/kernel": 1, "a/bias": None, "b": 1})
    with pytest.warns(UserWarning, match=r"alone:\n  b: used in two roles"):
        found = wnjax.data_init(fn)(tree, normal(100, 4))
    chex.assert_trees_all_equal(found["b"], tree["b"])


def test_few_samples_are_warned_of():
    params = {"kernel": normal(3, 4), "bias": jnp.zeros(4)}
    with pytest.warns(UserWarning, match=r"fewer than 100 samples.*\n  kernel: 99"):
        wnjax.data_init(dense)(params, normal(99, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wnjax.data_init(dense)(params, normal(100, 3))


def test_bfloat16_computation():
    model, x = nn.Dense(8, dtype=jnp.bfloat16), 1 + normal(400, 16)
    params = model.init(jax.random.key(0), x)["params"]
    found = wnjax.data_init(apply(model))(params, x)
    y = apply(model)(found, x).astype(jnp.float32)
    np.testing.assert_allclose(y.mean(0), 0, atol=2e-2)
    np.testing.assert_allclose(y.std(0), 1, atol=1e-2)


def test_a_bias_added_after_a_mean_only_batch_norm():
    def fn(params, x):
        y = x @ params["kernel"]
        y = y - jnp.broadcast_to(y.mean(0), y.shape)
        return y + jnp.broadcast_to(params["bias"], y.shape)

    params, x = {"kernel": normal(3, 4), "bias": jnp.ones(4)}, 5 + normal(100, 3)
    found = wnjax.data_init(fn)(params, x)
    assert_standardized(fn(found, x))
    np.testing.assert_allclose(found["bias"], 0, atol=1e-5)


def side_by_side(params, x):
    """Two dense layers, each of an input of its own, as one weight."""
    y = jnp.einsum("bsi,sio->bso", x, params["kernel"])
    return y + jnp.broadcast_to(params["bias"], y.shape)


BROKEN = {"nan": jnp.nan, "infinite": -jnp.inf, "overflow": 3e38}


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("form", ["plain", "normalized", "log", "jit"])
def test_moments_that_are_not_finite_leave_neurons_as_they_were(value, form):
    """One number of the first layer's input is broken; the second layer has an input of its own."""
    params = {"kernel": normal(2, 3, 4), "bias": normal(2, 4, seed=1)}
    x = 2 + normal(200, 2, 3, seed=2)
    broken = x.at[7, 0, 1].set(BROKEN[value])
    axes = {"kernel": (0, 2), "bias": None}
    if form in ("normalized", "log"):
        params = wnjax.weight_norm(params, axes, log_scale=form == "log")
    init = partial(wnjax.data_init(side_by_side, report=True), params)
    want, _ = init(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, report = jax.jit(init)(broken) if form == "jit" else init(broken)
    for i, expected in enumerate([params, want]):
        one, other = (jax.tree.map(lambda p, i=i: p[i], tree) for tree in (found, expected))
        chex.assert_trees_all_close(one, other, rtol=1e-6, atol=1e-6)
    assert [int(report[name].not_finite) for name in ("kernel", "bias")] == [4, 4]
    assert "4 neurons without finite moments" in wnjax.summary(report)
    messages = [str(one.message) for one in caught]
    said = ["not finite" in m and "kernel: 4 of 8" in m and "bias: 4 of 8" in m for m in messages]
    assert said == ([] if form == "jit" else [True])


def test_neurons_that_are_constant_are_warned_of():
    """A layer that passes nothing on, so that all after it says nothing of the minibatch."""

    def fn(params, x):
        return dense(params["b"], jnp.maximum(dense(params["a"], x) - 100, 0))

    params = {name: {"kernel": normal(4, 4), "bias": jnp.ones(4)} for name in "ab"}
    with pytest.warns(UserWarning, match=r"are constant .*\n  b/kernel: 4 of 4"):
        found, report = wnjax.data_init(fn, report=True)(params, normal(100, 4))
    assert int(report["b"]["kernel"].constant) == 4
    chex.assert_trees_all_close(found["b"]["kernel"], params["b"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(found["b"]["bias"], 0)


@pytest.mark.parametrize("kind", ["parameters", "computation", "long v"])
def test_float16(kind):
    """Moments are float32, so that float16 gets what float32 gets, to its rounding."""
    x, params = 1 + normal(400, 16), {"kernel": normal(16, 8), "bias": jnp.zeros(8)}
    want = wnjax.data_init(dense)(params, x)
    dtype = jnp.float16

    def fn(params, x):
        return dense(*(jax.tree.map(lambda p: p.astype(dtype), tree) for tree in (params, x)))

    given = params
    if kind == "parameters":
        given = jax.tree.map(lambda p: p.astype(dtype), params)
    if kind == "long v":  # v in float16 is infinite
        given = wnjax.weight_norm(params)
        given["kernel"] = given["kernel"]._replace(v=1e6 * params["kernel"])
    found, report = wnjax.data_init(fn, report=True)(given, x)
    assert report["kernel"].action == "initialized"
    assert int(report["kernel"].not_finite) == 0
    chex.assert_trees_all_equal_shapes_and_dtypes(found, given)
    if kind == "long v":
        np.testing.assert_array_equal(found["kernel"].v, given["kernel"].v)
    low = jax.tree.map(lambda p: p.astype(jnp.float32), wnjax.fold(found))
    chex.assert_trees_all_close(low, want, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("inside", [False, True])
def test_loops_of_one_step_share_no_weights(inside):
    """Around a layer, and around or inside of a scan over layers, whose weights are their own."""

    def layers(params, x):
        def layer(x, p):
            def body(x):
                return jnp.tanh(dense(p, x))

            return (jax.lax.map(body, x[None])[0] if inside else body(x)), None

        return jax.lax.scan(layer, x, params)[0]

    def fn(params, x):
        def step(carry, x):
            return dense(params["head"], layers(params["stack"], x)), None

        if inside:
            return step(None, x)[0]
        return jax.lax.scan(lambda c, x: (step(c, x)[0], None), jnp.zeros((200, 2)), x[None])[0]

    def plain(params, x):
        for i in range(3):
            x = jnp.tanh(dense(jax.tree.map(lambda p, i=i: p[i], params["stack"]), x))
        return dense(params["head"], x)

    params = {
        "stack": {"kernel": normal(3, 4, 4), "bias": jnp.zeros((3, 4))},
        "head": {"kernel": normal(4, 2), "bias": jnp.zeros(2)},
    }
    x = 1 + normal(200, 4)
    found = wnjax.data_init(fn)(params, x)
    assert_standardized(plain(found, x))
    layers_apart = {f"{i}": jax.tree.map(lambda p, i=i: p[i], params["stack"]) for i in range(3)}

    def apart(params, x):
        for i in range(3):
            x = jnp.tanh(dense(params[f"{i}"], x))
        return dense(params["head"], x)

    want = wnjax.data_init(apart)(layers_apart | {"head": params["head"]}, x)
    stack = jax.tree.map(lambda *p: jnp.stack(p), *(want[f"{i}"] for i in range(3)))
    chex.assert_trees_all_close(found, {"stack": stack, "head": want["head"]}, rtol=1e-5, atol=1e-6)


def test_a_recurrent_network_on_one_time_step():
    def fn(params, xs):
        def step(h, x):
            h = jnp.tanh(x @ params["x"] + h @ params["h"])
            return h, h

        return jax.lax.scan(step, jnp.zeros((100, 4)), xs)[1][-1] @ params["head"]

    params = {"x": normal(3, 4), "h": normal(4, 4), "head": normal(4, 2)}
    x = normal(1, 100, 3)
    found = wnjax.data_init(fn)(params, x)
    np.testing.assert_allclose((x[0] @ found["x"]).std(0), 1, rtol=1e-5)
    np.testing.assert_allclose(fn(found, x).std(0), 1, rtol=1e-5)
    np.testing.assert_allclose(found["h"], params["h"], rtol=1e-6)  # the first state is constant


def test_weights_without_elements_are_left_alone():
    """Low-rank updates of rank 0, beside a weight that is initialized."""

    def fn(params, x):
        return dense(params["dense"], x) + x @ params["a"] @ params["b"]

    params = {
        "dense": {"kernel": normal(3, 4), "bias": jnp.zeros(4)},
        "a": normal(3, 0),
        "b": normal(0, 4),
    }
    x = normal(100, 3)
    with pytest.warns(UserWarning, match=r"alone:\n  a: it has no elements\n  b: it has no elem"):
        found = wnjax.data_init(fn)(params, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    assert_standardized(fn(found, x))
    with pytest.raises(ValueError, match=r"kernel: its output has no elements: the minibatch"):
        wnjax.data_init(dense)(params["dense"], x[:0])


def test_keywords_of_the_function_are_no_options():
    """Among them those of the attention's mask and of a noise's deviation."""

    def fn(params, x, mask, std):
        return std * dense(params, jnp.where(mask, x, 0))

    params, x = {"kernel": normal(3, 4), "bias": jnp.zeros(4)}, normal(100, 3)
    mask = jnp.ones((100, 3), bool).at[:, 0].set(False)
    found = wnjax.data_init(fn)(params, x, mask=mask, std=2.0)
    np.testing.assert_allclose(fn(found, x, mask, 2.0).std(0), 2, rtol=1e-5)  # twice 1


def in_a_branch(params, x):
    y = x @ params["w"]
    return jax.lax.cond(x[0, 0] > -99, lambda y: y + params["b"], lambda y: y, y)


def in_custom_derivatives(params, x):
    add = jax.custom_jvp(lambda y, b: y + b)
    add.defjvp(lambda primals, tangents: (add(*primals), sum(tangents)))
    return add(x @ params["w"], jnp.broadcast_to(params["b"], (len(x), 4)))


@pytest.mark.parametrize("fn", [in_a_branch, in_custom_derivatives])
def test_a_bias_that_is_added_out_of_reach_stays(fn):
    """The gain is set: the output before the bias has deviation 1, and its mean stays."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "b": jnp.ones(4)}
    x = jnp.asarray(2 * rng.normal(size=(200, 3)) + 1, jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        new, report = wnjax.data_init(fn, report=True)(params, x)
    np.testing.assert_allclose((x @ new["w"]).std(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(new["b"], params["b"])
    assert report["w"].action == "scale only"


def test_std_may_be_a_number_of_jax():
    params, x = {"w": jnp.ones((3, 4))}, jnp.arange(600.0).reshape(200, 3) / 100
    new = wnjax.data_init(lambda p, x: x @ p["w"], std=jnp.float32(0.5))(params, x)
    np.testing.assert_allclose((x @ new["w"]).std(0), 0.5, rtol=1e-5)
