"""Weights spread over devices: nothing is gathered, and shards give what the whole gives."""

import math
import re
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import wnjax
from wnjax._transforms import wrap as wrapping

P = jax.P
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# Of a (64, 32) weight: what its spec leaves of that of its gain, and the gains on a device.
LAYOUTS = {
    "features": (P(None, "tensor"), P(None, "tensor"), 16),
    "fan-in": (P("fsdp", None), P(None, None), 32),
    "both": (P("fsdp", "tensor"), P(None, "tensor"), 16),
    "fan-in over two": (P(("data", "fsdp"), "tensor"), P(None, "tensor"), 16),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
axis_types = pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])


@pytest.fixture
def mesh(axis_type):
    """Eight devices: 2 x 2 x 2."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(axis_type,) * 3)
    with jax.set_mesh(mesh):
        yield mesh


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def put(x, spec):
    return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), spec))


def collectives(fn, *args):
    """What a compiled function sends between devices: (operation, numbers) for every array."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    pattern = (
        r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
        r"(?:-start)?\("
    )
    return sorted(
        (operation, math.prod(int(size) for size in shape.split(",") if size))
        for arrays, operation in re.findall(pattern, text)
        for shape in re.findall(r"\w+\[([\d,]*)\]", arrays)
    )


def same_layout(x, spec):
    return x.sharding.is_equivalent_to(NamedSharding(x.sharding.mesh, spec), x.ndim)


JITS = {"jit auto": AUTO, "jit explicit": EXPLICIT}
everywhere = pytest.mark.parametrize("how", [*JITS, "shard_map", "pmap"])


# Of a dense layer: kernel, gain, bias and outputs.
DENSE = {
    "features": (P(None, "tensor"), P(None, "tensor"), P("tensor"), P("data", "tensor")),
    "fan-in": (P("tensor", None), P(), P(), P("data")),
}
# Under jit a plain layer works in both layouts; in shard_map it has no sum over devices for the
# second; under pmap, where all of it is everywhere, there is no layout.
dense_layouts = pytest.mark.parametrize(
    ("how", "layout"),
    [
        (how, layout)
        for how in [*JITS, "shard_map", "pmap"]
        for layout in DENSE
        if how in JITS or layout == "features"
    ],
)


def spread(how, fn, specs, tree, *batch):
    """What `fn` makes of a tree and examples on eight devices: a tree in the first one's layout.

    Under `shard_map` and `pmap`, where `fn` sees shards, the examples lie along the axis "data";
    under `pmap`, the tree is on every device, and the results of all must agree.
    """
    if how == "pmap":
        shards = [x.reshape(8, -1, *x.shape[1:]) for x in batch]
        in_axes = (None, *[0] * len(batch))
        results = jax.device_get(jax.pmap(fn, axis_name="data", in_axes=in_axes)(tree, *shards))
        first = jax.tree.map(lambda x: x[0], results)
        for i in range(1, 8):
            chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], results), first)
        return first
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(JITS.get(how, AUTO),) * 2)
    if how == "shard_map":
        shards = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=specs[0])
        return jax.device_get(jax.jit(shards)(tree, *batch))
    with jax.set_mesh(mesh):
        args = (tree, *batch)
        specs = jax.tree.broadcast(specs, args, is_leaf=lambda x: isinstance(x, P))
        return jax.device_get(jax.jit(fn)(*jax.tree.map(put, args, specs)))


def sgd_step(loss, how, tree, *batch):
    """The tree after one step; the loss is the mean over the examples, and over split features."""
    axes = {"shard_map": ("data", "tensor"), "pmap": ("data",)}.get(how, ())

    def mean_loss(tree):
        mean = loss(tree, *batch)
        for axis in axes:
            mean = jax.lax.pmean(mean, axis)
        return mean

    grads = jax.grad(mean_loss)(tree)
    if how == "pmap":  # elsewhere JAX sums over what the parameters do not vary along
        grads = jax.lax.pmean(grads, axes)
    return jax.tree.map(lambda p, grad: p - 0.1 * grad, tree, grads)


def step(optimizer):
    """One update, with gradients that are a function of the weights."""

    def fn(params, state):
        with jax.numpy_dtype_promotion("standard"):  # for optax
            grads = jax.tree.map(jnp.sin, params)
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return fn


OPTIMIZERS = {
    "weight_normalized": wnjax.weight_normalized(optax.adam(0.1)),
    "keep_norms": optax.chain(optax.adam(0.1), wnjax.keep_norms()),
}


@layouts
@axis_types
@pytest.mark.parametrize("jitted", [False, True])
def test_gains_have_the_sharding_of_their_features(mesh, layout, jitted):
    spec, gain_spec, _ = LAYOUTS[layout]
    params = {"kernel": put(normal(64, 32), spec)}
    jit = jax.jit if jitted else lambda fn: fn
    normalized_params = jit(wnjax.weight_norm)(params)
    assert same_layout(normalized_params["kernel"].v, spec)
    assert same_layout(normalized_params["kernel"].g, gain_spec)
    assert same_layout(jit(wnjax.fold)(normalized_params)["kernel"], spec)
    for name, x in jit(wnjax.norms)(normalized_params)["kernel"].items():
        assert same_layout(x, gain_spec), name


@layouts
@axis_types
def test_optimizer_states_are_sharded_as_the_weights_are(mesh, layout):
    spec, gain_spec, _ = LAYOUTS[layout]
    params = {"kernel": put(normal(64, 32), spec)}
    optimizer = OPTIMIZERS["weight_normalized"]
    params, state = jax.jit(step(optimizer))(params, optimizer.init(params))
    assert same_layout(params["kernel"], spec)
    assert same_layout(state.lengths["kernel"], gain_spec)
    for moment in (state.inner[0].mu, state.inner[0].nu):
        assert same_layout(moment["kernel"].v, spec)
        assert same_layout(moment["kernel"].g, gain_spec)


@layouts
@axis_types
def test_only_sums_of_split_fan_in_axes_are_sent(mesh, layout):
    """And they are one number a neuron; nothing is sent where the fan-in axes are whole."""
    spec, _, gains = LAYOUTS[layout]
    params = {"kernel": put(normal(64, 32), spec)}
    normalized_params = wnjax.weight_norm(params)

    def gradient(normalized_params):
        return jax.grad(
            lambda normalized_params: jnp.sum(jnp.sin(wnjax.fold(normalized_params)["kernel"]))
        )(normalized_params)

    optimizers = [(step(o), params, o.init(params)) for o in OPTIMIZERS.values()]
    # And how many times they are sent: of squares, of largest elements, of products with gradients.
    programs = [
        ((wnjax.weight_norm, params), 3),
        ((wnjax.fold, normalized_params), 1),
        ((gradient, normalized_params), 2),
    ]
    programs += [((wnjax.norms, normalized_params), 1), (optimizers[0], 3), (optimizers[1], 2)]
    for (fn, *args), times in programs:
        sums = [] if layout == "features" else [("all-reduce", gains)] * times
        assert collectives(fn, *args) == sums


def mlp(params, x):
    """Two layers."""
    return nn.relu(x @ params["up"] + params["bias"][None]) @ params["down"]


# The specs of its parameters, and the neurons on a device of weights with split fan-in axes.
MODELS = {
    "tensor": ((P(None, "tensor"), P("tensor"), P("tensor", None)), [32]),
    "fsdp": ((P("fsdp", None), P(None), P(None, "fsdp")), [128]),
    "both": ((P("fsdp", "tensor"), P("tensor"), P("tensor", "fsdp")), [16, 64]),
}


def problem(layout):
    """Parameters in a layout, and a batch spread over the data axis."""
    shapes = {"up": (64, 128), "bias": (128,), "down": (128, 32)}
    specs = zip(shapes.items(), MODELS[layout][0], strict=True)
    params = {name: put(normal(*shape) / 8, spec) for (name, shape), spec in specs}
    return params, put(normal(256, 64, seed=1), P("data", None))


def gradient(fn, params):
    """The gradient of the mean square, laid out as the parameters are."""
    layout = jax.tree.map(lambda p: p.sharding, params)

    def gradients(params, x):
        grads = jax.grad(lambda p: jnp.mean(jnp.square(fn(p, x))))(params)
        return jax.lax.with_sharding_constraint(grads, layout)

    return gradients


@pytest.mark.parametrize("form", ["wrap", "fold"])
@pytest.mark.parametrize(
    ("axis_type", "layout"),  # the plain model itself needs an out_sharding in the others
    [(AUTO, "tensor"), (AUTO, "fsdp"), (AUTO, "both"), (EXPLICIT, "fsdp")],
    ids=["auto-tensor", "auto-fsdp", "auto-both", "explicit-fsdp"],
)
def test_a_model_sends_what_the_plain_one_does_and_sums(mesh, layout, form):
    """A sum for the norm, and one for its gradient, where fan-in axes are split."""
    params, x = problem(layout)
    normalized_params = wnjax.weight_norm(params, wnjax.infer_axes(mlp)(params, x))
    fn = (
        wnjax.wrap(mlp)
        if form == "wrap"
        else lambda normalized_params, x: mlp(wnjax.fold(normalized_params), x)
    )
    sent = collectives(gradient(fn, normalized_params), normalized_params, x)
    for one in collectives(gradient(mlp, params), params, x):
        sent.remove(one)
    assert sent == [("all-reduce", n) for n in MODELS[layout][1] for _ in range(2)]
    alone = jax.device_get((normalized_params, x))
    chex.assert_trees_all_close(
        jax.jit(gradient(fn, normalized_params))(normalized_params, x),
        jax.grad(lambda n: jnp.mean(jnp.square(mlp(wnjax.fold(n), alone[1]))))(alone[0]),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("axis_type", "layout"),
    [(AUTO, "tensor"), (AUTO, "both"), (EXPLICIT, "fsdp")],
    ids=["auto-tensor", "auto-both", "explicit-fsdp"],
)
def test_scales_on_outputs_send_numbers_of_neurons_alone(mesh, layout, monkeypatch):
    """The gradient of a gain, too, is then a sum over the batch, which is spread over devices."""
    monkeypatch.setattr(wrapping, "scales_output", lambda *_: True)
    params, x = problem(layout)
    normalized_params = wnjax.weight_norm(params, wnjax.infer_axes(mlp)(params, x))
    fn = gradient(wnjax.wrap(mlp), normalized_params)
    sent = collectives(fn, normalized_params, x)
    for one in collectives(gradient(mlp, params), params, x):
        sent.remove(one)
    assert {operation for operation, _ in sent} == {"all-reduce"}
    numbers = [number for _, number in sent]
    assert len(numbers) <= 2 * 3  # two weights: the norm, its gradient, the gain's
    assert max(numbers) <= 128
    alone = jax.device_get((normalized_params, x))
    expected = jax.grad(lambda n: jnp.mean(jnp.square(mlp(wnjax.fold(n), alone[1]))))(alone[0])
    chex.assert_trees_all_close(jax.jit(fn)(normalized_params, x), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("axis_type", "layout"),
    [(AUTO, "both"), (EXPLICIT, "fsdp")],
    ids=["auto-both", "explicit-fsdp"],
)
@pytest.mark.parametrize("as_gv_leaves", [False, True])
def test_data_init_of_shards_is_that_of_the_whole(mesh, layout, as_gv_leaves):
    """Under jit, with the batch spread over devices, too; beyond the network's, sums are sent."""
    params, x = problem(layout)
    tree = wnjax.weight_norm(params, {"up|down": -1}) if as_gv_leaves else params
    init = jax.jit(wnjax.data_init(mlp))
    alone = jax.device_get((tree, x))
    chex.assert_trees_all_close(init(tree, x), init(*alone), rtol=1e-4, atol=1e-5)
    sent = collectives(init, tree, x)
    for one in collectives(mlp, params, x):
        sent.remove(one)
    neurons = set(MODELS[layout][1])
    assert {operation for operation, _ in sent} == {"all-reduce"}
    assert neurons <= {numbers for _, numbers in sent}
    assert max(numbers for _, numbers in sent) <= max(neurons)


@axis_types
def test_views_of_shards_are_those_of_the_whole(mesh):
    params, x = problem("fsdp")
    whole = jax.device_get((params, x))
    axes = wnjax.infer_axes(mlp)(params, x)
    assert axes == wnjax.infer_axes(mlp)(*whole)
    assert wnjax.summary(axes) == wnjax.summary(wnjax.infer_axes(mlp)(*whole))
    found = []

    @jax.jit
    def inside(params, x):  # where shards have their sharding in their types, too
        found.append(wnjax.infer_axes(mlp)(params, x))

    inside(params, x)
    assert found == [axes]
    normalized_params, whole_gv_leaves = (
        wnjax.weight_norm(params, axes),
        wnjax.weight_norm(whole[0], axes),
    )
    assert wnjax.summary(normalized_params) == wnjax.summary(whole_gv_leaves)
    gv = wnjax.WeightNorm("g", "v")
    assert wnjax.labels(normalized_params) == {"up": gv, "bias": "other", "down": gv}


@axis_types
@pytest.mark.parametrize("log_scale", [False, True])
def test_abstract_trees_have_the_layout_of_real_ones(mesh, log_scale):
    normalize = partial(wnjax.weight_norm, log_scale=log_scale)
    params = {
        "dense": {
            "kernel": put(normal(64, 32), P("fsdp", "tensor")),
            "bias": put(jnp.zeros(32), P("tensor")),
        },
        "Conv_0": {"kernel": put(jnp.ones((4, 8, 32), jnp.bfloat16), P(None, "fsdp"))},
    }

    abstract = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    normalized_params = normalize(params)
    assert abstract(normalize(shapes)) == abstract(normalized_params)
    assert abstract(wnjax.fold(normalize(shapes))) == abstract(params)
    assert normalize(abstract(params)) == abstract(normalized_params)  # without shardings
    for one, real in zip(
        *map(jax.tree.leaves, (normalize(shapes), normalized_params)), strict=True
    ):
        assert real.sharding.is_equivalent_to(one.sharding, real.ndim)


@pytest.mark.parametrize("axis_type", [AUTO])  # Linen's boxes know no other
def test_a_model_is_initialized_in_shards(mesh):
    """No device ever holds a whole weight."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", "tensor"))
            return nn.Dense(32, kernel_init=init)(x)

    def init(key):
        return Network().init(key, jnp.zeros((1, 64), jnp.float32))["params"]

    shapes = jax.eval_shape(init, jax.random.key(0))
    specs = nn.get_partition_spec(wnjax.weight_norm(shapes))
    shardings = jax.tree.map(partial(NamedSharding, mesh), specs)

    def start(key):
        return nn.meta.unbox(wnjax.weight_norm(init(key)))

    normalized_params = jax.jit(start, out_shardings=shardings)(jax.random.key(0))
    gv = normalized_params["Dense_0"]["kernel"]
    assert {shard.data.shape for shard in gv.v.addressable_shards} == {(32, 16)}
    assert {shard.data.shape for shard in gv.g.addressable_shards} == {(1, 16)}
    kernel = nn.meta.unbox(init(jax.random.key(0)))["Dense_0"]["kernel"]
    np.testing.assert_allclose(
        wnjax.fold(normalized_params)["Dense_0"]["kernel"], kernel, atol=1e-7
    )


def test_what_does_not_fit_is_refused_of_abstract_trees_too():
    shapes = {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.int32)}
    with pytest.raises(TypeError, match="kernel has dtype int32; only floating-point"):
        wnjax.weight_norm(shapes)
    kernel = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    gv = wnjax.WeightNorm(jax.ShapeDtypeStruct((4, 2), jnp.float32), kernel)
    with pytest.raises(ValueError, match=r"kernel: g of shape \(4, 2\) does not fit v of shape"):
        wnjax.fold({"kernel": gv})
    gv = wnjax.WeightNorm(jax.ShapeDtypeStruct((1, 3), jnp.float32), normal(4, 3))
    with pytest.raises(TypeError, match="kernel: v is an array, but g a shape"):
        wnjax.fold({"kernel": gv})


def test_gradients_of_heads_on_explicit_axes():
    """Of weights with several feature axes, on a batch that is spread over devices."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(EXPLICIT,))
    with jax.set_mesh(mesh):
        x = jax.device_put(normal(8, 4), jax.NamedSharding(mesh, P("d")))
        tree = wnjax.weight_norm({"w": normal(4, 2, 3)}, {"w": (1, 2)})

        def fn(params, x):
            return jnp.einsum("bi,ihk->bhk", x, params["w"])

        grads = [
            jax.jit(jax.grad(lambda t, f=f: jnp.sum(jnp.sin(f(t, x)))))(tree)
            for f in (wnjax.wrap(fn), lambda t, x: fn(wnjax.fold(t), x))
        ]
    chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-5)
