"""The first step initializes, the others are the optimizer's."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import wnjax
from tests import toys
from tests.test_sharding import JITS, everywhere, spread

AXES = {".*/kernel": 1, ".*/bias": None}


def loss(params, batch):
    return jnp.mean((toys.mlp(params, batch) - 1) ** 2)


# In float64, where what the steps make of rounding stays far below it.
assert_close = partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-12)
BATCH = 2 + jax.random.normal(jax.random.key(3), (200, 3))

OPTIMIZERS = {  # name: (optimizer, whether its parameters have (g, v) leaves)
    "plain": (optax.adam(1e-2), False),
    "weight_normalized": (wnjax.weight_normalized(optax.adam(1e-2), AXES), False),
    "normalized": (optax.adam(1e-2), True),
    "chain": (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)), True),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("jit", [False, True])
def test_first_step_initializes_and_the_others_are_the_optimizers(name, jit):
    inner, has_gv_leaves = OPTIMIZERS[name]
    params, examples = toys.in_float64((toys.mlp_params(), BATCH))
    start = wnjax.weight_norm(params, AXES) if has_gv_leaves else params
    optimizer = wnjax.data_initialized(inner, toys.mlp)

    def step(params, state, batch):
        grads = jax.grad(lambda p: loss(wnjax.fold(p), batch))(params)
        updates, state = optimizer.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    def expected_step(params, state, batch):
        grads = jax.grad(lambda p: loss(wnjax.fold(p), batch))(params)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    if jit:
        chex.clear_trace_counter()
        step = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=1)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(start)
        before = jax.tree.map(jnp.copy, state.inner)
        found, state = step(start, state, examples)
        initialized = wnjax.data_init(toys.mlp)(start, examples)
        assert_close(found, initialized)
        chex.assert_trees_all_equal(state.inner, before)
        y = toys.mlp(wnjax.fold(found), examples)
        assert float(jnp.abs(y.mean(0)).max()) < 1e-4
        assert float(jnp.abs(y.std(0) - 1).max()) < 1e-3
        expected, expected_state = found, before
        for i in range(3):
            batch = examples[i * 50 : i * 50 + 100]
            if i < 2:  # of one shape, so that nothing is compiled again
                found, state = step(found, state, jnp.concatenate([batch, batch]))
                expected, expected_state = expected_step(
                    expected, expected_state, jnp.concatenate([batch, batch])
                )
    assert_close(found, expected)


def test_without_a_batch():
    params = toys.mlp_params()
    optimizer = wnjax.data_initialized(optax.sgd(0.1), toys.mlp)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"pass batch=\.\.\. to update"):
        optimizer.update(params, state, params)
    with pytest.raises(ValueError, match=r"pass batch=\.\.\. to update"):
        jax.jit(optimizer.update)(params, state, params)
    with pytest.raises(ValueError, match="pass them"):
        optimizer.update(params, state, batch=BATCH)
    _, state = optimizer.update(params, state, params, batch=BATCH)
    updates, _ = optimizer.update(params, state, params)  # known to be initialized
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -0.1 * g, params))


@pytest.mark.parametrize("jit", [False, True])
def test_trained_parameters_are_not_initialized_again(jit):
    params = toys.mlp_params()
    optimizer = wnjax.data_initialized(optax.sgd(0.1), toys.mlp, initialized=True)
    update = jax.jit(optimizer.update) if jit else optimizer.update
    for extra in ({"batch": BATCH}, {}):  # it needs no batch
        updates, state = update(params, optimizer.init(params), params, **extra)
        chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -0.1 * g, params))
        assert state.initialized


def test_what_comes_after_it_in_a_chain_scales_the_initialization():
    """As the documentation says: it must be last. It cannot see what comes after."""
    params = toys.mlp_params()

    def deviation(*transforms):
        optimizer = optax.chain(*transforms)
        updates, _ = optimizer.update(params, optimizer.init(params), params, batch=BATCH)
        std = toys.mlp(optax.apply_updates(params, updates), BATCH).std(0)
        return float(jnp.abs(std - 1).max())

    initialized = wnjax.data_initialized(optax.sgd(0.1), toys.mlp)
    assert deviation(optax.clip_by_global_norm(1.0), initialized) < 1e-3
    assert deviation(initialized, optax.clip_by_global_norm(1.0)) > 0.1


def test_train_states_error_names_the_way_that_works():
    model = nn.Dense(4)
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), BATCH)["params"],
        tx=wnjax.data_initialized(optax.sgd(0.1), lambda p, x: model.apply({"params": p}, x)),
    )
    with pytest.raises(
        ValueError,
        match=r"TrainState does not pass it on: write state\.tx\.update\(grads, state\.opt_state, "
        r"state\.params, batch=\.\.\.\) and optax\.apply_updates",
    ):
        state.apply_gradients(grads=state.params, batch=BATCH)
    updates, opt_state = state.tx.update(state.params, state.opt_state, state.params, batch=BATCH)
    state = state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    np.testing.assert_allclose(state.apply_fn({"params": state.params}, BATCH).std(0), 1, rtol=1e-3)
    state.apply_gradients(grads=state.params)  # known to be initialized


def test_a_state_restored_without_a_target_is_refused():
    params = toys.mlp_params()
    optimizer = wnjax.data_initialized(optax.sgd(0.1), toys.mlp)
    restored = serialization.to_state_dict(optimizer.init(params))
    with pytest.raises(TypeError, match=r"a DataInitializedState, got a dict.*restored without"):
        optimizer.update(params, restored, params, batch=BATCH)


def test_options_and_extra_arguments_are_passed_on():
    seen = []

    def remember(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), remember)
    optimizer = wnjax.data_initialized(inner, toys.mlp, std={"second/kernel": 0.25})
    params = toys.mlp_params()
    updates, state = optimizer.update(
        params, optimizer.init(params), params, batch=BATCH, value=jnp.ones(())
    )
    np.testing.assert_allclose(
        toys.mlp(optax.apply_updates(params, updates), BATCH).std(0), 0.25, rtol=1e-3
    )
    optimizer.update(params, state, params, value=3.0)
    assert all(extra.keys() == {"value"} for extra in seen)
    assert seen[-1]["value"] == 3.0


def two_steps(optimizer, params, *batches):
    """The initialization, and a step of the optimizer, whose gradients are a function of params."""
    with jax.numpy_dtype_promotion("standard"):  # for optax
        state = optimizer.init(params)
        for batch in batches:
            grads = jax.tree.map(jnp.sin, params)
            updates, state = optimizer.update(grads, state, params, batch=batch)
            params = optax.apply_updates(params, updates)
    return params


@everywhere
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["weight_normalized", "normalized"])
@pytest.mark.parametrize("initialized", ["data_init", "data_initialized"])
def test_devices_with_a_part_of_the_batch_agree_with_the_whole(how, name, initialized):
    inner, has_gv_leaves = OPTIMIZERS[name]
    params, examples = toys.in_float64((toys.mlp_params(), BATCH))
    params = wnjax.weight_norm(params, AXES) if has_gv_leaves else params
    batches = (examples, examples[::-1]) if initialized == "data_initialized" else (examples,)

    def run(**options):
        if initialized == "data_init":
            return wnjax.data_init(toys.mlp, **options)
        optimizer = wnjax.data_initialized(inner, toys.mlp, **options)
        return lambda params, *batches: two_steps(optimizer, params, *batches)

    fn = run() if how in JITS else run(axis_name="data")
    found = spread(how, fn, (jax.P(), *[jax.P("data")] * len(batches)), params, *batches)
    assert_close(found, jax.jit(run())(params, *batches))


def test_split_fan_in_axes_are_refused():
    """Its axis_name is that of the batch, and the sum over devices comes after the moments."""
    normalized_params = wnjax.weight_norm({"kernel": BATCH[:8]}, axes={"kernel": -1})

    def fn(params, x):
        return jax.lax.psum(x @ params["kernel"], "x")

    specs = ({"kernel": wnjax.WeightNorm(g=jax.P(), v=jax.P("x"))}, jax.P(None, "x"))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    init = jax.shard_map(wnjax.data_init(fn), mesh=mesh, in_specs=specs, out_specs=None)
    with pytest.raises(ValueError, match=r"^kernel: its fan-in axes seem to be split over 'x'"):
        init(normalized_params, jnp.ones((200, 8)))
