"""`wnjax.linen.WeightNorm` against the same modules without it, and against sums by hand."""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict

import wnjax
from tests.test_sharding import DENSE, dense_layouts, normal, sgd_step, spread
from tests.toys import Attention, in_float64, train
from wnjax.linen import WeightNorm

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
KEY = jax.random.key(0)
flat = partial(flatten_dict, sep="/")


class Outer(nn.Module):
    """A module in another's setup: wrapped or plain, all names and random numbers are the same."""

    make: Callable[[], nn.Module]
    wrap: Callable[[nn.Module], nn.Module] = WeightNorm

    def setup(self):
        self.inner = self.make()
        self.wrapped = self.wrap(self.inner)

    def __call__(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)


def plain(make):
    return Outer(make, wrap=lambda module: module)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.relu(nn.Conv(4, (3,))(x)))
        return nn.Dense(3, name="head")(Attention(name="mix")(x).mean(1))


TRANSPOSED = partial(nn.ConvTranspose, 4, (3,), transpose_kernel=True)
GATES = [f"cell/{kind}{gate}/kernel" for kind in "ih" for gate in "ifgo"]
HEADS = "mix/MultiHeadDotProductAttention_0"
# The module, its input's shape, and the fan-in axes of all its weights, derived by hand.
CASES = {
    "dense": (partial(nn.Dense, 4), (5, 3), {"kernel": (0,)}),
    "transposed": (TRANSPOSED, (2, 5, 2), {"kernel": (0, 2)}),
    "lstm": (lambda: nn.RNN(nn.LSTMCell(4)), (2, 3, 3), dict.fromkeys(GATES, (0,))),
    "network": (
        Network,
        (2, 5, 3),
        {f"{HEADS}/{name}/kernel": (0,) for name in ("query", "key", "value")}
        | {f"{HEADS}/out/kernel": (0, 1), "Conv_0/kernel": (0, 1), "head/kernel": (0,)},
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def init(module, *args, **kwargs):
    return jax.jit(partial(module.init, **kwargs))(KEY, *args)


@cache
def built(name):
    """For a wrapped module and the plain one: output and fresh parameters; and the input."""
    make, shape, _ = CASES[name]
    x = jax.random.normal(jax.random.key(1), shape)
    return *(jax.jit(m.init_with_output)(KEY, x) for m in (Outer(make), plain(make))), x


def assert_close(actual, expected, tolerance=1e-6):
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


def with_gains_doubled(tree):
    return jax.tree.map(lambda label, a: a * 2 if label == "g" else a, wnjax.labels(tree), tree)


@every_case
def test_starts_as_the_plain_module_with_norms_over_the_fan_in_axes_as_gains(name):
    (y, variables), (want, plain_variables), _ = built(name)
    assert_close((y, wnjax.fold(variables)), (want, plain_variables), 1e-5)
    leaves, weights = (flat(v["params"]["inner"]) for v in (variables, plain_variables))
    fan_in = CASES[name][2]
    assert {k for k, leaf in leaves.items() if isinstance(leaf, wnjax.WeightNorm)} == set(fan_in)
    for path, axes in fan_in.items():
        want = np.sqrt((np.asarray(weights[path]) ** 2).sum(axes, keepdims=True))
        np.testing.assert_allclose(leaves[path].g, want, rtol=1e-6)


@every_case
def test_outputs_and_gradients_equal_those_of_explicit_nodes(name):
    make, _, fan_in = CASES[name]
    _, (_, params), x = built(name)

    def features(path, leaf):
        axes = fan_in.get(path.removeprefix("params/inner/"))
        return axes and tuple(i for i in range(leaf.ndim) if i not in axes)

    def both(nodes):
        losses = (
            lambda nodes: jnp.sum(jnp.sin(Outer(make).apply(nodes, x))),
            lambda nodes: jnp.sum(jnp.sin(plain(make).apply(wnjax.fold(nodes), x))),
        )
        return [jax.value_and_grad(loss)(nodes) for loss in losses]

    actual, expected = jax.jit(both)(with_gains_doubled(wnjax.weight_norm(params, features)))
    assert_close(actual, expected, 2e-5)


@every_case
def test_names_survive_a_flat_dict_and_bytes(name):
    tree = built(name)[0][1]["params"]
    assert not any("/" in name for path in flatten_dict(tree) for name in path)
    chex.assert_trees_all_equal(unflatten_dict(flat(tree), sep="/"), tree)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    chex.assert_trees_all_equal(serialization.from_bytes(zeros, serialization.to_bytes(tree)), tree)


def test_keeps_the_initializers_scale_which_flax_does_not():
    dense = nn.Dense(64, kernel_init=nn.initializers.normal(5.0))
    # The outputs for the unit vectors are the kernel.
    ours, flax = (
        w(dense).init_with_output(KEY, jnp.eye(100))[0] for w in (WeightNorm, nn.WeightNorm)
    )
    np.testing.assert_allclose(np.linalg.norm(ours, axis=0).mean(), 5 * np.sqrt(100), rtol=0.05)
    np.testing.assert_allclose(np.linalg.norm(flax, axis=0), 1, rtol=1e-5)


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x, *more, train, activation=nn.relu):
        x = activation(nn.Dense(8)(x)) + sum(more)
        self.sow("intermediates", "hidden", x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return {"y": nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x)), "no": None}


@pytest.mark.parametrize("train", [False, True])
def test_arguments_statistics_dropout_and_intermediates_are_those_of_the_plain_module(train):
    args, kwargs = (X, np.ones((5, 8), np.float32), 2), {"train": train, "activation": nn.gelu}
    variables = Outer(Stateful).init(KEY, *args, train=False)
    folded = variables | {"params": wnjax.fold(variables["params"])}
    assert_close(folded, plain(Stateful).init(KEY, *args, train=False))

    def run(module, variables, seed):
        rngs, mutable = {"dropout": jax.random.key(seed)}, ["batch_stats", "intermediates"]
        lists = {"mutable": mutable, "capture_intermediates": True}
        y, updated = module.apply(variables, *args, **kwargs, rngs=rngs, **lists)
        return y["y"], {k: v for k, v in flat(updated).items() if "inner" in k}

    y, updated = run(Outer(Stateful), variables, seed=1)
    assert {"intermediates/inner/hidden", "intermediates/inner/Dense_1/__call__"} <= set(updated)
    assert_close((y, updated), run(plain(Stateful), folded, seed=1), 1e-5)
    assert np.array_equal(y, run(Outer(Stateful), variables, seed=2)[0]) == (not train)


class Autoencoder(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(2), nn.Dense(3)

    def __call__(self, x, scale=1.0, only_encode=False):
        code = self.encoder(x) * scale
        return code if only_encode else self.decode(code)

    def decode(self, code):
        return self.decoder(code)


class CallsTwice(nn.Module):
    """Each of two calls makes the parameters of one layer."""

    decode: Any = "decode"

    def setup(self):
        self.net = WeightNorm(Autoencoder())

    def __call__(self, x):
        return self.net(self.net(x, only_encode=True), method=self.decode)

    def whole(self, x):
        return self.net(x, scale=2.0)


@pytest.mark.parametrize("decode", ["decode", Autoencoder.decode], ids=["name", "function"])
def test_methods_of_the_module_and_of_the_outer_one(decode):
    module = CallsTwice(decode)
    y, variables = module.init_with_output(KEY, X, method="whole")
    net = wnjax.fold(variables)["params"]["net"]["layer_instance"]
    code = X @ np.asarray(net["encoder"]["kernel"])
    assert_close(y, 2 * code @ np.asarray(net["decoder"]["kernel"]))
    assert_close(2 * module.apply(variables, X), y)


def test_apply_and_init_take_the_name_of_a_method():
    module = WeightNorm(Autoencoder())
    variables = module.init(KEY, X)
    weights = {"params": wnjax.fold(variables)["params"]["layer_instance"]}
    code = X[:, :2]
    want = Autoencoder().apply(weights, code, method="decode")
    assert_close(module.apply(variables, code, method="decode"), want)
    assert_close(module.bind(variables).decode(code), want)
    alone = module.init(KEY, code, method="decode")["params"]["layer_instance"]
    assert alone["decoder"]["kernel"].g.shape == (1, 3)
    with pytest.raises(AttributeError, match="no attribute"):
        module.apply(variables, code, method="dekode")


def test_copies_are_equal():
    module = WeightNorm(nn.Dense(3))
    for one in (copy.deepcopy(module), copy.copy(module), module.clone()):
        assert one == module


NO_MODULES = {
    "array": (jnp.ones((3, 4)), "but got a .*: wnjax.weight_norm takes trees of arrays"),
    "class": (nn.Dense, "but got the class Dense: make an instance of it first"),
    "nnx": (nnx.Linear(3, 4, rngs=nnx.Rngs(0)), "wnjax.nnx.WeightNorm takes those"),
}


@pytest.mark.parametrize("case", NO_MODULES)
def test_what_is_no_module_is_refused(case):
    given, message = NO_MODULES[case]
    with pytest.raises(TypeError, match=message):
        WeightNorm(given)


def test_every_call_that_makes_parameters_normalizes_them():
    y, variables = CallsTwice().init_with_output(KEY, X)
    net = variables["params"]["net"]["layer_instance"]
    shapes = {name: layer["kernel"].g.shape for name, layer in net.items()}
    assert shapes == {"encoder": (1, 2), "decoder": (1, 3)}
    assert_close(y, Autoencoder().apply({"params": wnjax.fold(net)}, X))
    assert_close(y, CallsTwice().apply(variables, X))


def test_a_module_called_twice_has_one_set_of_parameters():
    module = plain(lambda: nn.Sequential([WeightNorm(nn.Dense(3))] * 2))
    y, variables = module.init_with_output(KEY, X)
    ((_, kernel),) = [leaf for leaf in flat(variables).items() if leaf[0].endswith("kernel")]
    want = X @ np.asarray(kernel.v) @ np.asarray(kernel.v)  # g is ‖v‖ at the start
    assert_close((y, module.apply(variables, X)), (want, want))


class Layer(nn.Module):
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, carry, _):
        return WeightNorm(nn.Dense(3, kernel_init=self.kernel_init))(carry), None


def stack(lift, axis, layer=Layer, **kwargs):
    return lift(layer, variable_axes={"params": axis}, split_rngs={"params": True}, **kwargs)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("layer", [Layer, nn.remat(Layer)], ids=["layer", "remat"])
def test_scan_and_remat(axis, layer):
    module = stack(nn.scan, axis, layer, length=4)()
    variables = init(module, X, None)
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert kernel.g.shape == ((4, 1, 3), (1, 4, 3))[axis]
    vs = jnp.moveaxis(kernel.v, axis, 0)

    def scanned(x):
        return jnp.sum(module.apply(with_gains_doubled(variables), x, None)[0])

    def by_hand(x):
        return jnp.sum(jnp.linalg.multi_dot([x, *(2 * vs)]))  # g is ‖v‖ at the start

    assert_close(*(jax.value_and_grad(f)(jnp.asarray(X)) for f in (scanned, by_hand)), 1e-4)


def test_vmap_normalizes_every_member():
    module = stack(nn.vmap, 0, axis_size=4, in_axes=None)()
    variables = init(module, X, None)
    g, v = variables["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(g, np.sqrt((v**2).sum(1, keepdims=True)), rtol=1e-6)
    assert_close(module.apply(variables, X, None)[0], np.einsum("bi,nio->nbo", X, v))


@pytest.mark.usefixtures("x64")
def test_adam_steps_in_a_train_state_equal_those_by_hand():
    module, target = WeightNorm(nn.Dense(4)), jax.random.normal(KEY, (5, 4), jnp.float64)
    params, x = in_float64((init(module, X)["params"], X))

    def by_hand(p):
        w = p["g"] * p["v"] / jnp.sqrt(jnp.sum(p["v"] ** 2, axis=0, keepdims=True))
        return jnp.mean((x @ w + p["bias"][None] - target) ** 2)

    def leaves(layer):
        return {**layer["kernel"]._asdict(), "bias": layer["bias"]}

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - target) ** 2)

        with jax.numpy_dtype_promotion("standard"):  # optax itself promotes its step counts
            return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = TrainState.create(apply_fn=module.apply, params=params, tx=optax.adam(0.1))
    for _ in range(3):
        state = step(state)
    start, end = (leaves(p["layer_instance"]) for p in (params, state.params))
    assert_close(end, train(optax.adam(0.1), by_hand, start, 3), 1e-12)
    assert all(np.abs(end[name] - start[name]).min() > 1e-3 for name in ("g", "v", "bias"))


def test_neurons_of_zeros_train():
    module = WeightNorm(nn.Dense(4, kernel_init=nn.initializers.zeros, use_bias=False))
    variables, target = init(module, X), X @ np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(module.apply(variables, X), np.zeros((5, 4)))

    def loss(variables):
        return jnp.mean((module.apply(variables, X) - target) ** 2)

    assert loss(train(optax.adam(0.3), loss, variables, 100)) < 0.01 * loss(variables)


@pytest.mark.parametrize("name", ["param_dtype", "dtype"])
def test_bfloat16(name):
    make, x = partial(nn.Dense, 4, **{name: jnp.bfloat16}), jnp.asarray(X, jnp.bfloat16)
    (y, variables), (want, _) = (m.init_with_output(KEY, x) for m in (Outer(make), plain(make)))
    g, v = variables["params"]["inner"]["kernel"]
    assert g.dtype == jnp.float32
    assert v.dtype == {"param_dtype": jnp.bfloat16, "dtype": jnp.float32}[name]
    assert y.dtype == want.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), want.astype(jnp.float32), 2**-6)


def test_compiles_once():
    (_, variables), _, x = built("dense")
    chex.clear_trace_counter()
    apply = chex.assert_max_traces(lambda v, x: Outer(CASES["dense"][0]).apply(v, x), 1)
    assert not np.allclose(*map(jax.jit(apply), (variables, with_gains_doubled(variables)), (x, x)))


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_gains_have_no_axis_names_on_fan_in_axes(box):
    kernel_init = box(nn.initializers.lecun_normal(), ("in", "out"))
    lifted = stack(nn.scan, 0, length=2, metadata_params={nn.PARTITION_NAME: "layers"})
    module = lifted(kernel_init)
    variables = init(module, X, None)
    spec = nn.get_partition_spec(variables)["params"]["Dense_0"]["kernel"]
    assert spec == (jax.P("layers", None, "out"), jax.P("layers", "in", "out"))
    assert_close(*(module.apply(v, X, None) for v in (variables, nn.meta.unbox(variables))))


def test_axes_are_given_by_paths_inside_the_module():
    axes = {"layers_0/kernel": 0, ".*": None}
    module = WeightNorm(nn.Sequential([nn.Dense(4), nn.Dense(2)]), axes=axes)
    y, variables = module.init_with_output(KEY, X)
    first, second = (variables["params"]["layer_instance"][f"layers_{i}"]["kernel"] for i in (0, 1))
    assert first.g.shape == (3, 1)
    assert_close(y, X @ np.asarray(first.v) @ np.asarray(second))


REFUSED = {
    "range": (nn.Dense(4), {"kernel": 2}, r"^kernel of shape \(3, 4\): feature axis 2 is out of"),
    "name": (nn.Dense(4), {"kernal": 1}, r"'kernal' matches no leaf .*:\n  kernel\n  bias"),
    "fan_in": (nn.Dense(4), {"kernel": (0, 1)}, r"^kernel of shape .* leave no fan-in axis"),
    "no_weights": (nn.LayerNorm(), "traced", r"no leaf is a weight.*\n  bias: .*\n  scale: scale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_axes_that_do_not_fit_are_refused(case):
    module, axes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        WeightNorm(module, axes=axes).init(KEY, X)


def sharded_step(how, layout):
    """A step on shards; what it is to be, as a function; and its arguments."""
    kernel, g, bias, outputs = DENSE[layout]
    batch = normal(16, 8, seed=1), normal(16, 12, seed=2)
    variables = with_gains_doubled(init(WeightNorm(nn.Dense(12)), batch[0]))

    def step(variables, *batch, how=how):
        v = variables["params"]["layer_instance"]["kernel"].v
        module = WeightNorm(nn.Dense(v.shape[1]))  # of the neurons that are here

        def loss(variables, x, y):
            return jnp.mean((module.apply(variables, x) - y) ** 2)

        return sgd_step(loss, how, variables, *batch)

    layer = {"kernel": wnjax.WeightNorm(g, kernel), "bias": bias}
    specs = ({"params": {"layer_instance": layer}}, jax.P("data"), outputs)
    return (lambda: spread(how, step, specs, variables, *batch)), step(variables, *batch, how=None)


@dense_layouts
def test_a_step_on_shards_is_that_on_the_whole(how, layout):
    found, expected = sharded_step(how, layout)
    assert_close(found(), expected, 1e-5)


def test_the_norm_of_a_shard_is_refused():
    found, _ = sharded_step("shard_map", "fan-in")
    with pytest.raises(ValueError, match="kernel: its fan-in axes seem to be split"):
        found()
