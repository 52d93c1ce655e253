"""`from_linen` against `flax.linen.WeightNorm`: outputs, and an optimizer's step."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, unflatten_dict

import wnjax
from tests.test_convert import KEY, RATE, X, close, shaken
from tests.toys import train
from wnjax.convert import from_linen


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
    "setup": (Setup, {}, {"first/kernel": (1, 3), "inside/kernel": (1, 3)}),
    "lent": (Lender, {}, {"own/kernel": (1, 3)}),
    "stack": (Stack, {}, {"Layer_0/Dense_0/kernel": (4, 1, 3)}),
    "boxed": (lambda wrap: Compact(wrap, boxed_dense), {}, {"layer/kernel": (1, 4)}),
    "alone": (lambda wrap: wrap(nn.Dense(4)), {}, {"kernel": (1, 4)}),
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
    normalized_params = convert(params)
    norms = {path: value["g"].shape for path, value in wnjax.norms(normalized_params).items()}
    assert norms == shapes
    close(applied(new)(normalized_params, X), applied(old)(params, X))

    stepped = train(optax.sgd(RATE), loss_of(applied(old)), params, 1)
    expected = convert(stepped)
    actual = train(optax.sgd(RATE), loss_of(applied(new)), normalized_params, 1)
    assert float(loss_of(applied(new))(actual)) != float(loss_of(applied(new))(normalized_params))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["compact", "boxed", "bias_too"])
def test_linen_keeps_v_and_takes_g_as_they_are(name):
    _, _, params, convert, _ = linen(name)
    kernel = nn.unbox(convert(params))["layer"]["kernel"]
    old = nn.unbox(params)
    np.testing.assert_array_equal(kernel.v, old["layer"]["kernel"])
    (scale,) = (s for key, s in old["WeightNorm_0"].items() if "kernel" in key)
    np.testing.assert_array_equal(kernel.g[0], scale)


@every_linen
def test_linen_gv_leaves_serve_the_model_without_the_wrapper(name):
    old, _, params, convert, _ = linen(name)
    plain = LINEN[name][0](lambda layer: layer)
    close(applied(plain)(wnjax.fold(convert(params)), X), applied(old)(params, X))
    close(wnjax.wrap(applied(plain))(convert(params), X), applied(old)(params, X))


FORMS = ["flat", "frozen", "variables", "msgpack"]


@pytest.mark.parametrize(
    ("name", "form"),
    # Where the layer is inside the wrapper, a nested kernel would be an array and a dict.
    [(name, "nested") for name in ("compact", "lent", "stack")]
    + [(name, form) for name in ("compact", "lent", "stack", "setup", "alone") for form in FORMS],
)
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


def test_linen_takes_the_place_of_the_wrapper_in_all_collections():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))

    old, plain = flax_wrapper(Normed()), Normed()
    variables = shaken(old.init(KEY, X))
    converted = from_linen(variables)
    shapes = jax.tree.map(jnp.shape, wnjax.fold(converted))
    assert shapes == jax.tree.map(jnp.shape, plain.init(KEY, X))
    actual, expected = plain.apply(wnjax.fold(converted), X), old.apply(variables, X)
    close(actual, expected)


def test_linen_takes_boxes_that_a_file_made_dicts_of():
    _, _, params, convert, _ = linen("boxed")
    gv = convert(serialization.to_state_dict(params))["layer"]["kernel"]["value"]
    expected = nn.unbox(convert(params))["layer"]["kernel"]
    chex.assert_trees_all_equal(gv, expected)


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
    normalized_params = from_linen(params, {"Dense_1/.*": 0})
    new = Two((wnjax.linen.WeightNorm,) * 2)
    close(applied(new)(normalized_params, X), applied(old)(params, X))
    with pytest.raises(ValueError, match="feature_axes: the pattern 'Dense_2' matches no leaf"):
        from_linen(params, {"Dense_2": 0})


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3, 1])
def test_linen_epsilon(size):
    """ε makes a weight of a small v smaller than its scale says."""
    old, new, params, convert, _ = linen("compact")
    params["layer"]["kernel"] *= size
    close(applied(new)(convert(params), X), applied(old)(params, X))
    large = Compact(partial(flax_wrapper, epsilon=0.1))
    normalized_params = convert(params, epsilon=0.1)
    close(applied(new)(normalized_params, X), applied(large)(params, X))


def test_linen_neurons_of_zeros_compute_the_same_and_train():
    old, new, params, convert, _ = linen("compact")
    kernel = params["layer"]["kernel"]
    params["layer"]["kernel"] = kernel.at[:, 1].set(0)
    normalized_params = convert(params)
    close(applied(new)(normalized_params, X), applied(old)(params, X))
    grads = jax.grad(loss_of(applied(new)))(normalized_params)
    assert float(normalized_params["layer"]["kernel"].g[0, 1]) == 0
    assert float(abs(grads["layer"]["kernel"].g[0, 1])) > 0


def test_linen_without_scale_by_hand():
    """As the error says that one may."""
    old = Compact(partial(flax_wrapper, use_scale=False))
    params = shaken(old.init(KEY, X)["params"])
    with pytest.raises(ValueError, match="use_scale=False stores none"):
        from_linen(params)
    normalized_params = wnjax.weight_norm(params, {"layer/kernel": -1})
    labels = wnjax.labels(normalized_params)
    normalized_params = jax.tree.map(
        lambda label, x: jnp.ones_like(x) if label == "g" else x, labels, normalized_params
    )
    close(applied(Compact(wnjax.linen.WeightNorm))(normalized_params, X), applied(old)(params, X))


def test_linen_bfloat16():
    _, _, params, convert, _ = linen("compact", jnp.bfloat16)
    gv = convert(params)["layer"]["kernel"]
    v = params["layer"]["kernel"].astype(jnp.float32)
    scale = params["WeightNorm_0"]["layer/kernel/scale"].astype(jnp.float32)
    w = np.asarray(v) / np.linalg.norm(v, axis=0) * np.asarray(scale)
    assert (gv.g.dtype, gv.v.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(wnjax.fold(gv).astype(jnp.float32), w, rtol=2**-8)


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
