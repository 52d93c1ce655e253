"""`wnjax.linen.WeightNorm` against the same modules without it, and against sums by hand."""

import copy
import dataclasses
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
def test_outputs_and_gradients_equal_those_of_explicit_gv_leaves(name):
    make, _, fan_in = CASES[name]
    _, (_, params), x = built(name)

    def features(path, leaf):
        axes = fan_in.get(path.removeprefix("params/inner/"))
        return axes and tuple(i for i in range(leaf.ndim) if i not in axes)

    def both(normalized_params):
        losses = (
            lambda normalized_params: jnp.sum(jnp.sin(Outer(make).apply(normalized_params, x))),
            lambda normalized_params: jnp.sum(
                jnp.sin(plain(make).apply(wnjax.fold(normalized_params), x))
            ),
        )
        return [jax.value_and_grad(loss)(normalized_params) for loss in losses]

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

    wrap: Callable[[nn.Module], nn.Module] = WeightNorm

    def setup(self):
        self.net = self.wrap(Autoencoder())

    def __call__(self, x):
        return self.net.decode(self.net(x, only_encode=True))

    def whole(self, x):
        return self.net(x, scale=2.0)


def test_methods_of_the_module_and_of_the_outer_one():
    module = CallsTwice()
    y, variables = module.init_with_output(KEY, X, method="whole")
    net = wnjax.fold(variables)["params"]["net"]
    code = X @ np.asarray(net["encoder"]["kernel"])
    assert_close(y, 2 * code @ np.asarray(net["decoder"]["kernel"]))
    assert_close(2 * module.apply(variables, X), y)


def test_apply_and_init_take_the_name_of_a_method():
    module = WeightNorm(Autoencoder())
    variables = module.init(KEY, X)
    code = X[:, :2]
    want = Autoencoder().apply(wnjax.fold(variables), code, method="decode")
    assert_close(module.apply(variables, code, method="decode"), want)
    assert_close(module.bind(variables).decode(code), want)
    alone = module.init(KEY, code, method="decode")["params"]
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
    net = variables["params"]["net"]
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
    start, end = (leaves(p) for p in (params, state.params))
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
    first, second = (variables["params"][f"layers_{i}"]["kernel"] for i in (0, 1))
    assert first.g.shape == (3, 1)
    assert_close(y, X @ np.asarray(first.v) @ np.asarray(second))


REFUSED = {
    "range": (nn.Dense(4), {"kernel": 2}, r"^kernel of shape \(3, 4\): feature axis 2 is out of"),
    "name": (nn.Dense(4), {"kernal": 1}, r"'kernal' matches no leaf .*:\n  kernel\n  bias"),
    "fan_in": (nn.Dense(4), {"kernel": (0, 1)}, r"^kernel of shape .* leave no fan-in axis"),
    "no_weights": (nn.LayerNorm(), None, r"no leaf is a weight.*\n  bias: .*\n  scale: scale"),
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
        v = variables["params"]["kernel"].v
        module = WeightNorm(nn.Dense(v.shape[1]))  # of the neurons that are here

        def loss(variables, x, y):
            return jnp.mean((module.apply(variables, x) - y) ** 2)

        return sgd_step(loss, how, variables, *batch)

    layer = {"kernel": wnjax.WeightNorm(g, kernel), "bias": bias}
    specs = ({"params": layer}, jax.P("data"), outputs)
    return (lambda: spread(how, step, specs, variables, *batch)), step(variables, *batch, how=None)


@dense_layouts
def test_a_step_on_shards_is_that_on_the_whole(how, layout):
    found, expected = sharded_step(how, layout)
    assert_close(found(), expected, 1e-5)


def test_the_norm_of_a_shard_is_refused():
    found, _ = sharded_step("shard_map", "fan-in")
    with pytest.raises(ValueError, match="kernel: its fan-in axes seem to be split"):
        found()


class Plain(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.Dense(3)(carry), None


class Carry(nn.Module):
    """Turns stacked layers into a function of x alone."""

    layers: nn.Module

    def __call__(self, x):
        return self.layers(x, None)[0]


class Statistics(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(x))


BOXED = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
PLAIN = {
    "dense": (partial(nn.Dense, 4), (5, 3)),
    "transposed": (TRANSPOSED, (2, 5, 2)),
    "lstm": (lambda: nn.RNN(nn.LSTMCell(4)), (2, 3, 3)),
    "sequential": (lambda: nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), (5, 3)),
    "network": (Network, (2, 5, 3)),
    "setup": (Autoencoder, (5, 3)),
    "statistics": (Statistics, (5, 3)),
    "scan": (lambda: Carry(stack(nn.scan, 0, Plain, length=3)()), (5, 3)),
    "vmap": (lambda: Carry(stack(nn.vmap, 0, Plain, axis_size=4, in_axes=None)()), (5, 3)),
    "remat": (lambda: nn.remat(nn.Dense)(4), (5, 3)),
    "jit": (nn.jit(Network), (2, 5, 3)),
    "boxes": (lambda: nn.Dense(4, kernel_init=BOXED), (5, 3)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_folded_variables_are_those_of_the_plain_module(name):
    """At its paths, from the same random numbers; so are outputs, intermediates and statistics."""
    make, shape = PLAIN[name]
    x, rngs = jax.random.normal(KEY, shape), {"params": KEY, "dropout": jax.random.key(1)}
    layer, module = make(), WeightNorm(make())
    (_, variables), (_, expected) = (m.init_with_output(rngs, x) for m in (module, layer))
    assert any(map(wnjax.is_weight_norm, jax.tree.leaves(variables, is_leaf=wnjax.is_weight_norm)))
    chex.assert_trees_all_equal_structs(wnjax.fold(variables), expected)
    assert_close(wnjax.fold(variables), expected)

    variables |= {"params": with_gains_doubled(variables["params"])}
    options = {"mutable": True, "capture_intermediates": True, "rngs": {"dropout": KEY}}
    y, state = module.apply(variables, x, **options)
    want, updated = layer.apply(wnjax.fold(variables), x, **options)
    chex.assert_trees_all_equal(state.pop("params"), variables["params"])
    updated.pop("params")
    assert_close((y, state), (want, updated), 1e-5)


class Several(nn.Module):
    """All ways to make wrapped layers in a parent, plain if `wrap` does nothing."""

    wrap: Callable[..., nn.Module] = WeightNorm

    def setup(self):
        self.first = nn.Dense(3)
        self.again = self.wrap(self.first)
        self.listed = [self.wrap(nn.Dense(3)) for _ in range(2)]
        self.named = self.wrap(Autoencoder())
        self.compact = Wraps(self.wrap)

    def __call__(self, x):
        for layer in (self.again, *self.listed, self.again, self.compact):
            x = layer(x)
        return self.named(x) + self.named.decode(self.named(x, only_encode=True))


class Wraps(nn.Module):
    wrap: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        shared = self.wrap(nn.Dense(3))
        x = self.wrap(nn.Dense(3, name="named"))(shared(x))
        x = self.wrap(nn.Dense(3), name="a name of the wrapper")(x)
        return self.wrap(Autoencoder())(shared(x))


def test_wrapped_layers_in_a_parent_keep_the_paths_of_plain_ones():
    module, layer = Several(), Several(lambda layer, name=None: layer)
    variables, expected = module.init(KEY, X), layer.init(KEY, X)
    chex.assert_trees_all_equal_structs(wnjax.fold(variables), expected)
    assert_close(wnjax.fold(variables), expected)
    variables = with_gains_doubled(variables)
    assert_close(module.apply(variables, X), layer.apply(wnjax.fold(variables), X), 1e-5)


class Holds(nn.Module):
    """A module that has the layer as an attribute, for transformations around both."""

    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


class ScanHolds(Holds):
    def __call__(self, x, _):
        return self.layer(x), None


class Borrows(nn.Module):
    """One that lends its own layer, wrapped, to a module that is transformed."""

    wrap: Callable[[nn.Module], nn.Module]

    def setup(self):
        self.own = nn.Dense(3)
        self.borrower = nn.remat(Holds)(self.wrap(self.own))

    def __call__(self, x):
        return self.borrower(x)


def held_by(module):
    return lambda wrap: module(wrap(nn.Dense(3)))


SCAN = stack(nn.scan, 0, ScanHolds, length=4)
VMAP = stack(nn.vmap, 0, Holds, axis_size=4, in_axes=None)
HELD = {
    "alone": held_by(Holds),
    "jit": held_by(nn.jit(Holds)),
    "remat": held_by(nn.remat(Holds)),
    "remat of jit": held_by(lambda layer: nn.remat(Holds)(nn.jit(Holds)(layer))),
    "several": lambda wrap: nn.remat(nn.Sequential)([wrap(nn.Dense(3)), wrap(Autoencoder())]),
    "scan": lambda wrap: Carry(SCAN(wrap(nn.Dense(3)))),
    "vmap": held_by(VMAP),
    "lent": nn.jit(Borrows),
    "a network of wrappers": lambda wrap: nn.remat(Holds)(Several(wrap)),
}


@pytest.mark.parametrize("name", HELD)
def test_transformations_around_a_module_that_holds_the_wrapper(name):
    module, layer = HELD[name](WeightNorm), HELD[name](lambda layer, name=None: layer)
    variables, expected = module.init(KEY, X), layer.init(KEY, X)
    chex.assert_trees_all_equal_structs(wnjax.fold(variables), expected)
    assert_close(wnjax.fold(variables), expected)
    variables = with_gains_doubled(variables)
    assert_close(module.apply(variables, X), layer.apply(wnjax.fold(variables), X), 1e-4)


TRANSFORMED = {
    "jit": (nn.jit(WeightNorm), lambda layer: layer),
    "remat": (nn.remat(WeightNorm), lambda layer: layer),
    "vmap": (
        stack(nn.vmap, 0, WeightNorm, axis_size=4, in_axes=None),
        lambda layer: stack(nn.vmap, 0, nn.Dense, axis_size=4, in_axes=None)(layer.features),
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations_of_the_class(name):
    module, layer = (make(nn.Dense(4)) for make in TRANSFORMED[name])
    variables, expected = module.init(KEY, X), layer.init(KEY, X)
    chex.assert_trees_all_equal_structs(wnjax.fold(variables), expected)
    variables = with_gains_doubled(variables)
    assert_close(module.apply(variables, X), layer.apply(wnjax.fold(variables), X), 1e-5)


def test_tabulate_counts_the_parameters():
    table = WeightNorm(nn.Dense(4)).tabulate(KEY, X, console_kwargs={"width": 200})
    assert "Total Parameters: 20" in table  # v of 12, g of 4, bias of 4


@pytest.mark.parametrize("parent", [False, True], ids=["top", "parent"])
def test_plain_parameters_are_refused_with_what_to_write(parent):
    module, layer = WeightNorm(Network()), Network()
    if parent:
        module, layer = (nn.Sequential([m]) for m in (module, layer))
    x = jax.random.normal(KEY, (2, 5, 3))
    params = layer.init(KEY, x)["params"]
    with pytest.raises(ValueError, match="these parameters are plain weights") as caught:
        module.apply({"params": params}, x)
    (line,) = (line for line in str(caught.value).splitlines() if "wnjax.weight_norm(" in line)
    scope = {"params": params, "wnjax": wnjax}
    exec(line.strip(), scope)
    want = layer.apply({"params": params}, x)
    assert_close(module.apply({"params": scope["params"]}, x), want, 1e-5)
    chex.assert_trees_all_equal_structs(scope["params"], module.init(KEY, x)["params"])


def test_transformations_of_functions_take_models_with_the_module():
    """They fold the parameters on the way."""
    module = nn.Sequential([WeightNorm(nn.Dense(3)), nn.relu, WeightNorm(nn.Dense(2))])
    params = with_gains_doubled(module.init(KEY, X)["params"])

    def fn(params, x):
        return module.apply({"params": params}, x)

    x = jax.random.normal(KEY, (100, 3))
    axes = wnjax.infer_axes(fn)(params, x)
    assert axes["layers_2"]["kernel"] == wnjax.Weight(
        (1,), bias="layers_2/bias", operation="dot_general"
    )
    assert_close(jax.jit(wnjax.wrap(fn))(params, x), fn(params, x))
    y = fn(wnjax.data_init(fn)(params, x), x)
    assert_close((y.mean(0), y.std(0)), (np.zeros(2), np.ones(2)), 1e-4)


FLAX = {  # arguments of Flax's, and a layer; named, since Flax's path begins with the name
    "feature_axis": ({"feature_axes": 0}, partial(nn.Dense, 4)),
    "negative": ({"feature_axes": -1}, partial(nn.DenseGeneral, (2, 3))),
    "axes": ({"feature_axes": (-2, -1)}, partial(nn.DenseGeneral, (2, 3))),
    "whole": ({"feature_axes": None}, partial(nn.Conv, 4, (3,))),
    "filter": ({"feature_axes": -1, "variable_filter": {"query", "out/kernel"}}, None),
    "traced": ({"variable_filter": ["value", "out"]}, None),
    "name": ({"variable_filter": {"layer"}}, partial(nn.Dense, 4)),
}


@pytest.mark.parametrize("case", FLAX)
def test_arguments_of_flax_choose_the_weights_that_flax_normalizes(case):
    arguments, make = FLAX[case]
    make = make or partial(nn.MultiHeadDotProductAttention, 2, qkv_features=4, use_bias=False)
    x = X[None] if make.func is nn.Conv else X

    class Parent(nn.Module):
        wrap: Any

        @nn.compact
        def __call__(self, x):
            return self.wrap(make(name="layer"), **arguments)(x)

    theirs = wnjax.convert.from_linen(
        Parent(nn.WeightNorm).init(KEY, x)["params"],
        feature_axes=arguments.get("feature_axes", -1),
    )
    ours = Parent(WeightNorm).init(KEY, x)["params"]

    def shapes(params):
        return {path: jnp.shape(x.g) for path, x in flat(params).items() if wnjax.is_weight_norm(x)}

    if case == "name":  # Flax normalizes the bias too, which has no fan-in axis
        theirs["layer"].pop("bias")
    if case == "traced":  # heads share no norm
        assert shapes(ours) == {"layer/value/kernel": (1, 2, 2), "layer/out/kernel": (1, 1, 3)}
        assert shapes(ours).keys() == shapes(theirs).keys()
    else:
        assert shapes(ours) == shapes(theirs)
    plain_params = Parent(lambda layer, **_: layer).init(KEY, x)
    assert_close(wnjax.fold(ours), plain_params["params"])


REFUSED_ARGUMENTS = {
    "epsilon": ({"epsilon": 1e-6}, TypeError, "epsilon=1e-06: the norm needs none"),
    "dtype": ({"dtype": jnp.bfloat16}, TypeError, "give dtype to the layer"),
    "param_dtype": ({"param_dtype": jnp.float32}, TypeError, "give param_dtype to the layer"),
    "scale_init": ({"scale_init": nn.initializers.ones}, TypeError, "Give kernel_init to the"),
    "use_scale": ({"use_scale": False}, TypeError, "use_scale=False: every weight has a gain"),
    "both": ({"axes": {"kernel": 0}, "feature_axes": 0}, ValueError, "but not both"),
    "filter": ({"axes": {"kernel": 0}, "variable_filter": None}, ValueError, "but not both"),
}


@pytest.mark.parametrize("case", REFUSED_ARGUMENTS)
def test_other_arguments_are_refused_with_what_to_write(case):
    arguments, error, message = REFUSED_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        WeightNorm(nn.Dense(4), **arguments)


def test_every_argument_of_flax_is_known():
    fields = {f.name for f in dataclasses.fields(nn.WeightNorm)}
    assert fields <= {f.name for f in dataclasses.fields(WeightNorm)}
    WeightNorm(nn.Dense(4), use_scale=True, dtype=None)


def test_a_filter_that_leaves_out_all_weights_is_refused():
    with pytest.raises(ValueError, match=r"no leaf is a weight(.|\n)*kernel: variable_filter leav"):
        WeightNorm(nn.Dense(4), variable_filter={"bias"}).init(KEY, X)


def test_gains_stay_at_one_as_without_scale():
    """What the message about use_scale says, against Flax with use_scale=False."""
    module, theirs = WeightNorm(nn.Dense(4)), nn.WeightNorm(nn.Dense(4), use_scale=False)
    params = module.init(KEY, X)["params"]
    labels = wnjax.labels(params)
    params = jax.tree.map(lambda label, a: jnp.ones_like(a) if label == "g" else a, labels, params)
    layer = {"kernel": params["kernel"].v, "bias": params["bias"]}
    parts = {"g": optax.set_to_zero(), "v": optax.sgd(0.1), "other": optax.sgd(0.1)}

    def ours(params):
        return jnp.mean(jnp.sin(module.apply({"params": params}, X)))

    def flax(layer):
        return jnp.mean(jnp.sin(theirs.apply({"params": {"layer_instance": layer}}, X)))

    stepped = train(optax.partition(parts, wnjax.labels), ours, params, 3)
    expected = train(optax.sgd(0.1), flax, layer, 3)
    np.testing.assert_array_equal(stepped["kernel"].g, 1)
    assert_close({"kernel": stepped["kernel"].v, "bias": stepped["bias"]}, expected)


def test_a_wrapper_in_a_wrapper_is_refused():
    inner = nn.Sequential([nn.Dense(3), WeightNorm(nn.Dense(2))])
    with pytest.raises(ValueError, match="normalized twice:\n  layers_1/kernel"):
        WeightNorm(inner).init(KEY, X)
