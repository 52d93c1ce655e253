"""`wnjax.convert` against the libraries that it converts from: outputs, and an optimizer's step."""

from functools import partial

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import pytest
from flax import nnx, serialization
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as orbax

import wnjax
from tests.toys import train
from wnjax.convert import from_dicts, from_equinox, from_linen, from_nnx, from_paramax

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (5, 3))
RATE = 0.1
close = partial(chex.assert_trees_all_close, rtol=2e-6, atol=2e-6)


def shaken(tree):
    """Every array of a tree moved off where it was initialized, as training does."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)
    moved = [x + jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype) for x in leaves]
    return treedef.unflatten(moved)


def flax_wrapper(layer, **arguments):
    return nn.WeightNorm(layer, **arguments)


class Compact(nn.Module):
    """A layer made in a compact call, between others."""

    wrap: object
    layer: object = partial(nn.Dense, 4)

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.LayerNorm()(self.wrap(self.layer(name="layer"))(x)))


class Setup(nn.Module):
    """Both ways to make a layer in setup."""

    wrap: object

    def setup(self):
        self.first = nn.Dense(3)
        self.wrapped = self.wrap(self.first)
        self.inside = self.wrap(nn.Dense(3))

    def __call__(self, x):
        return self.inside(self.wrapped(x))


class Lender(nn.Module):
    """A layer that is wrapped in another module than its own."""

    wrap: object

    def setup(self):
        self.own = nn.Dense(3)
        self.borrower = Borrower(self.own, self.wrap)

    def __call__(self, x):
        return self.borrower(x)


class Borrower(nn.Module):
    layer: nn.Module
    wrap: object

    @nn.compact
    def __call__(self, x):
        return self.wrap(self.layer)(x)


class Stack(nn.Module):
    """Layers under scan, each with a wrapper of its own."""

    wrap: object

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return layer(x), None

        class Layer(nn.Module):
            wrap: object

            @nn.compact
            def __call__(self, x):
                return nn.tanh(self.wrap(nn.Dense(3))(x))

        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return scan(Layer(self.wrap), x, None)[0]


def boxed_dense(name=None):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "tensor"))
    return nn.Dense(4, kernel_init=init, name=name)


HEADS = partial(nn.DenseGeneral, (2, 3))
MIX = partial(nn.MultiHeadDotProductAttention, 2, qkv_features=4)
# The model, the wrapper's arguments, and the shapes of g that they come to.
LINEN = {
    "compact": (Compact, {}, {"layer/kernel": (1, 4)}),
    "whole": (Compact, {"feature_axes": None}, {"layer/kernel": (1, 1)}),
    "other_axis": (Compact, {"feature_axes": 0}, {"layer/kernel": (3, 1)}),
    "bias_too": (
        Compact,
        {"variable_filter": None},
        {"layer/kernel": (1, 4), "layer/bias": (4,)},
    ),
    "heads": (
        lambda wrap: Alone(wrap, HEADS),
        {"feature_axes": (-2, -1)},
        {"layer/kernel": (1, 2, 3)},
    ),
    "network": (
        lambda wrap: Alone(wrap, MIX),
        {},
        {
            **{f"layer/{name}/kernel": (1, 1, 2) for name in ("query", "key", "value")},
            "layer/out/kernel": (1, 1, 3),
        },
    ),
    "setup": (Setup, {}, {"first/kernel": (1, 3), "inside/layer_instance/kernel": (1, 3)}),
    "lent": (Lender, {}, {"own/kernel": (1, 3)}),
    "stack": (Stack, {}, {"Layer_0/Dense_0/kernel": (4, 1, 3)}),
    "boxed": (lambda wrap: Compact(wrap, boxed_dense), {}, {"layer/kernel": (1, 4)}),
    "alone": (lambda wrap: wrap(nn.Dense(4)), {}, {"layer_instance/kernel": (1, 4)}),
}
every_linen = pytest.mark.parametrize("name", LINEN)


class Alone(nn.Module):
    """A layer alone, whose output has any shape."""

    wrap: object
    layer: object

    @nn.compact
    def __call__(self, x):
        return self.wrap(self.layer(name="layer"))(x)


def linen(name, dtype=jnp.float32):
    """The model with both wrappers, trained params of Flax's, and what to convert them with."""
    make, arguments, shapes = LINEN[name]
    old, new = make(partial(flax_wrapper, **arguments)), make(wnjax.linen.WeightNorm)
    params = jax.jit(old.init)(KEY, X)["params"]
    params = jax.tree.map(lambda x: x.astype(dtype), shaken(params))
    axes = {"feature_axes": arguments["feature_axes"]} if "feature_axes" in arguments else {}
    return old, new, params, partial(from_linen, **axes), shapes


def applied(model):
    return lambda params, x: model.apply({"params": params}, x)


def loss_of(fn):
    return lambda params: jnp.mean((fn(params, X) - 1) ** 2)


@every_linen
def test_linen_computes_the_same_and_trains_alike(name):
    old, new, params, convert, shapes = linen(name)
    nodes = convert(params)
    norms = {path: value["g"].shape for path, value in wnjax.norms(nodes).items()}
    assert norms == shapes
    close(applied(new)(nodes, X), applied(old)(params, X))

    stepped = train(optax.sgd(RATE), loss_of(applied(old)), params, 1)
    expected = convert(stepped)
    actual = train(optax.sgd(RATE), loss_of(applied(new)), nodes, 1)
    assert float(loss_of(applied(new))(actual)) != float(loss_of(applied(new))(nodes))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["compact", "boxed", "bias_too"])
def test_linen_keeps_v_and_takes_g_as_they_are(name):
    _, _, params, convert, _ = linen(name)
    kernel = nn.unbox(convert(params))["layer"]["kernel"]
    old = nn.unbox(params)
    np.testing.assert_array_equal(kernel.v, old["layer"]["kernel"])
    (scale,) = (s for key, s in old["WeightNorm_0"].items() if "kernel" in key)
    np.testing.assert_array_equal(kernel.g[0], scale)


@pytest.mark.parametrize("name", ["compact", "heads", "bias_too"])
def test_linen_nodes_serve_the_model_without_the_wrapper(name):
    old, _, params, convert, _ = linen(name)
    plain = LINEN[name][0](lambda layer: layer)
    close(applied(plain)(wnjax.fold(convert(params)), X), applied(old)(params, X))
    close(wnjax.wrap(applied(plain))(convert(params), X), applied(old)(params, X))


@pytest.mark.parametrize("form", ["nested", "flat", "frozen", "variables", "msgpack"])
@pytest.mark.parametrize("name", ["compact", "lent", "stack"])
def test_linen_takes_keys_in_every_form(name, form):
    _, _, params, convert, _ = linen(name)
    flat = flatten_dict(params, sep="/")
    given = {
        "nested": lambda: unflatten_dict(flat, sep="/"),
        "flat": lambda: flat,
        "frozen": lambda: freeze(params),
        "variables": lambda: {"params": params, "batch_stats": {"mean": X}},
        "msgpack": lambda: serialization.msgpack_restore(serialization.to_bytes(params)),
    }[form]()
    converted = convert(given)
    if form == "flat":
        converted = unflatten_dict(converted, sep="/")
    if form == "variables":
        np.testing.assert_array_equal(converted["batch_stats"]["mean"], X)
        converted = converted["params"]
    assert isinstance(converted, FrozenDict) == (form == "frozen")
    chex.assert_trees_all_equal(jax.tree.leaves(converted), jax.tree.leaves(convert(params)))
    assert {**wnjax.norms(converted)}.keys() == wnjax.norms(convert(params)).keys()


def test_linen_takes_boxes_that_a_file_made_dicts_of():
    _, _, params, convert, _ = linen("boxed")
    node = convert(serialization.to_state_dict(params))["layer"]["kernel"]["value"]
    expected = nn.unbox(convert(params))["layer"]["kernel"]
    chex.assert_trees_all_equal(node, expected)


def test_linen_boxes_keep_the_names_of_their_axes():
    _, _, params, convert, _ = linen("boxed")
    kernel = convert(params)["layer"]["kernel"]
    assert kernel.v.names == kernel.g.names == (None, "tensor")


def test_linen_wrappers_may_differ():
    class Two(nn.Module):
        wraps: object

        @nn.compact
        def __call__(self, x):
            first, second = self.wraps
            x = first(nn.Dense(3))(x)
            return second(nn.Dense(3))(x)

    old = Two((nn.WeightNorm, partial(nn.WeightNorm, feature_axes=0)))
    params = shaken(old.init(KEY, X)["params"])
    nodes = from_linen(params, {"Dense_1/.*": 0})
    new = Two((wnjax.linen.WeightNorm,) * 2)
    close(applied(new)(nodes, X), applied(old)(params, X))
    with pytest.raises(ValueError, match="feature_axes: the pattern 'Dense_2' matches no leaf"):
        from_linen(params, {"Dense_2": 0})


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3, 1])
def test_linen_epsilon(size):
    """ε makes a weight of a small v smaller than its scale says."""
    old, new, params, convert, _ = linen("compact")
    params["layer"]["kernel"] *= size
    close(applied(new)(convert(params), X), applied(old)(params, X))
    large = Compact(partial(flax_wrapper, epsilon=0.1))
    nodes = convert(params, epsilon=0.1)
    close(applied(new)(nodes, X), applied(large)(params, X))


def test_linen_neurons_of_zeros_compute_the_same_and_train():
    old, new, params, convert, _ = linen("compact")
    kernel = params["layer"]["kernel"]
    params["layer"]["kernel"] = kernel.at[:, 1].set(0)
    nodes = convert(params)
    close(applied(new)(nodes, X), applied(old)(params, X))
    grads = jax.grad(loss_of(applied(new)))(nodes)
    assert float(nodes["layer"]["kernel"].g[0, 1]) == 0
    assert float(abs(grads["layer"]["kernel"].g[0, 1])) > 0


def test_linen_without_scale_by_hand():
    """As the error says that one may."""
    old = Compact(partial(flax_wrapper, use_scale=False))
    params = shaken(old.init(KEY, X)["params"])
    with pytest.raises(ValueError, match="use_scale=False stores none"):
        from_linen(params)
    nodes = wnjax.weight_norm(params, {"layer/kernel": -1})
    labels = wnjax.labels(nodes)
    nodes = jax.tree.map(lambda label, x: jnp.ones_like(x) if label == "g" else x, labels, nodes)
    close(applied(Compact(wnjax.linen.WeightNorm))(nodes, X), applied(old)(params, X))


def test_linen_bfloat16():
    _, _, params, convert, _ = linen("compact", jnp.bfloat16)
    node = convert(params)["layer"]["kernel"]
    v = params["layer"]["kernel"].astype(jnp.float32)
    scale = params["WeightNorm_0"]["layer/kernel/scale"].astype(jnp.float32)
    w = np.asarray(v) / np.linalg.norm(v, axis=0) * np.asarray(scale)
    assert (node.g.dtype, node.v.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(wnjax.fold(node).astype(jnp.float32), w, rtol=2**-8)


def test_linen_of_shapes():
    _, _, params, convert, _ = linen("boxed")
    shapes = jax.eval_shape(convert, jax.eval_shape(lambda: params))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, convert(params))


def dense(kernel=(3, 3), **scales):
    zeros = {key.replace("__", "/"): jnp.zeros(shape) for key, shape in scales.items()}
    return {"Dense_0": {"kernel": jnp.ones(kernel)}, "WeightNorm_0": zeros}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dense(), "found no scale .* leaves are\n  Dense_0/kernel"),
        (dense(Dense_1__kernel__scale=3), "WeightNorm_0/Dense_1/kernel/scale: found no weight"),
        (dense((3, 4), Dense_0__kernel__scale=3), r"Dense_0/kernel of shape \(3, 4\): .* \(3,\)"),
        (dense(Dense_0__kernel__scale=(2, 2, 3)), r"Dense_0/kernel .* do not fit"),
        (
            dense(Dense_0__kernel__scale=3) | {"WeightNorm_1": {"Dense_0/kernel/scale": X[0]}},
            "Dense_0/kernel is normalized twice, by WeightNorm_1/Dense_0/kernel/scale too",
        ),
    ],
)
def test_linen_errors(params, message):
    with pytest.raises(ValueError, match=message.replace("\n", "\\n")):
        from_linen(params)


def test_linen_errors_of_type():
    with pytest.raises(TypeError, match="params must be nested dicts, got a list"):
        from_linen([X])


def test_linen_refuses_a_wrapper_in_a_wrapper():
    old = Alone(flax_wrapper, partial(Compact, flax_wrapper))
    params = old.init(KEY, X)["params"]
    with pytest.raises(ValueError, match="is normalized twice"):
        from_linen(params)


class Network(nnx.Module):
    """Layers in an attribute, a list and under vmap; one in two places; one not normalized."""

    def __init__(self, feature_axes, rngs):
        wrapped = partial(nnx.WeightNorm, rngs=rngs)

        self.first = wrapped(nnx.Linear(3, 4, rngs=rngs))
        self.layers = nnx.List([wrapped(nnx.Linear(4, 4, rngs=rngs), feature_axes=feature_axes)])
        self.again = self.layers[0]
        self.mix = wrapped(
            nnx.MultiHeadAttention(2, 4, 4, decode=False, rngs=rngs), variable_filter=is_query
        )
        self.plain = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        y = self.layers[0](self.again(self.first(x)))
        return self.plain(self.mix(y[None])[0])


def is_query(path, param):
    return path == ("query", "kernel")


def nnx_network(feature_axes=None, *, called=True):
    """Flax's, with scales that have been trained, and v that a call has overwritten or not."""
    model = Network(feature_axes, nnx.Rngs(0))
    for layer in (model.first, model.layers[0], model.mix):
        for path, scale in layer.scales.items():
            value = shaken(scale[...] if isinstance(scale, nnx.Variable) else scale)
            layer.scales[path] = type(scale)(value) if isinstance(scale, nnx.Variable) else value
    if called:
        model(X)
    return model


# What Flax trains in every version: not the scales.
BUT_SCALES = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("scales")))
BUT_GAINS = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("g")))


def nnx_step(model, wrt):
    grads = nnx.grad(lambda model: jnp.mean((model(X) - 1) ** 2), argnums=nnx.DiffState(0, wrt))(
        model
    )
    nnx.Optimizer(model, optax.sgd(RATE), wrt=wrt).update(model, grads)


def test_nnx_computes_the_same_and_trains_alike():
    old = nnx_network()
    before = jax.tree.map(jnp.copy, nnx.state(old))
    new = from_nnx(old)
    chex.assert_trees_all_equal(nnx.state(old), before)
    assert isinstance(new.first, wnjax.nnx.WeightNorm)
    assert new.again is new.layers[0]
    assert new.layers[0].g["kernel"].shape == (1, 1)
    assert list(new.mix.g) == ["query"]
    close(new(X), old(X))
    before = jax.tree.map(jnp.copy, nnx.state(old))  # the call has written to v
    nnx_step(new, BUT_GAINS)
    chex.assert_trees_all_equal(nnx.state(old), before)
    nnx_step(old, BUT_SCALES)
    close(new(X), old(X))


def test_nnx_scales_that_no_call_has_written_to_v():
    old = nnx_network(called=False)
    new = from_nnx(old)
    close(new(X), old(X))


def test_nnx_gains_train():
    new = from_nnx(nnx_network())
    before = new.first.g["kernel"][...]
    nnx_step(new, nnx.Param)
    assert (new.first.g["kernel"][...] != before).all()


@pytest.mark.skipif(
    not isinstance(
        nnx.WeightNorm(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)).scales[("kernel",)],
        nnx.Param,
    ),
    reason="this version of Flax does not train scales",
)
def test_nnx_gains_train_as_in_flax():
    old = nnx_network()
    new = from_nnx(old)
    nnx_step(old, nnx.Param)
    nnx_step(new, nnx.Param)
    close(new(X), old(X))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Orbax's own
@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
def test_nnx_state_from_orbax_without_a_target(tmp_path):
    old = nnx_network(feature_axes=-1)
    orbax.save(tmp_path / "state", nnx.state(old))
    converted = from_nnx(orbax.load(tmp_path / "state"))
    expected = serialization.to_state_dict(nnx.to_pure_dict(nnx.state(from_nnx(old))))
    flat = flatten_dict(expected, sep="/")
    chex.assert_trees_all_equal(
        flatten_dict(converted, sep="/"), {f"{path}/value": x for path, x in flat.items()}
    )


@pytest.mark.parametrize("form", ["state", "pure", "msgpack"])
def test_nnx_states_are_those_of_the_new_model(form):
    old = nnx_network(feature_axes=-1)
    state = nnx.state(old)
    pure = nnx.to_pure_dict(state)
    given = {
        "state": lambda: state,
        "pure": lambda: pure,
        "msgpack": lambda: serialization.msgpack_restore(serialization.to_bytes(pure)),
    }[form]()
    converted = from_nnx(given)
    expected = nnx.state(from_nnx(old))
    if form == "state":
        assert type(converted["first"]["g"]["kernel"]) is nnx.Param
        chex.assert_trees_all_equal(converted, expected)
    else:
        expected = serialization.to_state_dict(nnx.to_pure_dict(expected))  # keys are strings
        chex.assert_trees_all_equal(serialization.to_state_dict(converted), expected)


def test_nnx_state_of_stacked_layers():
    @nnx.split_rngs(splits=4)
    @nnx.vmap
    def make(rngs):
        return nnx.WeightNorm(nnx.Linear(3, 3, rngs=rngs), rngs=rngs)

    old = make(nnx.Rngs(0))
    new = from_nnx(old)
    assert new.g["kernel"].shape == (4, 1, 3)
    chex.assert_trees_all_equal(from_nnx(nnx.state(old)), nnx.state(new))
    run = nnx.vmap(lambda layer: layer(X))
    close(run(new), run(old))


def test_nnx_gains_have_no_axis_names_on_fan_in_axes():
    with jax.set_mesh(jax.make_mesh((1, 1), ("in", "out"))):
        layer = nnx.Linear(3, 4, kernel_metadata={"out_sharding": ("in", "out")}, rngs=nnx.Rngs(0))
        old = nnx.WeightNorm(layer, rngs=nnx.Rngs(0))
        new = from_nnx(old)
        states = nnx.state(new), from_nnx(nnx.state(old))
        close(new(X), old(X))
        for spec in map(nnx.get_partition_spec, states):
            assert spec["g"]["kernel"].get_value() == jax.P(None, "out")
            assert spec["layer_instance"]["kernel"].get_value() == jax.P("in", "out")


def test_nnx_without_scale_has_gains_of_one():
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    old = nnx.WeightNorm(layer, use_scale=False, rngs=nnx.Rngs(0))
    new = from_nnx(old)
    np.testing.assert_array_equal(new.g["kernel"], np.ones((1, 4)))
    close(new(X), old(X))


def test_nnx_neurons_of_zeros_compute_the_same_and_train():
    init = nnx.initializers.zeros
    old = nnx.WeightNorm(nnx.Linear(3, 4, kernel_init=init, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    new = from_nnx(old)
    close(new(X), old(X))
    grads = nnx.grad(lambda layer: layer(X).sum())(new)
    assert (grads["g"]["kernel"][...] != 0).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)), ValueError, "found no flax.nnx.WeightNorm"),
        (lambda: nnx.State({"kernel": nnx.Param(X)}), ValueError, "found no scale"),
        (lambda: {"kernel": X}, ValueError, "found no scale .*leaves are\n  kernel"),
        (
            lambda: {"a": {"scales": {("w",): X[0]}, "layer_instance": {"kernel": X}}},
            ValueError,
            "found no weight",
        ),
        (
            lambda: {"scales": {"('kernel',)": jnp.ones(7)}, "layer_instance": {"kernel": X}},
            ValueError,
            r"layer_instance/kernel of shape \(5, 3\): feature axes -1 do not fit",
        ),
        (
            lambda: {"scales": {"('bias',)": jnp.ones(3)}, "layer_instance": {"bias": X[0]}},
            ValueError,
            "layer_instance/bias has no fan-in axis",
        ),
        (
            lambda: nnx.Dict(
                a=nnx.WeightNorm(
                    nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
                    variable_filter=nnx.PathContains("bias"),
                    rngs=nnx.Rngs(0),
                )
            ),
            ValueError,
            "a: bias of shape .* leave no fan-in axis",
        ),
        (lambda: [X], TypeError, "takes a module, a state or a dict, got a list"),
    ],
)
def test_nnx_errors(make, error, message):
    with pytest.raises(error, match=message.replace("\n", "\\n")):
        from_nnx(make())


def eqx_loss(unwrap):
    """The loss of a model's arrays; the rest of it, such as activations, is no parameter."""

    def loss(params, static, x):
        return jnp.mean((jax.vmap(unwrap(eqx.combine(params, static)))(x) - 1) ** 2)

    return loss


def eqx_stepped(model, x, unwrap):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    params = train(optax.sgd(RATE), lambda params: eqx_loss(unwrap)(params, static, x), params, 1)
    return eqx.combine(params, static)


EQUINOX = {
    "linear": (lambda key: eqx.nn.Linear(3, 4, key=key), 0, (3,)),
    "whole": (lambda key: eqx.nn.Linear(3, 4, key=key), None, (3,)),
    "inputs": (lambda key: eqx.nn.Linear(3, 4, key=key), 1, (3,)),
    "conv": (lambda key: eqx.nn.Conv2d(2, 4, 3, key=key), 0, (2, 5, 5)),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_equinox_computes_the_same_and_trains_alike(name):
    make, axis, shape = EQUINOX[name]
    old = eqx.nn.Sequential([eqx.nn.WeightNorm(make(KEY), axis=axis), eqx.nn.Lambda(jax.nn.tanh)])
    old = eqx.tree_at(lambda m: m[0].g, old, 2 * old[0].g)
    new = from_equinox(old)
    x = jax.random.normal(KEY, (6, *shape))
    assert isinstance(new[0].weight, wnjax.WeightNorm)
    close(jax.vmap(wnjax.fold(new))(x), jax.vmap(old)(x))

    actual = eqx_stepped(new, x, wnjax.fold)
    expected = from_equinox(eqx_stepped(old, x, lambda model: model))
    close(*(eqx.filter(m, eqx.is_array) for m in (actual, expected)))


def test_equinox_stacked_layers():
    make = eqx.filter_vmap(lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=key)))
    old = make(jax.random.split(KEY, 5))
    new = from_equinox(old)
    assert new.weight.g.shape == (5, 4, 1)
    run = eqx.filter_vmap(lambda layer: jax.vmap(layer)(X))
    close(run(wnjax.fold(new)), run(old))


def test_equinox_errors():
    layer = eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=KEY))
    with pytest.raises(ValueError, match=r"found no equinox.nn.WeightNorm .*\n  weight\n  bias"):
        from_equinox(layer.layer)
    with pytest.raises(ValueError, match="a/0: a WeightNorm inside another"):
        from_equinox({"a": [eqx.nn.WeightNorm(layer, "g")]})
    with pytest.raises(ValueError, match="a: g should be an array, but is a NoneType"):
        from_equinox({"a": eqx.partition(layer, eqx.is_array)[1]})


def paramax_model():
    mlp = eqx.nn.MLP(3, 4, 5, 1, key=KEY)
    return eqx.tree_at(
        lambda m: [layer.weight for layer in m.layers],
        mlp,
        [paramax.WeightNormalization(layer.weight) for layer in mlp.layers],
    )


def test_paramax_computes_the_same():
    old = paramax_model()
    new = from_paramax(old)
    assert new.layers[0].weight.g.shape == (5, 1)
    run = jax.vmap(wnjax.fold(new))(X), jax.vmap(paramax.unwrap(old))(X)
    close(*run)


def test_paramax_step_is_that_of_another_parameter_of_the_length():
    """As in paramax for v; the gradient of the scale there is that of g times softplus′."""
    old = paramax_model()
    new = from_paramax(old)
    before = old.layers[0].weight.scale.args[0]
    actual = eqx_stepped(new, X, wnjax.fold).layers[0].weight
    expected = eqx_stepped(old, X, paramax.unwrap).layers[0].weight
    close(actual.v, expected.weight)
    change = (actual.g - new.layers[0].weight.g) * jax.nn.sigmoid(before)
    close(change, expected.scale.args[0] - before)


def test_paramax_wrappers_around_a_node_stay():
    weight = paramax.WeightNormalization(X)
    old = {"frozen": paramax.NonTrainable(weight), "exp": paramax.Parameterize(jnp.exp, weight)}
    new = from_paramax(old)
    assert isinstance(new["frozen"], paramax.NonTrainable)
    close(paramax.unwrap(wnjax.fold(new)), paramax.unwrap(old))


def test_paramax_scales_of_other_kinds():
    old = paramax.WeightNormalization(X)
    old = eqx.tree_at(lambda w: w.scale, old, paramax.Parameterize(jnp.exp, X[:, :1]))
    close(wnjax.fold(from_paramax(old)), paramax.unwrap(old))
    old = eqx.tree_at(lambda w: w.scale, old, X[:, :1])
    close(wnjax.fold(from_paramax(old)), paramax.unwrap(old))


def test_paramax_errors():
    masked = paramax.WeightNormalization(paramax.Parameterize(jnp.tril, X))
    frozen = paramax.non_trainable(paramax.WeightNormalization(X))
    for wrapped in (masked, frozen):
        with pytest.raises(ValueError, match="a: a wrapper inside the WeightNormalization"):
            from_paramax({"a": wrapped})
    with pytest.raises(ValueError, match=r"found no paramax.WeightNormalization .*\n  a"):
        from_paramax({"a": X})


def node_dict(g=(1, 3), v=(5, 3), gain="g", dtype=np.float32):
    return {gain: np.ones(g, np.float32), "v": np.ones(v, dtype)}


def test_dicts_become_nodes():
    tree = {"a": [node_dict(), {"bias": X}], "b": freeze(node_dict(gain="log_g"))}
    nodes = from_dicts(tree)
    assert isinstance(nodes["a"][0], wnjax.WeightNorm)
    assert isinstance(nodes["b"], wnjax.LogWeightNorm)
    assert nodes["a"][0].v is tree["a"][0]["v"]
    assert nodes["a"][1]["bias"] is X


def test_modules_that_are_called_g_and_v_stay():
    modules = {"g": {"kernel": node_dict()}, "v": {"kernel": node_dict()}}
    nodes = from_dicts(modules)
    assert set(nodes) == {"g", "v"}
    assert isinstance(nodes["v"]["kernel"], wnjax.WeightNorm)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": X}, "found no dict of a node .*\n  a"),
        ({"m": node_dict(g=(3,))}, r"m: g of shape \(3,\) does not fit v"),
        ({"m": node_dict(g=(1, 4))}, r"m: g of shape \(1, 4\) does not fit v"),
        ({"m": node_dict((3,), (3,))}, "m has the keys of a WeightNorm, but g has no axis"),
        ({"m": node_dict((), (), "log_g")}, "m has the keys of a LogWeightNorm, but log_g has no"),
        ({"m": node_dict(dtype=np.int32)}, "m has the keys of a WeightNorm, .* int32"),
        ({"m": node_dict() | {"v": {"kernel": X}}}, "m: v should be an array, but is a dict"),
        ({"m": node_dict() | {"v": None}}, "m: v should be an array, but is a NoneType"),
    ],
)
def test_what_only_looks_like_a_node_is_refused(tree, message):
    with pytest.raises(ValueError, match=message.replace("\n", "\\n")):
        from_dicts(tree)
