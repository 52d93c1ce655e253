"""`wnjax.nnx.WeightNorm` against the same modules without it, and against sums by hand."""

import inspect
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import wnjax
from tests import toys
from tests.test_sharding import DENSE, dense_layouts, normal, sgd_step, spread
from wnjax._modules.arguments import WEIGHT_NORM_INSTEAD
from wnjax.nnx import MeanOnlyBatchNorm, WeightNorm

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


class Network(nnx.Module):
    """Nested modules: convolution, attention, a list; a layer called twice; state, randomness."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3,), rngs=rngs)
        self.mix = nnx.MultiHeadAttention(2, 4, 4, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.mix(nnx.relu(self.conv(x))))
        return self.layers[1](self.dropout(self.layers[0](self.layers[0](x))))


class Stack(nnx.Module):
    """Layers under scan, whose stack axis leads."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs))
        self.layers = nnx.split_rngs(splits=4)(make)(rngs)

    def __call__(self, x):
        scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return scan(lambda layer, x: nnx.relu(layer(x)))(self.layers, x)


TRANSPOSED = partial(nnx.ConvTranspose, 2, 3, (3,), transpose_kernel=True)
GATES = {f"cell.{i}.kernel": (0,) for i in ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")}
PROJECTIONS = ("mix.query", "mix.key", "mix.value", "layers.0", "layers.1")
FAN_IN = {f"{name}.kernel": (0,) for name in PROJECTIONS}
FAN_IN |= {"conv.kernel": (0, 1), "mix.out.kernel": (0, 1)}
# The module, its input's shape, and the fan-in axes of all its weights, derived by hand.
CASES = {
    "linear": (partial(nnx.Linear, 3, 4), (5, 3), {"kernel": (0,)}),
    "lstm": (lambda rngs: nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs)), (2, 3, 3), GATES),
    "network": (Network, (2, 5, 3), FAN_IN),
    "heads": (partial(nnx.LinearGeneral, 4, (2, 3)), (5, 4), {"kernel": (0,)}),
    "transposed": (TRANSPOSED, (2, 5, 2), {"kernel": (0, 2)}),
    "stack": (Stack, (5, 3), {"layers.kernel": (1,)}),
}
every_case = pytest.mark.parametrize("name", CASES)


def built(name):
    make, shape, fan_in = CASES[name]
    x = jax.random.normal(jax.random.key(1), shape)
    return WeightNorm(make(rngs=nnx.Rngs(0))), make(rngs=nnx.Rngs(0)), x, fan_in


def linear(**kwargs):
    return nnx.Linear(3, 4, rngs=nnx.Rngs(0), **kwargs)


def dotted(path):
    return ".".join(map(str, path))


def params(module):
    """The arrays of the Params of a module or a State, by dotted paths."""
    state = module if isinstance(module, nnx.State) else nnx.state(module, nnx.Param)
    return {dotted(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}


def assert_close(actual, expected, tolerance=1e-6):
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


def gains(module):
    """The gains of a wrapped module, by the dotted paths of the weights."""
    found = params(module)
    start, end = "layer_instance.", ".g"
    return {k[len(start) : -len(end)]: g for k, g in found.items() if k.endswith(end)}


def directions(module):
    """The Params but g, by the dotted paths of the plain module."""
    found = params(module.layer_instance)
    return {path.removesuffix(".v"): x for path, x in found.items() if not path.endswith(".g")}


def scale_gains(module, factor):
    state = nnx.state(module, nnx.PathContains("g"))
    nnx.update(module, jax.tree.map(lambda g: factor * g, state))


def assert_gains_are_norms(module, weights, fan_in):
    found = gains(module)
    assert found.keys() == fan_in.keys()
    for path, axes in fan_in.items():
        want = np.sqrt((weights[path] ** 2).sum(axes, keepdims=True))
        np.testing.assert_allclose(found[path], want, rtol=1e-6)


@every_case
def test_computes_what_the_module_did_and_its_gains_are_the_norms(name):
    module, plain, x, fan_in = built(name)
    assert_gains_are_norms(module, params(plain), fan_in)
    assert_close(nnx.jit(lambda module, x: module(x))(module, x), plain(x), 1e-5)
    assert_gains_are_norms(module, params(plain), fan_in)
    assert_close(directions(module), params(plain))


def test_calls_never_write_to_v_as_those_of_flax_do():
    def changed(module):
        before = params(module)
        module(X)
        return {path for path, a in params(module).items() if not np.array_equal(a, before[path])}

    module = WeightNorm(linear())
    scale_gains(module, 2)
    assert not changed(module)
    assert changed(nnx.WeightNorm(linear(), rngs=nnx.Rngs(0))) == {"layer_instance.kernel"}


def test_keeps_the_initializers_scale_which_flax_does_not():
    make = partial(nnx.Linear, 100, 64, kernel_init=nnx.initializers.normal(5.0), rngs=nnx.Rngs(0))
    # The outputs for the unit vectors are the kernel.
    ours = WeightNorm(make())(jnp.eye(100))
    flax = nnx.WeightNorm(make(), rngs=nnx.Rngs(0))(jnp.eye(100))
    np.testing.assert_allclose(np.linalg.norm(ours, axis=0).mean(), 5 * np.sqrt(100), rtol=0.05)
    np.testing.assert_allclose(np.linalg.norm(flax, axis=0), 1, rtol=1e-5)


def by_hand(arrays, path, axes):
    """A weight from `params` of the wrapped module."""
    place = f"layer_instance.{path}"
    if axes is None:
        return arrays[place]
    g, v = arrays[f"{place}.g"], arrays[f"{place}.v"]
    return g * v / jnp.sqrt(jnp.sum(v**2, axis=axes, keepdims=True))


@every_case
def test_gradients_equal_those_of_weights_by_hand(name):
    module, plain, x, fan_in = built(name)
    module.eval(), plain.eval()
    scale_gains(module, 1.25)
    graph, weights, rest = nnx.split(plain, nnx.Param, ...)

    def loss(arrays):
        leaves = [
            (path, leaf.replace(by_hand(arrays, dotted(path), fan_in.get(dotted(path)))))
            for path, leaf in nnx.to_flat_state(weights)
        ]
        merged = nnx.merge(graph, nnx.from_flat_state(leaves), rest, copy=True)
        return jnp.sum(jnp.sin(merged(x)))

    grads = nnx.jit(nnx.grad(lambda module: jnp.sum(jnp.sin(module(x)))))(module)
    assert_close(params(grads), jax.jit(jax.grad(loss))(params(module)), 2e-5)


@pytest.mark.usefixtures("x64")
def test_adam_steps_equal_those_by_hand():
    module = WeightNorm(linear(param_dtype=jnp.float64))
    x, target = X.astype(np.float64), jax.random.normal(jax.random.key(2), (5, 4), jnp.float64)
    start = params(module)

    def loss(p):
        y = x @ by_hand(p, "kernel", axes=0) + p["layer_instance.bias"][None]
        return jnp.mean((y - target) ** 2)

    @nnx.jit
    def step(module, optimizer):
        grads = nnx.grad(lambda module: jnp.mean((module(x) - target) ** 2))(module)
        with jax.numpy_dtype_promotion("standard"):  # optax itself promotes its step counts
            optimizer.update(module, grads)

    optimizer = nnx.Optimizer(module, optax.adam(0.1), wrt=nnx.Param)
    for _ in range(3):
        step(module, optimizer)
    assert_close(params(module), toys.train(optax.adam(0.1), loss, start, 3), 1e-12)
    assert all(np.abs(a - start[path]).min() > 1e-3 for path, a in params(module).items())


def test_statistics_and_random_counts_are_updated_as_by_the_plain_module():
    module, plain, x, _ = built("network")
    call = nnx.jit(lambda module, x: module(x))
    first, second = module(x), call(module, x)
    assert_close((first, second), (plain(x), call(plain, x)), 1e-5)
    assert not np.array_equal(first, second)
    state = [nnx.state(m, (nnx.BatchStat, nnx.RngState)) for m in (module.layer_instance, plain)]
    assert [s["dropout"]["rngs"]["count"].get_value() for s in state] == [2, 2]
    assert np.abs(state[0]["norm"]["mean"].get_value()).min() > 0
    assert_close(*(nnx.to_pure_dict(s["norm"]) for s in state), 1e-5)


class Methods(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x, *more, activation=nnx.relu, power=1, mask=True):
        self.sow(nnx.Intermediate, "hidden", x)
        return {"y": jnp.where(mask, activation(self.layer(x) ** power) + sum(more), 0), "no": None}

    def doubled(self, *args, **kwargs):
        return {"y": 2 * self(*args, **kwargs)["y"], "no": None}


METHODS = {
    "call": lambda m: m,
    "method": lambda m: m.doubled,
    "function": lambda m: partial(Methods.doubled, m),
}


@pytest.mark.parametrize("method", METHODS)
def test_arguments_methods_and_captured_intermediates(method):
    module, plain = WeightNorm(Methods(nnx.Rngs(0))), Methods(nnx.Rngs(0))
    args, mask = (X, np.ones((5, 4), np.float32), 2), np.arange(20).reshape(5, 4) % 3 == 0
    kwargs = {"activation": nnx.gelu, "power": 3, "mask": mask}
    capture = nnx.capture(lambda m: METHODS[method](m)(*args, **kwargs), nnx.Intermediate)
    want, _ = nnx.capture(lambda m: m(*args, **kwargs), nnx.Intermediate)(plain)
    for _ in range(2):
        y, captured = capture(module)
        assert_close(captured["layer_instance"]["hidden"].get_value(), (X,))
        assert_close(y["y"], want["y"] * (1 if method == "call" else 2), 1e-5)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_a_transformed_function_may_close_over_the_module_in_eval_mode(transform):
    module, plain, x, _ = built("network")
    module.eval(), plain.eval()
    batch = x[:, None] if transform is jax.vmap else x
    assert_close(*(transform(lambda x, m=m: m(x))(batch) for m in (module, plain)), 1e-5)


def test_vmap_and_scan_over_stacked_modules():
    make = nnx.vmap(lambda rngs: WeightNorm(nnx.Linear(3, 3, rngs=rngs)))
    module = nnx.split_rngs(splits=4)(make)(nnx.Rngs(0))
    assert module.kernel.g.shape == (4, 1, 3)
    kernels = params(module)["layer_instance.kernel.v"]  # g is ‖v‖ at the start
    each = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(module, X)
    assert_close(each, np.einsum("bi,nio->nbo", X, kernels), 1e-5)
    scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    product = np.linalg.multi_dot([X, *kernels])
    assert_close(scan(lambda layer, x: layer(x))(module, X), product, 1e-5)


def test_remat_changes_no_gradient():
    def grads(call):
        return nnx.grad(lambda module: jnp.sum(jnp.sin(call(module, X))))(WeightNorm(linear()))

    assert_close(params(grads(nnx.remat(WeightNorm.__call__))), params(grads(WeightNorm.__call__)))


def test_compiles_once():
    module = WeightNorm(linear())
    chex.clear_trace_counter()
    call = nnx.jit(chex.assert_max_traces(lambda module, x: module(x), 1))
    for factor in (1, 2, 4):
        assert_close(call(module, X), factor * linear()(X), 1e-5)
        scale_gains(module, 2)


def test_folded_is_a_plain_copy():
    module, plain, x, _ = built("network")
    module.eval(), plain.eval()
    folded = module.folded()
    assert type(folded) is Network
    assert_close((params(folded), folded(x)), (params(plain), plain(x)), 1e-5)
    folded.conv.kernel.set_value(0 * folded.conv.kernel.get_value())
    assert_close(module(x), plain(x), 1e-5)


def test_state_survives_pure_dicts_and_merging():
    module, _, x, _ = built("network")
    module.eval()
    module(x)
    graph, state = nnx.split(module)
    assert not any("/" in str(key) for path in nnx.to_flat_state(state).paths for key in path)
    empty = nnx.clone(module)
    nnx.update(empty, jax.tree.map(jnp.zeros_like, nnx.state(empty, nnx.Param)))
    zeros = nnx.state(empty)
    nnx.replace_by_pure_dict(zeros, nnx.to_pure_dict(state))
    assert_close(nnx.merge(graph, zeros)(x), module(x))


def test_gains_have_no_axis_names_on_fan_in_axes():
    with jax.set_mesh(jax.make_mesh((1, 1), ("in", "out"))):
        module = WeightNorm(linear(kernel_metadata={"out_sharding": ("in", "out")}))
        module(X)
        spec = nnx.get_partition_spec(nnx.state(module))
        assert_close(module.folded()(X), module(X))
    kernel = spec["layer_instance"]["kernel"]
    assert kernel["g"].get_value() == jax.P(None, "out")
    assert kernel["v"].get_value() == jax.P("in", "out")


def test_neurons_of_zeros_train():
    module = WeightNorm(linear(kernel_init=nnx.initializers.zeros, use_bias=False))
    target = X @ np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(module(X), np.zeros((5, 4)))
    graph, state = nnx.split(module)

    def loss(state):
        return jnp.mean((nnx.merge(graph, state)(X) - target) ** 2)

    assert loss(toys.train(optax.adam(0.3), loss, state, 100)) < 0.01 * loss(state)


@pytest.mark.parametrize("name", ["param_dtype", "dtype"])
def test_bfloat16(name):
    x, plain = jnp.asarray(X, jnp.bfloat16), linear(**{name: jnp.bfloat16})
    module = WeightNorm(nnx.clone(plain))
    y, want, (g, v) = module(x), plain(x), module.kernel
    assert (g.dtype, v.dtype) == (jnp.float32, plain.kernel.dtype)
    assert y.dtype == want.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), want.astype(jnp.float32), 2**-6)


def test_axes_are_given_by_slash_paths():
    layers = nnx.Sequential(linear(), nnx.relu, linear())
    found = gains(WeightNorm(layers, axes={"layers/0/kernel": 0}))
    assert {path: g.shape for path, g in found.items()} == {"layers.0.kernel": (3, 1)}


norm = partial(nnx.LayerNorm, 3, rngs=nnx.Rngs(0))
REFUSED = {
    "range": (linear, {"kernel": 2}, r"^kernel of shape \(3, 4\): feature axis 2 is out of range"),
    "name": (linear, {"kernal": 1}, r"'kernal' matches no leaf .*:\n  kernel\n  bias"),
    "fan_in": (linear, {"kernel": (0, 1)}, r"^kernel of shape .* leave no fan-in axis"),
    "no_weights": (norm, None, r"no leaf is a weight.*\n  bias: .*\n  scale: scale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_axes_that_do_not_fit_are_refused(case):
    make, axes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        WeightNorm(make(), axes=axes)(X)


def sharded_step(how, layout):
    """A step on shards; what it is to be; both as trees of g, v and the bias."""
    kernel, g, bias, outputs = DENSE[layout]
    batch = normal(16, 8, seed=1), normal(16, 12, seed=2)
    state = nnx.state(WeightNorm(nnx.Linear(8, 12, rngs=nnx.Rngs(0))), nnx.Param)
    start = {
        "g": 2 * state["layer_instance"]["kernel"]["g"].get_value(),
        "v": state["layer_instance"]["kernel"]["v"].get_value(),
        "bias": state["layer_instance"]["bias"].get_value(),
    }

    def step(arrays, *batch, how=how):
        def loss(arrays, x, y):
            layer = nnx.Linear(*arrays["v"].shape, rngs=nnx.Rngs(0))  # of the neurons that are here
            module = WeightNorm(layer)
            layer.kernel.g.set_value(arrays["g"])
            layer.kernel.v.set_value(arrays["v"])
            layer.bias.set_value(arrays["bias"])
            return jnp.mean((module(x) - y) ** 2)

        return sgd_step(loss, how, arrays, *batch)

    specs = ({"g": g, "v": kernel, "bias": bias}, jax.P("data"), outputs)
    return (lambda: spread(how, step, specs, start, *batch)), step(start, *batch, how=None)


@dense_layouts
def test_a_step_on_shards_is_that_on_the_whole(how, layout):
    found, expected = sharded_step(how, layout)
    assert_close(found(), expected, 1e-5)


def test_the_norm_of_a_shard_is_refused():
    found, _ = sharded_step("shard_map", "fan-in")
    with pytest.raises(ValueError, match="kernel: its fan-in axes seem to be split"):
        found()


def off_start(model):
    """A state with (g, v) leaves of other lengths than those of v."""
    normalized_params = wnjax.weight_norm(nnx.state(model, nnx.Param))
    half = {"g": lambda g: g / 2, "v": lambda v: 3 * v, "other": lambda x: x}
    return jax.tree.map(
        lambda label, x: half[label](x), wnjax.labels(normalized_params), normalized_params
    )


def test_params_that_are_gv_leaves_keep_g_and_v():
    """And an optimizer step is that of training the (g, v) leaves themselves."""
    model, x = toys.TwoLayers(nnx.Rngs(0)), jnp.ones((2, 3))
    graph, _ = nnx.split(model)
    normalized_params = off_start(model)
    nnx.update(model, normalized_params)
    layer = WeightNorm(model)
    chex.assert_trees_all_equal(layer.normalized(), normalized_params)

    def loss(call):
        return jnp.mean(call(x) ** 2)

    optimizer = optax.sgd(0.1)
    grads = jax.grad(
        lambda normalized_params: loss(nnx.merge(graph, wnjax.fold(normalized_params)))
    )(normalized_params)
    updates, _ = optimizer.update(grads, optimizer.init(normalized_params))
    wanted = optax.apply_updates(normalized_params, updates)
    nnx.Optimizer(layer, optimizer, wrt=nnx.Param).update(layer, nnx.grad(loss)(layer))
    chex.assert_trees_all_close(layer.normalized(), wanted, rtol=1e-6)


def test_params_that_are_gv_leaves_say_their_axes():
    model = toys.TwoLayers(nnx.Rngs(0))
    nnx.update(model, off_start(model))
    with pytest.raises(ValueError, match="which say their axes: leave axes out\n  first/kernel"):
        WeightNorm(model, axes={".*/kernel": -1})
    model = toys.TwoLayers(nnx.Rngs(0))
    log = wnjax.weight_norm(nnx.state(model, nnx.Param), log_scale=True)
    nnx.update(model, log)
    with pytest.raises(ValueError, match="not as log_g:\n  first/kernel"):
        WeightNorm(model)


@pytest.mark.parametrize(
    "fn",
    [
        wnjax.labels,
        wnjax.norms,
        wnjax.summary,
        wnjax.weight_norm,
        wnjax.keep_norms().init,
        wnjax.weight_normalized(optax.sgd(0.1)).init,
        lambda state: wnjax.data_init(lambda p, x: x)(state, jnp.ones((2, 3))),
    ],
)
def test_functions_of_gv_leaves_refuse_the_state_of_the_module(fn):
    """Which else would go wrong in silence: it has gains, and no (g, v) leaves."""
    layer = WeightNorm(toys.TwoLayers(nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match=r"take its normalized\(\)(.|\n)*gains:\n  layer_.*first/kernel/g"
    ):
        fn(nnx.state(layer, nnx.Param))
    wnjax.labels(layer.normalized())


def test_gains_are_frozen_by_a_filter():
    layer = WeightNorm(toys.TwoLayers(nnx.Rngs(0)))
    before = wnjax.norms(layer.normalized())
    but_g = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("g")))

    def loss(layer):
        return jnp.mean(layer(jnp.ones((2, 3))) ** 2)

    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=but_g)
    optimizer.update(layer, nnx.grad(loss, argnums=nnx.DiffState(0, but_g))(layer))
    after = wnjax.norms(layer.normalized())
    for path in before:
        chex.assert_trees_all_equal(after[path]["g"], before[path]["g"])
        assert (after[path]["v"] != before[path]["v"]).any()


NO_MODULES = {
    "array": (jnp.ones((3, 4)), "but got a .*: wnjax.weight_norm takes trees of arrays"),
    "class": (nnx.Linear, "but got the class Linear: make an instance of it first"),
    "linen": (nn.Dense(3), "wnjax.linen.WeightNorm takes those"),
}


@pytest.mark.parametrize("case", NO_MODULES)
def test_what_is_no_module_is_refused(case):
    given, message = NO_MODULES[case]
    with pytest.raises(TypeError, match=message):
        wnjax.nnx.WeightNorm(given)


class Stacked(nnx.Module):
    """Any layer under vmap, each of its members with a part of x."""

    def __init__(self, make, rngs, size=3):
        self.layers = nnx.split_rngs(splits=size)(nnx.vmap(lambda rngs: make(rngs=rngs)))(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x))(self.layers, jnp.stack([x] * 3))


class Recurrent(nnx.Module):
    """A cell of any kind, over time."""

    def __init__(self, cell, rngs):
        self.rnn = nnx.RNN(cell(3, 4, rngs=rngs))

    def __call__(self, x):
        return self.rnn(x)


class Mixed(nnx.Module):
    """Layers whose Params are no weights, one of two axes."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.norms = nnx.List(
            [nnx.LayerNorm(6, rngs=rngs), nnx.RMSNorm(6, rngs=rngs), nnx.GroupNorm(6, 2, rngs=rngs)]
        )
        self.slope = nnx.PReLU()
        self.mean_only = MeanOnlyBatchNorm(6, rngs=rngs)
        self.out = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = self.embed((jnp.abs(x[..., 0]) * 3).astype(jnp.int32))
        for layer in (*self.norms, self.slope, self.mean_only):
            x = layer(x)
        return self.out(x)


class Block(nnx.Module):
    """Layers whose biases have two axes in a stack."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.norms = nnx.List([norm(4, rngs=rngs) for norm in (MeanOnlyBatchNorm, nnx.LayerNorm)])

    def __call__(self, x):
        return self.norms[1](self.norms[0](self.linear(x)))


class Subclass(nnx.Linear):
    """One that computes what Linear does."""


LORA = partial(nnx.LoRA, 3, 2, 4, b_initializer=nnx.initializers.normal(1.0))
LAYERS = {  # and the shapes of their inputs
    "linear": (partial(nnx.Linear, 3, 4), (5, 3)),
    "subclass": (partial(Subclass, 3, 4), (5, 3)),
    "linear_general": (partial(nnx.LinearGeneral, (2, 3), (4, 5), axis=(-2, -1)), (5, 2, 3)),
    "batch_axis": (partial(nnx.LinearGeneral, 3, 4, batch_axis={0: 5}), (5, 3)),
    "einsum": (partial(nnx.Einsum, "nta,hab->nthb", (8, 2, 4), (8, 4)), (5, 6, 2)),
    "einsum_ellipsis": (partial(nnx.Einsum, "...a, ab -> ...b", (3, 4)), (5, 3)),
    "einsum_batch": (partial(nnx.Einsum, "nhd,dhk->nhk", (3, 2, 4)), (5, 2, 3)),
    "conv": (partial(nnx.Conv, 4, 6, (3, 2), feature_group_count=2), (2, 5, 5, 4)),
    "conv1d": (partial(nnx.Conv, 4, 6, 3), (2, 5, 4)),
    "conv_transpose": (partial(nnx.ConvTranspose, 2, 3, (3,)), (2, 5, 2)),
    "transpose_kernel": (TRANSPOSED, (2, 5, 2)),
    "attention": (partial(nnx.MultiHeadAttention, 2, 4, 6, decode=False), (2, 5, 4)),
    "lstm": (partial(Recurrent, nnx.LSTMCell), (2, 3, 3)),
    "optimized_lstm": (partial(Recurrent, nnx.OptimizedLSTMCell), (2, 3, 3)),
    "gru": (partial(Recurrent, nnx.GRUCell), (2, 3, 3)),
    "simple": (partial(Recurrent, nnx.SimpleCell), (2, 3, 3)),
    "lora": (LORA, (5, 3)),
    "lora_linear": (partial(nnx.LoRALinear, 3, 4, lora_rank=2), (5, 3)),
    "mixed": (Mixed, (5, 4, 1)),
    "stack": (partial(Stacked, partial(nnx.Linear, 3, 4)), (5, 3)),
    "stack_block": (partial(Stacked, Block), (5, 3)),
    "stack_conv": (partial(Stacked, partial(nnx.Conv, 4, 6, 3)), (2, 5, 4)),
    "stack_heads": (partial(Stacked, partial(nnx.LinearGeneral, 3, (4, 5))), (5, 3)),
    "stack_transposed": (partial(Stacked, TRANSPOSED), (2, 5, 2)),
}


def call_of(layer):
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    return (lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)), params


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_flax_tell_what_tracing_finds(name):
    make, shape = LAYERS[name]
    x, layer = jax.random.normal(jax.random.key(1), shape), make(rngs=nnx.Rngs(0))
    fn, plain = call_of(layer)
    want = fn(plain, x)
    expected = wnjax.weight_norm(plain, wnjax.infer_axes(fn)(plain, x))
    expected = {path: g.shape for path, g in norms_of(expected).items()}
    module = WeightNorm(layer)
    assert {path: g.shape for path, g in norms_of(module.normalized()).items()} == expected
    assert expected
    assert_close(nnx.jit(lambda module, x: module(x))(module, x), want, 1e-5)


def norms_of(normalized_params):
    return {path: value["g"] for path, value in wnjax.norms(normalized_params).items()}


class Twice(nnx.Module):
    """A method beside the call, state, and attributes of every kind."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.size, self.calls, self.raw = 3, nnx.Variable(jnp.array(0)), jnp.zeros(2)

    def __call__(self, x):
        return self.encode(self.encode(x))

    def encode(self, x):
        self.calls[...] += 1
        self.raw = self.raw + 1
        return self.norm(self.first(x))

    @nnx.jit
    def compiled(self, x):
        return self.encode(x)

    def resize(self, size):
        self.size, self.seen = size, nnx.Variable(jnp.ones(1))
        self.alias = self.norm
        return self

    @property
    def double(self):
        return 2 * self.size


def test_methods_compute_with_the_weights_and_change_the_module_as_plain_ones_do():
    module, plain = WeightNorm(Twice(nnx.Rngs(0))), Twice(nnx.Rngs(0))
    scale_gains(module, 2)
    plain.first.kernel.set_value(2 * plain.first.kernel.get_value())
    for method in ("__call__", "encode", "compiled"):
        assert_close(*(getattr(m, method)(X) for m in (module, plain)), 1e-5)
    assert module.resize(4) is module
    plain.resize(4)
    module.raw, plain.raw = module.raw + 1, plain.raw + 1
    for m in (module, plain):
        for method in ("__call__", "compiled"):
            getattr(m, method)(X)
        assert m.alias is m.norm
    layer = module.layer_instance
    for m in (module, layer):
        assert (m.size, m.double) == (4, 8)
        for name in ("calls", "raw", "seen"):
            np.testing.assert_array_equal(getattr(m, name)[...], getattr(plain, name)[...])
        assert_close(m.norm.mean[...], plain.norm.mean[...])
    assert {"size", "raw", "seen"}.isdisjoint(vars(module))
    with pytest.raises(AttributeError, match="encoder"):
        _ = module.encoder


def test_the_module_inside_does_not_compute_without_the_gains():
    for make, x in ((linear, X), (lambda: built("network")[1], np.ones((2, 5, 3), np.float32))):
        module = WeightNorm(make())
        with pytest.raises(TypeError):
            module.layer_instance(x)
    with pytest.raises(TypeError):
        WeightNorm(Twice(nnx.Rngs(0))).first(X)


def test_a_cache_is_made_and_filled_as_in_the_plain_module():
    make = partial(nnx.MultiHeadAttention, 2, 4, 4, decode=True)
    module, plain = (wrap(make(rngs=nnx.Rngs(0))) for wrap in (WeightNorm, lambda m: m))
    module.init_cache((1, 3, 4)), plain.init_cache((1, 3, 4))
    for i in range(3):
        x = jax.random.normal(jax.random.key(i), (1, 1, 4))
        assert_close(module(x), plain(x), 1e-5)
    assert module.cache_index[...] == 3


@pytest.mark.parametrize("form", ["state", "pure"])
def test_plain_weights_in_the_place_of_g_and_v_are_refused(form):
    module, plain = WeightNorm(linear()), nnx.state(linear())
    state = plain if form == "state" else nnx.to_pure_dict(plain)
    with pytest.raises(ValueError, match="kernel"):
        nnx.update(module, {"layer_instance": state})
    with pytest.raises(ValueError, match="Incorrect number of leaves"):
        nnx.merge(nnx.graphdef(module.layer_instance), plain)
    layer = linear()
    nnx.update(layer, jax.tree.map(lambda x: 2 * x, plain))  # as the docstring says
    assert_close(WeightNorm(layer)(X), 2 * linear()(X))


class Custom(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 3)))
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(x @ self.w.T)


class Override(nnx.Linear):
    def __call__(self, x):
        return x @ self.kernel.T


UNKNOWN = {
    "custom": (Custom, "w", X),
    "override": (partial(Override, 4, 3), "kernel", X),
    "stacked elsewhere": (
        nnx.split_rngs(splits=2)(
            nnx.vmap(lambda rngs: linear(), out_axes=nnx.StateAxes({nnx.Param: 1}))
        ),
        "kernel",
        None,
    ),
    "masked": (partial(nnx.Conv, 3, 4, 1, mask=jnp.ones((1, 3, 4))), "kernel", X),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_params_that_no_layer_tells_are_refused_with_what_to_write(case):
    make, path, x = UNKNOWN[case]
    layer = make(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=rf"what these Params are.*\n  {path}\n") as caught:
        WeightNorm(layer)
    if case in ("custom", "override"):
        lines = [line.strip() for line in str(caught.value).splitlines() if " = " in line]
        names = {"nnx": nnx, "wnjax": wnjax, "layer": layer, "params": None, "x": x}
        exec("\n".join(lines), names)
        assert_close(names["layer"](x), make(rngs=nnx.Rngs(0))(x), 1e-5)
        assert gains(names["layer"])[path].shape == (4, 1)


def test_shared_modules_and_params_stay_shared():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
            self.again, self.norms = self.first, nnx.List([self.norm])
            self.other = nnx.Linear(3, 3, rngs=rngs)
            self.other.kernel = self.first.kernel

        def __call__(self, x):
            return self.norms[0](self.other(self.norm(self.again(self.first(x)))))

    module, plain = WeightNorm(Tied(nnx.Rngs(0))), Tied(nnx.Rngs(0))
    assert module.other.kernel.v is module.first.kernel.v
    assert list(gains(module)) == ["again.kernel"]
    for folded in (module.folded(), nnx.merge(*nnx.split(module)).folded()):
        assert folded.other.kernel is folded.first.kernel
        assert folded.again is folded.first
    assert_close(module(X), plain(X), 1e-5)
    assert_close(module.norm.mean[...], plain.norm.mean[...])
    expected = wnjax.weight_norm(nnx.state(plain, nnx.Param))
    for m in (module, nnx.merge(*nnx.split(module))):
        chex.assert_trees_all_equal_structs(m.normalized(), expected)


def test_weights_that_are_no_attributes_are_refused():
    class Held(nnx.Module):
        def __init__(self):
            self.held = nnx.data({"w": nnx.Param(jnp.ones((3, 2)))})

    with pytest.raises(ValueError, match=r"1 weights are not attributes of a module"):
        WeightNorm(Held(), axes={"held/w": -1})


@pytest.mark.parametrize("inside", [WeightNorm, partial(nnx.WeightNorm, rngs=nnx.Rngs(0))])
def test_a_wrapper_in_a_wrapper_is_refused(inside):
    with pytest.raises(ValueError, match=r"normalized twice(.|\n)*\n  layers/1"):
        WeightNorm(nnx.Sequential(linear(), inside(linear())))


def test_abstract_modules_have_the_shapes_and_shardings_of_g_and_v():
    def make():
        return WeightNorm(linear(kernel_metadata={"out_sharding": ("in", "out")}))

    mesh = jax.make_mesh((1, 1), ("in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    _, state = nnx.get_abstract_model(make, mesh)
    g, v = (state["layer_instance"]["kernel"][name].get_value() for name in ("g", "v"))
    assert (g.shape, g.sharding.spec) == ((1, 4), jax.P(None, "out"))
    assert (v.shape, v.sharding.spec) == ((3, 4), jax.P("in", "out"))


def mix():
    return nnx.MultiHeadAttention(2, 4, 4, decode=False, use_bias=False, rngs=nnx.Rngs(0))


def heads():
    return nnx.LinearGeneral(3, (2, 4), rngs=nnx.Rngs(0))


FLAX = {
    "feature_axis": ({"feature_axes": 0}, linear),
    "negative": ({"feature_axes": -1}, heads),
    "axes": ({"feature_axes": (-2, -1)}, heads),
    "whole": ({"feature_axes": None}, linear),
    "query": ({"feature_axes": -1, "variable_filter": nnx.PathContains("query")}, mix),
    "function": ({"feature_axes": -1, "variable_filter": lambda path, _: "out" in path}, mix),
}


@pytest.mark.parametrize("case", FLAX)
def test_arguments_of_flax_choose_the_weights_that_flax_normalizes(case):
    arguments, make = FLAX[case]
    theirs = wnjax.convert.from_nnx(nnx.WeightNorm(make(), rngs=nnx.Rngs(0), **arguments))
    ours = WeightNorm(make(), rngs=nnx.Rngs(0), use_scale=True, dtype=None, **arguments)
    assert {k: g.shape for k, g in gains(ours).items()} == {
        k: g.shape for k, g in gains(theirs).items()
    }
    assert_close(params(ours.folded()), params(make()))


def test_a_filter_alone_leaves_the_axes_to_the_layers():
    module = WeightNorm(mix(), variable_filter=nnx.PathContains("value"))
    assert {path: g.shape for path, g in gains(module).items()} == {"value.kernel": (1, 2, 2)}
    custom = nnx.Sequential(Custom(nnx.Rngs(0)), linear())
    assert list(gains(WeightNorm(custom, variable_filter=nnx.PathContains("kernel"))))


REFUSED_ARGUMENTS = {
    "epsilon": ({"epsilon": 1e-6}, TypeError, "epsilon=1e-06: the norm needs none"),
    "dtype": ({"dtype": jnp.bfloat16}, TypeError, "give dtype to the layer"),
    "param_dtype": ({"param_dtype": jnp.float32}, TypeError, "give param_dtype to the layer"),
    "scale_init": ({"scale_init": nnx.initializers.ones}, TypeError, "Give kernel_init to the"),
    "promote_dtype": ({"promote_dtype": max}, TypeError, "give promote_dtype to the layer"),
    "use_scale": ({"use_scale": False}, TypeError, "use_scale=False: every weight has a gain"),
    "unknown": ({"epsilom": None}, TypeError, "unexpected keyword argument 'epsilom'"),
    "both": ({"axes": {"kernel": 0}, "feature_axes": 0}, ValueError, "but not both"),
}


@pytest.mark.parametrize("case", REFUSED_ARGUMENTS)
def test_other_arguments_are_refused_with_what_to_write(case):
    arguments, error, message = REFUSED_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        WeightNorm(linear(), **arguments)


def test_every_argument_of_flax_is_known():
    known = {*inspect.signature(WeightNorm).parameters, *WEIGHT_NORM_INSTEAD}
    assert inspect.signature(nnx.WeightNorm).parameters.keys() <= known


def test_g_v_and_their_moments_lie_on_a_mesh_as_the_metadata_say():
    mesh = jax.make_mesh((2, 2), ("in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(1), (5, 4))
    make = partial(nnx.Linear, 4, 6)

    def stepped(**metadata):
        module = WeightNorm(make(rngs=nnx.Rngs(0), **metadata))
        optimizer = nnx.Optimizer(module, optax.adam(0.1), wrt=nnx.Param)
        for _ in range(2):
            grads = nnx.grad(lambda module: jnp.mean(jnp.sin(module(x))))(module)
            with jax.numpy_dtype_promotion("standard"):  # optax itself promotes its step counts
                optimizer.update(module, grads)
        return module, optimizer.opt_state[0].mu["layer_instance"]["kernel"]

    with jax.set_mesh(mesh):
        module, moments = stepped(kernel_metadata={"out_sharding": ("in", "out")})
    for g, v in ((moments["g"], moments["v"]), module.kernel):
        assert g.get_value().sharding.spec == jax.P(None, "out")
        assert v.get_value().sharding.spec == jax.P("in", "out")
    assert_close(params(module), params(stepped()[0]), 1e-5)


def test_given_axes_compute_in_jit_what_the_module_did():
    _, plain, x, _ = built("heads")
    module = WeightNorm(nnx.clone(plain), axes={"kernel": (1, 2)})
    assert module.kernel.g.shape == (1, 2, 3)
    assert_close(nnx.jit(lambda module, x: module(x))(module, x), plain(x), 1e-5)


def test_a_string_is_no_axes():
    with pytest.raises(TypeError, match="axes must be None"):
        WeightNorm(linear(), axes="traced")
