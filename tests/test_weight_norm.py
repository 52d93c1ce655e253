"""The transform and its inverse: the function kept, both of g and v trained, errors told."""

from functools import partial

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import wnjax
from tests import toys

pytestmark = pytest.mark.usefixtures("optimized")

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", toys.LAYERS)
def test_layer_keeps_its_weights_and_outputs(name, dtype):
    fn, params, x = toys.linen(name, dtype)
    normalized = wnjax.weight_norm(params)
    folded = wnjax.fold(normalized)

    assert {k: n["g"].shape for k, n in wnjax.norms(normalized).items()} == toys.LAYERS[name][2]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), folded) == jax.tree.map(
        lambda a: (a.shape, a.dtype), params
    )
    jax.tree.map(np.testing.assert_array_equal, folded, params)  # exact outside jit
    np.testing.assert_array_equal(fn(folded, x), fn(params, x))
    inside_jit = jax.jit(lambda params: wnjax.fold(wnjax.weight_norm(params)))(params)
    assert toys.ulps(inside_jit, params) <= (2 if dtype == jnp.float32 else 0)


@pytest.mark.parametrize("name", ["dense", "conv2d"])
def test_float64_weights_are_kept(name, x64):
    params = toys.linen(name, jnp.float64)[1]
    normalized = wnjax.weight_norm(params)
    assert (normalized["kernel"].g.dtype, normalized["kernel"].v.dtype) == (jnp.float64,) * 2
    jax.tree.map(np.testing.assert_array_equal, wnjax.fold(normalized), params)
    inside_jit = jax.jit(lambda params: wnjax.fold(wnjax.weight_norm(params)))(params)
    assert toys.ulps(inside_jit, params) <= 2


@pytest.mark.parametrize(
    ("module", "x_shape", "axes", "g_shape"),
    [
        (nn.DenseGeneral((2, 3)), (5, 4), (-2, -1), (1, 2, 3)),
        (nn.DenseGeneral((2, 3), axis=(-2, -1)), (5, 4, 6), (-2, -1), (1, 1, 2, 3)),
        (nn.DenseGeneral(3, batch_dims=0), (5, 4), (0, -1), (5, 1, 3)),
        (nn.ConvTranspose(4, (3, 3), transpose_kernel=True), (5, 4, 4, 2), -2, (1, 1, 4, 1)),
        (nn.Conv(4, (3, 3), feature_group_count=2), (5, 8, 8, 2), -1, (1, 1, 1, 4)),
        (nn.Dense(4), (5, 3), (), (1, 1)),
    ],
)
def test_layer_with_explicit_axes(module, x_shape, axes, g_shape):
    x = jax.random.normal(jax.random.key(1), x_shape)
    params = module.init(jax.random.key(0), x)["params"]
    normalized = wnjax.weight_norm(params, axes={"kernel": axes})
    assert normalized["kernel"].g.shape == g_shape
    w = np.asarray(params["kernel"])
    features = {int(axis) % w.ndim for axis in np.atleast_1d(axes)}
    fan_in = tuple(axis for axis in range(w.ndim) if axis not in features)
    expected = np.sqrt((w.astype(np.float64) ** 2).sum(fan_in, keepdims=True))
    np.testing.assert_allclose(normalized["kernel"].g, expected, rtol=1e-6)
    folded = wnjax.fold(normalized)
    np.testing.assert_array_equal(
        module.apply({"params": folded}, x), module.apply({"params": params}, x)
    )


@pytest.mark.parametrize("name", toys.TREES)
def test_tree_keeps_its_containers_and_weights(name):
    params = toys.TREES[name]()
    normalized = wnjax.weight_norm(params)
    assert type(normalized) is type(params)
    folded = wnjax.fold(normalized)
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, folded, params)


def test_fold_is_idempotent_and_safe_on_plain_trees():
    params = toys.mlp_params() | {"none": None, "empty": {}, "count": 3}
    assert jax.tree.structure(wnjax.fold(params)) == jax.tree.structure(params)
    once = wnjax.fold(wnjax.weight_norm(params))
    jax.tree.map(np.testing.assert_array_equal, wnjax.fold(once), once)


def test_nnx_model_trains_on_g_and_v():
    model = toys.TwoLayers(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    x = jax.random.normal(jax.random.key(1), (16, 3))
    normalized = wnjax.weight_norm(params)
    assert isinstance(nnx.filter_state(normalized, nnx.Param)["first"]["kernel"], nnx.Param)

    def loss(params):
        return jnp.mean((nnx.merge(graph, wnjax.fold(params))(x) - 1) ** 2)

    trained = toys.train(optax.adam(1e-2), loss, normalized, steps=5)
    assert loss(trained) < loss(normalized)
    jax.tree.map(
        lambda a, b: pytest.fail("did not move") if (a == b).all() else None, trained, normalized
    )
    np.testing.assert_array_equal(  # the model's own weights were not written to
        model.first.kernel[...], wnjax.fold(normalized)["first"]["kernel"][...]
    )


def test_result_shares_no_variable_with_the_input():
    params = toys.nnx_state()
    normalized = wnjax.weight_norm(params)
    folded = wnjax.fold(normalized)
    assert normalized["first"]["bias"] is not params["first"]["bias"]
    assert folded["first"]["bias"] is not normalized["first"]["bias"]


def test_linen_boxes_keep_their_names():
    normalized = wnjax.weight_norm(toys.boxed(toys.mlp_params()))
    specs = nn.get_partition_spec(normalized)["first"]["kernel"]
    assert specs == wnjax.WeightNorm(jax.P(None, "out"), jax.P("in", "out"))
    assert wnjax.fold(normalized)["first"]["kernel"].names == ("in", "out")


def test_nnx_sharding_metadata_keeps_its_names():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
    with jax.set_mesh(mesh):
        params = nnx.state(nnx.Linear(3, 4, kernel_init=kernel_init, rngs=nnx.Rngs(0)))
    normalized = wnjax.weight_norm(params)
    specs = nnx.get_partition_spec(normalized)["kernel"]
    assert specs.g.get_value() == jax.P(None, "model")
    assert specs.v.get_value() == jax.P("data", "model")
    folded = wnjax.fold(normalized)
    assert folded["kernel"].get_metadata() == params["kernel"].get_metadata()
    np.testing.assert_array_equal(folded["kernel"][...], params["kernel"][...])


def test_bridged_metadata_keeps_its_names():
    box = nnx.bridge.NNXMeta(nnx.Param, jnp.ones((3, 4)), {"out_sharding": ("data", "model")})
    gv = wnjax.weight_norm({"kernel": box})["kernel"]
    assert gv.g.metadata["out_sharding"] == (None, "model")
    assert gv.v.metadata["out_sharding"] == ("data", "model")


@pytest.mark.parametrize(
    "sharding", [jax.P("data", "model"), jax.P("data")], ids=["both axes", "trailing None left out"]
)
def test_partition_specs_as_names(sharding):
    param = nnx.Param(jnp.ones((3, 4)))
    gv = wnjax.weight_norm({"kernel": param.replace(param[...], out_sharding=sharding)})["kernel"]
    assert gv.g.get_metadata()["out_sharding"] == jax.P(None, *sharding[1:])


def test_named_sharding_as_names():
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    sharding = jax.NamedSharding(mesh, jax.P("data", "model"))
    param = nnx.Param(jnp.ones((4, 8)))
    gv = wnjax.weight_norm({"kernel": param.replace(param[...], out_sharding=sharding)})["kernel"]
    assert gv.g.get_metadata()["out_sharding"] == jax.NamedSharding(mesh, jax.P(None, "model"))


def test_equinox_module_with_explicit_axes():
    model = eqx.nn.MLP(3, 4, 8, 1, key=jax.random.key(0))
    normalized = wnjax.weight_norm(model, axes={r"layers/\d+/weight": 0})
    assert normalized.layers[0].weight.g.shape == (8, 1)
    x = jnp.ones(3)
    np.testing.assert_array_equal(wnjax.fold(normalized)(x), model(x))


def test_haiku_tree_with_explicit_axes():
    def forward(x):
        return hk.nets.MLP((8, 4))(x)

    net = hk.without_apply_rng(hk.transform(forward))
    x = jnp.ones((2, 3))
    params = net.init(jax.random.key(0), x)
    normalized = wnjax.weight_norm(params, axes={".*/w": -1})
    assert normalized["mlp/~/linear_0"]["w"].g.shape == (1, 8)
    np.testing.assert_array_equal(net.apply(wnjax.fold(normalized), x), net.apply(params, x))


FUNCTIONS_OF_NODES = {
    "fold": wnjax.fold,
    "wrap": wnjax.wrap(lambda params: params),
    "norms": wnjax.norms,
    "labels": wnjax.labels,
    "summary": wnjax.summary,
    "weight_normalized": wnjax.weight_normalized(optax.sgd(0.1)).init,
    "keep_norms": wnjax.keep_norms().init,
    "data_init": wnjax.data_init(lambda params: params),
    "neurons": wnjax.infer_axes(lambda params: params),
}


@pytest.mark.parametrize("name", FUNCTIONS_OF_NODES)
def test_haikus_immutable_dicts_are_refused(name):
    """They flatten what is put in them, so that a (g, v) leaf is two leaves and not found again."""
    plain = {"linear": {"kernel": jnp.ones((3, 4)), "b": jnp.zeros(4)}}
    normalized_params = hk.data_structures.to_immutable_dict(wnjax.weight_norm(plain))
    assert len(jax.tree.leaves(normalized_params)) == 3
    with pytest.raises(ValueError, match=r"a FlatMap keeps its content .*to_mutable_dict"):
        FUNCTIONS_OF_NODES[name]({"model": normalized_params})
    frozen = hk.data_structures.to_immutable_dict(plain)
    with pytest.raises(ValueError, match=r"a FlatMap keeps its content .*to_mutable_dict"):
        wnjax.weight_norm(frozen, axes={".*": -1})
    mutable = hk.data_structures.to_mutable_dict(normalized_params)
    chex.assert_trees_all_equal(wnjax.fold(mutable), plain)


def test_log_scale_computes_and_trains_the_same_function():
    fn, params, x = toys.linen("dense")
    normalized = wnjax.weight_norm(params, log_scale=True)
    np.testing.assert_allclose(fn(wnjax.fold(normalized), x), fn(params, x), rtol=1e-6)

    def loss(params):
        return jnp.mean((fn(wnjax.fold(params), x) - 1) ** 2)

    g, log_g = (
        jax.grad(loss)(wnjax.weight_norm(params, log_scale=log))["kernel"][0]
        for log in (False, True)
    )
    norms = wnjax.norms(normalized)["kernel"]
    np.testing.assert_allclose(log_g, norms["g"] * g, rtol=1e-5)  # ∂L/∂s = g ∂L/∂g
    trained = toys.train(optax.sgd(0.1), loss, normalized, steps=5)
    assert loss(trained) < loss(normalized)


def test_sgd_steps_equal_a_hand_written_loop(x64):
    """Both g and v train: ten steps on a linear regression against numpy in float64."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(16, 3)), rng.normal(size=(16, 4)), rng.normal(size=(3, 4))

    def loss(params):
        return jnp.mean((x @ wnjax.fold(params)["kernel"] - y) ** 2)

    trained = toys.train(optax.sgd(0.1), loss, wnjax.weight_norm({"kernel": jnp.asarray(w)}), 10)

    v, g = w.copy(), np.linalg.norm(w, axis=0)
    for _ in range(10):
        n = np.linalg.norm(v, axis=0)
        grad_w = 2 * x.T @ (x @ (g * v / n) - y) / y.size
        grad_g = (grad_w * v).sum(0) / n
        grad_v = g / n * grad_w - g * grad_g / n**2 * v
        g, v = g - 0.1 * grad_g, v - 0.1 * grad_v
    np.testing.assert_allclose(trained["kernel"].v, v, rtol=1e-12)
    np.testing.assert_allclose(trained["kernel"].g[0], g, rtol=1e-12)


class TestZeroNeurons:
    """Neurons without a direction: finite, unchanged, and trained."""

    @pytest.fixture
    def params(self):
        kernel = toys.mlp_params()["second"]["kernel"].at[:, ::2].set(0)
        return {"kernel": kernel, "bias": jnp.zeros(16)}

    def loss(self, params):
        x = jax.random.normal(jax.random.key(2), (32, 8))
        params = wnjax.fold(params)
        return jnp.mean((x @ params["kernel"] + params["bias"][None, :] - x.sum() / 10) ** 2)

    @pytest.mark.parametrize("transform", [wnjax.weight_norm, jax.jit(wnjax.weight_norm)])
    def test_function_is_unchanged_and_all_is_finite(self, params, transform):
        normalized = transform(params)
        gv = normalized["kernel"]
        assert (gv.g[0, ::2] == 0).all()
        assert (jnp.linalg.norm(gv.v, axis=0)[::2] > 0.1).all()
        np.testing.assert_array_equal(gv.v[:, 1::2], params["kernel"][:, 1::2])
        assert toys.ulps(wnjax.fold(normalized), params) <= 2
        value, grads = jax.value_and_grad(self.loss)(normalized)
        np.testing.assert_allclose(value, self.loss(params), rtol=1e-6)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert (grads["kernel"].g[0] != 0).all()

    def test_they_move(self, params):
        start = wnjax.weight_norm(params)
        trained = toys.train(optax.sgd(0.1), self.loss, start, steps=20)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(trained))
        assert (jnp.linalg.norm(wnjax.fold(trained)["kernel"], axis=0)[::2] > 1e-3).all()
        assert (trained["kernel"].g[0, ::2] != 0).all()
        assert (trained["kernel"].v != start["kernel"].v)[:, ::2].any(axis=0).all()
        assert self.loss(trained) < self.loss(params)

    def test_directions_differ_by_neuron_and_leaf_and_not_by_run(self):
        zeros = {"a": {"kernel": jnp.zeros((8, 4))}, "b": {"kernel": jnp.zeros((8, 4))}}
        first, again = wnjax.weight_norm(zeros), wnjax.weight_norm(zeros)
        jax.tree.map(np.testing.assert_array_equal, first, again)
        v = jnp.concatenate([first["a"]["kernel"].v, first["b"]["kernel"].v], axis=1)
        v = v / jnp.linalg.norm(v, axis=0, keepdims=True)
        assert (jnp.abs(v.T @ v) < 0.99).sum() == 8 * 8 - 8

    def test_log_scale_refuses_them(self, params):
        with pytest.raises(
            ValueError, match=r"^kernel: 8 of 16 neurons are all zeros.*log_scale=False"
        ):
            wnjax.weight_norm(params, log_scale=True)
        inside_jit = jax.jit(lambda p: wnjax.weight_norm(p, log_scale=True))(params)
        np.testing.assert_allclose(wnjax.fold(inside_jit)["kernel"][:, ::2], 0, atol=1e-37)
        decayed = toys.train(optax.adamw(1e-2), self.loss, inside_jit, steps=3)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(decayed))
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(jax.grad(self.loss)(inside_jit)))

    def test_zero_v_gives_zero_weight_and_zero_gradients(self):
        gv = wnjax.WeightNorm(g=jnp.ones((1, 2)), v=jnp.zeros((3, 2)))
        w, pullback = jax.vjp(wnjax.fold, gv)
        np.testing.assert_array_equal(w, 0)
        jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), pullback(jnp.ones((3, 2))))


def test_numpy_leaves_are_copied_and_become_jax_arrays():
    kernel = np.random.default_rng(0).normal(size=(3, 4))
    gv = wnjax.weight_norm({"kernel": kernel})["kernel"]
    before = wnjax.fold(gv)
    kernel[:] = 0
    assert (gv.g.dtype, gv.v.dtype, before.dtype) == (jnp.float32,) * 3
    np.testing.assert_array_equal(wnjax.fold(gv), before)
    assert (before != 0).all()


def test_empty_fan_in():
    params = {"kernel": jnp.zeros((0, 4))}
    assert wnjax.fold(wnjax.weight_norm(params))["kernel"].shape == (0, 4)
    assert jax.jit(wnjax.weight_norm)(params)["kernel"].g.shape == (1, 4)


class TestErrors:
    """Each error says what was wrong, where, and what to do; those about axes are in test_axes."""

    def test_integer_kernel(self):
        with pytest.raises(TypeError, match=r"^kernel has dtype int8; only floating-point arrays"):
            wnjax.weight_norm({"kernel": jnp.ones((2, 2), jnp.int8)})

    def test_complex_kernel(self):
        with pytest.raises(TypeError, match=r"^kernel has dtype complex64"):
            wnjax.weight_norm({"kernel": jnp.ones((2, 2), jnp.complex64)})

    def test_no_array(self):
        with pytest.raises(TypeError, match=r"^name is a str; only floating-point arrays"):
            wnjax.weight_norm({"name": "x"}, axes={"name": 0})

    @pytest.mark.parametrize("tree", ["dict", "nnx_state", "partitioned"])
    def test_already_normalized(self, tree):
        normalized = wnjax.weight_norm(toys.TREES[tree]())
        with pytest.raises(
            ValueError,
            match=r"these are \(g, v\) leaves already; fold\(params\) first:\n  first/kernel",
        ):
            wnjax.weight_norm(normalized)

    def test_shapes_that_do_not_fit(self):
        tree = {"layer": wnjax.WeightNorm(g=jnp.ones((4,)), v=jnp.ones((3, 4)))}
        with pytest.raises(ValueError, match=r"^layer: g of shape \(4,\) does not fit v of shape"):
            wnjax.fold(tree)
        with pytest.raises(ValueError, match=r"^layer: log_g of shape \(1, 3\) does not fit"):
            wnjax.fold({"layer": wnjax.LogWeightNorm(jnp.ones((1, 3)), jnp.ones((3, 4)))})


def test_weights_without_elements_compute_and_train_nothing():
    """A low-rank update of rank 0 beside a weight: in every form that of the weight alone."""
    params = {"a": jnp.ones((3, 0)), "b": jnp.ones((0, 4)), "w": jnp.arange(12.0).reshape(3, 4)}
    x = jnp.ones((5, 3))

    def fn(params, x):
        return x @ params["a"] @ params["b"] + x @ params["w"]

    def loss(fn, params):
        return jnp.sum(fn(params, x) ** 2)

    axes = wnjax.infer_axes(fn)(params, x)
    normalized_params = wnjax.weight_norm(params, axes)
    chex.assert_trees_all_equal(wnjax.fold(normalized_params), params)
    alone = wnjax.weight_norm({"w": params["w"]}, {"w": 1})
    grads = jax.grad(partial(loss, wnjax.wrap(fn)))(normalized_params)
    want = jax.grad(partial(loss, wnjax.wrap(lambda params, x: x @ params["w"])))(alone)
    chex.assert_trees_all_close(grads["w"], want["w"], rtol=1e-6)
    chex.assert_tree_all_finite(grads)
    for optimizer in (
        wnjax.weight_normalized(optax.sgd(0.1, momentum=0.9), axes),
        wnjax.keep_norms(axes),
    ):
        plain = jax.grad(partial(loss, fn))(params)
        updates, _ = optimizer.update(plain, optimizer.init(params), params)
        chex.assert_trees_all_equal_shapes(updates, params)
        chex.assert_tree_all_finite(updates)
