"""`from_nnx` against `flax.nnx.WeightNorm`: outputs, and an optimizer's step."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as orbax

import wnjax
from tests.test_convert import RATE, X, close, shaken
from wnjax.convert import from_nnx


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
    assert new.layers[0].kernel.g.shape == (1, 1)
    assert wnjax.is_weight_norm(new.mix.query.kernel)
    assert type(new.mix.key.kernel) is nnx.Param
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
    before = new.first.kernel.g[...]
    nnx_step(new, nnx.Param)
    assert (new.first.kernel.g[...] != before).all()


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
        assert type(converted["first"]["layer_instance"]["kernel"]["g"]) is nnx.Param
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
    assert new.kernel.g.shape == (4, 1, 3)
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
            kernel = spec["layer_instance"]["kernel"]
            assert kernel["g"].get_value() == jax.P(None, "out")
            assert kernel["v"].get_value() == jax.P("in", "out")


def test_nnx_without_scale_has_gains_of_one():
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    old = nnx.WeightNorm(layer, use_scale=False, rngs=nnx.Rngs(0))
    new = from_nnx(old)
    np.testing.assert_array_equal(new.kernel.g[...], np.ones((1, 4)))
    close(new(X), old(X))


def test_nnx_neurons_of_zeros_compute_the_same_and_train():
    init = nnx.initializers.zeros
    old = nnx.WeightNorm(nnx.Linear(3, 4, kernel_init=init, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    new = from_nnx(old)
    close(new(X), old(X))
    grads = nnx.grad(lambda layer: layer(X).sum())(new)
    assert (grads["layer_instance"]["kernel"]["g"][...] != 0).all()


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
