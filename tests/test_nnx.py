"""`wnjax.nnx.WeightNorm` against the same modules without it, and against sums by hand."""

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
from wnjax.nnx import WeightNorm

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
    """Layers under scan. The naming rules cannot tell a stack of three from heads."""

    def __init__(self, layers, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs))
        self.layers = nnx.split_rngs(splits=layers)(make)(rngs)

    def __call__(self, x):
        scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return scan(lambda layer, x: nnx.relu(layer(x)))(self.layers, x)


TRANSPOSED = partial(nnx.ConvTranspose, 2, kernel_size=(3,), transpose_kernel=True)
GATES = {f"cell.{i}.kernel": (0,) for i in ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")}
PROJECTIONS = ("mix.query", "mix.key", "mix.value", "layers.0", "layers.1")
FAN_IN = {f"{name}.kernel": (0,) for name in PROJECTIONS}
FAN_IN |= {"conv.kernel": (0, 1), "mix.out.kernel": (0, 1)}
# The module, its input's shape, and the fan-in axes of all its weights, derived by hand.
RIGHT = {  # by the naming rules too
    "linear": (partial(nnx.Linear, 3, 4), (5, 3), {"kernel": (0,)}),
    "lstm": (lambda rngs: nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs)), (2, 3, 3), GATES),
    "network": (Network, (2, 5, 3), FAN_IN),
    "heads": (partial(nnx.LinearGeneral, 4, (2, 3)), (5, 4), {"kernel": (0,)}),
    "transposed": (partial(TRANSPOSED, out_features=3), (2, 5, 2), {"kernel": (0, 2)}),
    "stack": (partial(Stack, 4), (5, 3), {"layers.kernel": (1,)}),
}
WRONG = {
    "square": (partial(TRANSPOSED, out_features=2), (2, 5, 2), {"kernel": (0, 2)}),
    "three layers": (partial(Stack, 3), (5, 3), {"layers.kernel": (1,)}),
}
CASES = RIGHT | WRONG
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


def assert_gains_are_norms(module, weights, fan_in):
    gains = params(module.g)
    assert gains.keys() == fan_in.keys()
    for path, axes in fan_in.items():
        want = np.sqrt((weights[path] ** 2).sum(axes, keepdims=True))
        np.testing.assert_allclose(gains[path], want, rtol=1e-6)


@every_case
def test_the_first_call_computes_what_the_module_did_and_leaves_norms_as_gains(name):
    module, plain, x, fan_in = built(name)
    if name in RIGHT:  # an optimizer may be made at once
        assert_gains_are_norms(module, params(plain), fan_in)
    assert_close(module(x), plain(x), 1e-5)
    assert_gains_are_norms(module, params(plain), fan_in)
    assert_close(params(module.layer_instance), params(plain))


@pytest.mark.parametrize("name", WRONG)
def test_a_first_call_in_jit_that_finds_other_axes_is_refused_with_instructions(name):
    module, _, x, fan_in = built(name)
    (path,) = fan_in
    message = rf"\n  {path.replace('.', '/')}\nCall the module once outside of jit.* or pass axes"
    with pytest.raises(ValueError, match=message):
        nnx.jit(lambda module, x: module(x))(module, x)


def test_a_first_call_in_jit_takes_given_axes():
    (_, layer, _, _), (_, plain, x, _) = built("heads"), built("heads")
    module = WeightNorm(layer, axes={"kernel": (1, 2)})
    assert module.g["kernel"].shape == (1, 2, 3)
    assert_close(nnx.jit(lambda module, x: module(x))(module, x), plain(x), 1e-5)


def test_calls_never_write_to_v_as_those_of_flax_do():
    def changed(module):
        before = params(module)
        module(X)
        return {path for path, a in params(module).items() if not np.array_equal(a, before[path])}

    module = WeightNorm(linear())
    module.g["kernel"].set_value(2 * module.g["kernel"].get_value())
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
    v = arrays[f"layer_instance.{path}"]
    if axes is None:
        return v
    return arrays[f"g.{path}"] * v / jnp.sqrt(jnp.sum(v**2, axis=axes, keepdims=True))


@every_case
def test_gradients_equal_those_of_weights_by_hand(name):
    module, plain, x, fan_in = built(name)
    module.eval(), plain.eval()
    module(x)
    module.g = jax.tree.map(lambda g: 1.25 * g, module.g)
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
@pytest.mark.parametrize("is_called_first", [False, True])
def test_adam_steps_equal_those_by_hand(is_called_first):
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

    if is_called_first:
        module(x)
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


METHODS = {"call": None, "name": "doubled", "function": Methods.doubled}


@pytest.mark.parametrize("method", METHODS)
def test_arguments_methods_and_captured_intermediates(method):
    module, plain = WeightNorm(Methods(nnx.Rngs(0))), Methods(nnx.Rngs(0))
    args, mask = (X, np.ones((5, 4), np.float32), 2), np.arange(20).reshape(5, 4) % 3 == 0
    kwargs = {"activation": nnx.gelu, "power": 3, "mask": mask}
    capture = nnx.capture(lambda m: m(*args, method=METHODS[method], **kwargs), nnx.Intermediate)
    want, _ = nnx.capture(lambda m: m(*args, **kwargs), nnx.Intermediate)(plain)
    for _ in range(2):
        y, captured = capture(module)
        assert_close(captured["layer_instance"]["hidden"].get_value(), (X,))
        assert_close(y["y"], want["y"] * (1 if method == "call" else 2), 1e-5)


@pytest.mark.parametrize("is_called_first", [False, True])
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_a_transformed_function_may_close_over_the_module_in_eval_mode(transform, is_called_first):
    module, plain, x, _ = built("network")
    module.eval(), plain.eval()
    if is_called_first:
        module(x)
    batch = x[:, None] if transform is jax.vmap else x
    assert_close(*(transform(lambda x, m=m: m(x))(batch) for m in (module, plain)), 1e-5)


def test_vmap_and_scan_over_stacked_modules():
    make = nnx.vmap(lambda rngs: WeightNorm(nnx.Linear(3, 3, rngs=rngs)))
    module = nnx.split_rngs(splits=4)(make)(nnx.Rngs(0))
    assert module.g["kernel"].shape == (4, 1, 3)
    kernels = params(module)["layer_instance.kernel"]  # g is ‖v‖ at the start
    each = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(module, X)
    assert_close(each, np.einsum("bi,nio->nbo", X, kernels), 1e-5)
    scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    product = np.linalg.multi_dot([X, *kernels])
    assert_close(scan(lambda layer, x: layer(x))(module, X), product, 1e-5)


def test_remat_changes_no_gradient():
    def grads(call):
        return nnx.grad(lambda module: jnp.sum(jnp.sin(call(module, X))))(WeightNorm(linear()))

    assert_close(params(grads(nnx.remat(WeightNorm.__call__))), params(grads(WeightNorm.__call__)))


def test_compiles_once_when_first_called_inside_jit():
    module = WeightNorm(linear())
    chex.clear_trace_counter()
    call = nnx.jit(chex.assert_max_traces(lambda module, x: module(x), 1))
    for factor in (1, 2, 4):
        assert_close(call(module, X), factor * linear()(X), 1e-5)
        module.g["kernel"].set_value(2 * module.g["kernel"].get_value())


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
    assert spec["g"]["kernel"].get_value() == jax.P(None, "out")
    assert spec["layer_instance"]["kernel"].get_value() == jax.P("in", "out")


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
    y, want, v = module(x), plain(x), module.layer_instance.kernel
    assert (module.g["kernel"].dtype, v.dtype) == (jnp.float32, plain.kernel.dtype)
    assert y.dtype == want.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), want.astype(jnp.float32), 2**-6)


def test_axes_are_given_by_slash_paths():
    layers = nnx.Sequential(linear(), nnx.relu, linear())
    gains = params(WeightNorm(layers, axes={"layers/0/kernel": 0}).g)
    assert {path: g.shape for path, g in gains.items()} == {"layers.0.kernel": (3, 1)}


norm = partial(nnx.LayerNorm, 3, rngs=nnx.Rngs(0))
REFUSED = {
    "range": (linear, {"kernel": 2}, r"^kernel of shape \(3, 4\): feature axis 2 is out of range"),
    "name": (linear, {"kernal": 1}, r"'kernal' matches no leaf .*:\n  kernel\n  bias"),
    "fan_in": (linear, {"kernel": (0, 1)}, r"^kernel of shape .* leave no fan-in axis"),
    "no_weights": (norm, "traced", r"no leaf is a weight.*\n  bias: .*\n  scale: scale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_axes_that_do_not_fit_are_refused(case):
    make, axes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        WeightNorm(make(), axes=axes)(X)


def test_an_optimizer_made_before_the_first_call_that_finds_other_axes():
    """Its moments, of other shapes, would stretch g without a word."""
    layer = nnx.ConvTranspose(2, 2, (3,), transpose_kernel=True, rngs=nnx.Rngs(0))
    module = WeightNorm(layer)
    optimizer = nnx.Optimizer(module, optax.adam(1e-3), wrt=nnx.Param)
    x = np.ones((1, 5, 2), np.float32)
    module(x)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        optimizer.update(module, nnx.grad(lambda m: m(x).sum())(module))
    with pytest.raises(ValueError, match=r"gain of kernel .* make the optimizer after that"):
        module(x)


def test_axes_are_never_taken_for_traced():
    with pytest.raises(TypeError, match="axes must be None"):
        WeightNorm(linear(), axes="trace")


def sharded_step(how, layout):
    """A step on shards; what it is to be; both as trees of g, v and the bias."""
    kernel, g, bias, outputs = DENSE[layout]
    batch = normal(16, 8, seed=1), normal(16, 12, seed=2)
    state = nnx.state(WeightNorm(nnx.Linear(8, 12, rngs=nnx.Rngs(0))), nnx.Param)
    start = {
        "g": 2 * state["g"]["kernel"].get_value(),
        "v": state["layer_instance"]["kernel"].get_value(),
        "bias": state["layer_instance"]["bias"].get_value(),
    }

    def step(arrays, *batch, how=how):
        def loss(arrays, x, y):
            layer = nnx.Linear(*arrays["v"].shape, rngs=nnx.Rngs(0))  # of the neurons that are here
            module = WeightNorm(layer, axes={"kernel": -1})
            module.g["kernel"].set_value(arrays["g"])
            layer.kernel.set_value(arrays["v"])
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
    """A state with nodes of other lengths than those of v."""
    nodes = wnjax.weight_norm(nnx.state(model, nnx.Param))
    half = {"g": lambda g: g / 2, "v": lambda v: 3 * v, "other": lambda x: x}
    return jax.tree.map(lambda label, x: half[label](x), wnjax.labels(nodes), nodes)


def test_params_that_are_nodes_keep_g_and_v():
    """And an optimizer step is that of training the nodes themselves."""
    model, x = toys.TwoLayers(nnx.Rngs(0)), jnp.ones((2, 3))
    graph, _ = nnx.split(model)
    nodes = off_start(model)
    nnx.update(model, nodes)
    layer = WeightNorm(model)
    chex.assert_trees_all_equal(layer.nodes(), nodes)
    assert layer.fan_in_axes == WeightNorm(toys.TwoLayers(nnx.Rngs(0))).fan_in_axes

    def loss(call):
        return jnp.mean(call(x) ** 2)

    optimizer = optax.sgd(0.1)
    grads = jax.grad(lambda nodes: loss(nnx.merge(graph, wnjax.fold(nodes))))(nodes)
    updates, _ = optimizer.update(grads, optimizer.init(nodes))
    wanted = optax.apply_updates(nodes, updates)
    nnx.Optimizer(layer, optimizer, wrt=nnx.Param).update(layer, nnx.grad(loss)(layer))
    chex.assert_trees_all_close(layer.nodes(), wanted, rtol=1e-6)
    assert not layer.needs_check


def test_params_that_are_nodes_say_their_axes():
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
def test_functions_of_nodes_refuse_the_state_of_the_module(fn):
    """Which else would go wrong in silence: it has gains, and no nodes."""
    layer = WeightNorm(toys.TwoLayers(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"take its nodes\(\)(.|\n)*gains:\n  g/first/kernel"):
        fn(nnx.state(layer, nnx.Param))
    wnjax.labels(layer.nodes())


def test_gains_are_frozen_by_a_filter():
    layer = WeightNorm(toys.TwoLayers(nnx.Rngs(0)))
    before = wnjax.norms(layer.nodes())
    but_g = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("g")))

    def loss(layer):
        return jnp.mean(layer(jnp.ones((2, 3))) ** 2)

    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=but_g)
    optimizer.update(layer, nnx.grad(loss, argnums=nnx.DiffState(0, but_g))(layer))
    after = wnjax.norms(layer.nodes())
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
