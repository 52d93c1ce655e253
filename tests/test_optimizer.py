"""`weight_normalized` against training (g, v) explicitly with the same optimizer."""

import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import wnjax
from tests import toys
from tests.accelerators import also_on_accelerators

pytestmark = pytest.mark.usefixtures("optimized")

# Few enough that no optimizer amplifies rounding. A step of RMSProp or LAMB does not shrink with
# the gradient; once it is longer than the way to the minimum, differences grow twofold a step and
# faster: from 1e-15 to 1e-3 between the steps 315 and 350 of RMSProp, and after 160 of LAMB.
STEPS = 100
AXES = {".*/kernel": 1, ".*/bias": None}


@pytest.fixture
def standard_promotion():
    """Optax itself promotes its step counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def only(label):
    """A mask of the arrays with one of the labels."""
    return lambda tree: jax.tree.map(lambda x: x == label, wnjax.labels(tree))


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.02, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adam_schedule": lambda: optax.adam(optax.cosine_decay_schedule(1e-2, STEPS)),
    "adamw_decay_of_g": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=only("g")),
    "lion": lambda: optax.lion(1e-3),
    "rmsprop": lambda: optax.rmsprop(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "clipping": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "multi_transform_inside": lambda: optax.multi_transform(
        {"g": optax.adam(1e-2), "v": optax.sgd(0.1), "other": optax.set_to_zero()}, wnjax.labels
    ),
    "multi_steps_inside": lambda: optax.MultiSteps(optax.adam(1e-2), 4).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(1e-2, 1e-3, STEPS)
    ),
}


def loss(params, x, y):
    return jnp.mean((toys.mlp(params, x) - y) ** 2)


def problem(dtype):
    keys = jax.random.split(jax.random.key(7))
    x, y = (
        jax.random.normal(k, shape, dtype)
        for k, shape in zip(keys, [(32, 3), (32, 16)], strict=True)
    )
    return toys.mlp_params(dtype), x, y


def trajectory(optimizer, params, loss, steps):
    """The parameters after some steps, in one compiled loop."""

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    return run(params)


def distance(a, b):
    """The largest difference of a leaf, relative to its largest number."""
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    wide = ((np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs)
    return max(np.abs(x - y).max() / np.abs(y).max() for x, y in wide)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", also_on_accelerators(OPTIMIZERS, ["momentum", "adam", "rmsprop"]))
def test_trajectory_is_that_of_g_and_v(name):
    params, x, y = problem(jnp.float64)
    optimizer, normalized_params = OPTIMIZERS[name](), wnjax.weight_norm(params, AXES)
    plain = trajectory(
        wnjax.weight_normalized(optimizer, AXES), params, lambda p: loss(p, x, y), STEPS
    )
    explicit = trajectory(optimizer, normalized_params, lambda p: loss(wnjax.fold(p), x, y), STEPS)
    expected = wnjax.fold(explicit)
    assert distance(expected, params) > 0.05
    assert distance(plain, expected) < 1e-12


@pytest.mark.usefixtures("x64")
def test_multi_steps_around():
    params, x, y = problem(jnp.float64)

    def every_fourth(optimizer):
        return optax.MultiSteps(optimizer, 4).gradient_transformation()

    around = every_fourth(wnjax.weight_normalized(optax.adam(1e-2), AXES))
    plain = trajectory(around, params, lambda p: loss(p, x, y), 40)
    inner = wnjax.weight_normalized(every_fourth(optax.adam(1e-2)), AXES)
    expected = trajectory(inner, params, lambda p: loss(p, x, y), 40)
    assert distance(plain, expected) < 1e-6  # optax averages the gradients in float32


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1, momentum=0.95), optax.adam(0.2), optax.lion(0.3)]
)
def test_g_crosses_zero(optimizer):
    """The target's neurons point the other way, and large steps go past 0 again and again."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (6, 5), jnp.float64)}
    normalized_params = wnjax.weight_norm(params)

    def quadratic(params):
        return jnp.sum((params["kernel"] + 0.3 * jnp.sign(target)) ** 2)

    target = params["kernel"]
    explicit, signs = normalized_params, []
    state = optimizer.init(explicit)
    wrapped = wnjax.weight_normalized(optimizer)
    plain, plain_state = params, wrapped.init(params)
    for _ in range(60):
        with jax.numpy_dtype_promotion("standard"):
            grads = jax.grad(lambda t: quadratic(wnjax.fold(t)))(explicit)
            updates, state = optimizer.update(grads, state, explicit)
            explicit = optax.apply_updates(explicit, updates)
            updates, plain_state = wrapped.update(jax.grad(quadratic)(plain), plain_state, plain)
            plain = optax.apply_updates(plain, updates)
        signs.append(np.sign(explicit["kernel"].g))
    assert (np.diff(np.stack(signs), axis=0) != 0).sum() >= 5
    assert distance(plain, wnjax.fold(explicit)) < 1e-8


@pytest.mark.accelerator
def test_a_step_to_exactly_zero_is_gone_on_from():
    params = {"kernel": jnp.array([[3.0], [4.0]])}
    optimizer = wnjax.weight_normalized(optax.sgd(1.0))
    state = optimizer.init(params)
    away = {"kernel": jnp.array([[3.0], [4.0]])}  # ⟨grad, v⟩/‖v‖ = 5 = g
    updates, state = optimizer.update(away, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["kernel"], 0)
    updates, state = optimizer.update({"kernel": jnp.array([[0.0], [2.0]])}, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], [[0], [-2]], atol=1e-6)
    chex.assert_tree_all_finite(state)


@pytest.mark.accelerator
def test_zero_neurons_train():
    params, x, y = problem(jnp.float32)
    params["second"]["kernel"] = jnp.zeros((8, 16))
    before = loss(params, x, y)
    optimizer = wnjax.weight_normalized(optax.adam(1e-2), AXES)
    trained = trajectory(optimizer, params, lambda p: loss(p, x, y), 200)
    chex.assert_tree_all_finite(trained)
    assert (jnp.abs(trained["second"]["kernel"]).max(0) > 1e-2).all()
    assert loss(trained, x, y) < 0.8 * before


@pytest.mark.parametrize("near", [1e-3, 1e-5, 1e-7])
def test_the_remainder_keeps_directions_close_to_zero(near):
    """One step takes g to almost 0, the next one back."""
    w = jax.random.normal(jax.random.key(0), (64, 4))
    norm = jnp.linalg.norm(w, axis=0, keepdims=True)
    errors = {}
    for remainder in (False, True):
        optimizer = wnjax.weight_normalized(optax.sgd(1.0), remainder=remainder)
        params = {"kernel": w}
        state = optimizer.init(params)
        grads = {"kernel": w / norm * (1 - near) * norm}
        for sign in (1, -1):
            updates, state = optimizer.update(
                jax.tree.map(lambda g, sign=sign: sign * g, grads), state, params
            )
            params = optax.apply_updates(params, updates)
        errors[remainder] = distance(params["kernel"], w)
    assert errors[True] < 1e-5
    if near == 1e-7:
        assert errors[False] > 1e-2  # so that the test can fail


@pytest.mark.usefixtures("x64")
def test_bfloat16_with_the_remainder():
    params, x, y = problem(jnp.float64)
    coarse = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    start = jax.tree.map(lambda p: p.astype(jnp.float64), coarse)

    def coarse_loss(params):
        return loss(jax.tree.map(lambda p: p.astype(jnp.float64), params), x, y)

    exact = trajectory(wnjax.weight_normalized(optax.adam(1e-3), AXES), start, coarse_loss, 200)

    def off(remainder):
        optimizer = wnjax.weight_normalized(optax.adam(1e-3), AXES, remainder=remainder)
        found = trajectory(optimizer, coarse, coarse_loss, 200)
        moved, should = (
            np.concatenate(
                [
                    (
                        np.asarray(p[k]["kernel"], np.float64) - np.asarray(start[k]["kernel"])
                    ).ravel()
                    for k in ("first", "second")
                ]
            )
            for p in (found, exact)
        )
        return np.linalg.norm(moved - should) / np.linalg.norm(should)

    assert off(None) < 0.02
    assert off(False) > 0.2  # so that the test can fail


@pytest.mark.usefixtures("standard_promotion")
def test_masks_and_groups_around():
    params, x, y = problem(jnp.float32)
    labels = {"first": "wn", "second": "plain"}
    grads = jax.grad(loss)(params, x, y)
    groups = {"wn": wnjax.weight_normalized(optax.adam(1e-2), AXES), "plain": optax.sgd(0.1)}
    around = optax.multi_transform(groups, labels)
    updates, _ = around.update(grads, around.init(params), params)
    alone = wnjax.weight_normalized(optax.adam(1e-2), AXES)
    expected, _ = alone.update(grads, alone.init(params), params)
    chex.assert_trees_all_close(updates["first"], expected["first"], rtol=1e-6)
    chex.assert_trees_all_close(
        updates["second"], jax.tree.map(lambda g: -0.1 * g, grads["second"])
    )
    axes = wnjax.infer_axes(lambda p, x: loss(p, x, y))(params, x)
    for one in (axes, None, lambda path, leaf: 1 if "kernel" in path else None):
        masked = optax.masked(
            wnjax.weight_normalized(optax.adam(1e-2), one), {"first": True, "second": False}
        )
        updates, _ = masked.update(grads, masked.init(params), params)
        chex.assert_trees_all_close(updates["first"], expected["first"], rtol=1e-6)
        chex.assert_trees_all_equal(updates["second"], grads["second"])


def test_optax_finds_its_way_in_the_state():
    params, _, _ = problem(jnp.float32)
    optimizer = wnjax.weight_normalized(optax.inject_hyperparams(optax.adam)(1e-2), AXES)
    state = optimizer.init(params)
    doubled = optax.tree_map_params(optimizer, lambda x: x + 1, state)
    ((_, mu),) = optax.tree_utils.tree_get_all_with_path(doubled, "mu")
    assert float(mu["first"]["kernel"].g[0, 0]) == 1
    length, before = (s.lengths["first"]["kernel"] for s in (doubled, state))
    np.testing.assert_allclose(length, before + 1)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "learning_rate"), 1e-2)


def whole_of_size_1(leaf, spec):
    """Specs of a (g, v) leaf or an array: axes of size 1 are not split."""
    return jax.tree.map(
        lambda x: PartitionSpec(
            *[None if n == 1 else name for n, name in zip(x.shape, spec, strict=True)]
        ),
        leaf,
    )


@pytest.mark.parametrize("remainder", [False, True])
@pytest.mark.parametrize("wrapper", ["alone", "data_initialized"])
def test_specs_of_parameters_make_those_of_the_state(wrapper, remainder):
    params, _, _ = problem(jnp.float32)
    specs = jax.tree.map(lambda p: PartitionSpec(*"xy"[-p.ndim :]), params)
    optimizer = wnjax.weight_normalized(optax.adam(1e-2), AXES, remainder=remainder)
    if wrapper == "data_initialized":
        optimizer = wnjax.data_initialized(optimizer, toys.mlp)
    state = jax.eval_shape(optimizer.init, params)
    found = optax.tree.map_params(
        optimizer,
        whole_of_size_1,
        state,
        specs,
        transform_non_params=lambda _: PartitionSpec(),
        is_leaf=lambda x: isinstance(x, wnjax.WeightNorm | optax.MaskedNode),
    )
    assert jax.tree.structure(found) == jax.tree.structure(state)
    g, v, bias = PartitionSpec(None, "y"), PartitionSpec("x", "y"), PartitionSpec("y")
    found = optax.tree.get(found, "WeightNormalizedState")
    for tree in (found.inner[0].mu, found.inner[0].nu):
        assert tree["first"] == {"kernel": wnjax.WeightNorm(g, v), "bias": bias}
    assert found.inner[0].count == PartitionSpec()
    assert found.lengths["second"] == {"kernel": g, "bias": optax.MaskedNode()}
    expected = {"kernel": v, "bias": bias} if remainder else dict.fromkeys(["kernel", "bias"])
    nothing = optax.MaskedNode()
    assert found.residuals["second"] == {k: x or nothing for k, x in expected.items()}


def test_line_searches_see_functions_of_gv_leaves():
    params, x, y = problem(jnp.float32)
    optimizer = wnjax.weight_normalized(optax.lbfgs(), AXES)
    state, values = optimizer.init(params), []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):

        @jax.jit
        def step(params, state):
            value, grads = jax.value_and_grad(loss)(params, x, y)
            updates, state = optimizer.update(
                grads, state, params, value=value, grad=grads, value_fn=lambda p: loss(p, x, y)
            )
            return optax.apply_updates(params, updates), state, value

        for _ in range(10):
            params, state, value = step(params, state)
            values.append(float(value))
    assert all(b < a for a, b in itertools.pairwise(values))
    assert values[-1] < 0.6 * values[0]


def steps_with_functions(optimizer, loss, params, extra, from_state):
    """Six steps, with `extra` of the loss as extra arguments of `update`."""
    params, state = jax.tree.map(jnp.copy, params), optimizer.init(params)
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(params, state):
        value, grads = (
            value_and_grad(params, state=state) if from_state else jax.value_and_grad(loss)(params)
        )
        updates, state = optimizer.update(grads, state, params, **extra(loss, value, grads))
        return optax.apply_updates(params, updates), state

    for _ in range(6):
        params, state = step(params, state)
    return params


def line_search_arguments(loss, value, grads):
    # As optax allows: further arguments of value_fn, under their own names.
    return {"value_fn": lambda p, times: times * loss(p) / times, "times": 2.0} | {
        "value": value,
        "grad": grads,
    }


FUNCTIONS = {  # name: (optimizer, extra arguments from the loss, its value and gradients)
    "sam": (lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)), lambda *_: {}),
    "sam_grad_fn": (
        lambda: optax.contrib.sam(
            optax.adam(1e-2), optax.sgd(0.05), opaque_mode=True, sync_period=3
        ),
        lambda loss, *_: {"grad_fn": lambda p, i: jax.grad(loss)(p)},
    ),
    "sophia": (
        lambda: optax.contrib.sophia(1e-2, update_interval=2),
        lambda loss, *_: {"obj_fn": loss},
    ),
    "lbfgs": (optax.lbfgs, line_search_arguments),
    "backtracking": (
        lambda: optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10, store_grad=True)
        ),
        line_search_arguments,
    ),
}


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize(
    ("name", "from_state"),
    [*((name, False) for name in FUNCTIONS), ("lbfgs", True), ("backtracking", True)],
)
def test_functions_of_the_parameters_against_explicit_training(name, from_state):
    """Those in extra arguments, and values and gradients that are read from the state."""
    make, extra = FUNCTIONS[name]
    params, x, y = problem(jnp.float64)

    def plain_loss(params):
        return loss(params, x, y)

    def loss_of_gv_leaves(normalized_params):
        return plain_loss(wnjax.fold(normalized_params))

    with jax.numpy_rank_promotion("allow"):
        found = steps_with_functions(
            wnjax.weight_normalized(make(), AXES), plain_loss, params, extra, from_state
        )
        normalized_params = wnjax.weight_norm(params, AXES)
        explicit = steps_with_functions(make(), loss_of_gv_leaves, normalized_params, extra, False)
    assert distance(found, params) > 0.02
    assert distance(found, wnjax.fold(explicit)) < 1e-11


@pytest.mark.usefixtures("standard_promotion")
def test_line_searches_see_neurons_of_zeros_and_the_dtype_of_the_parameters():
    params = {"kernel": jnp.zeros((3, 2), jnp.bfloat16)}
    optimizer = wnjax.weight_normalized(optax.lbfgs())

    def fn(params):
        assert params["kernel"].dtype == jnp.bfloat16
        return jnp.sum((params["kernel"].astype(jnp.float32) - 1) ** 2)

    state = optimizer.init(params)
    for _ in range(3):
        value, grads = optax.value_and_grad_from_state(fn)(params, state=state)
        updates, state = optimizer.update(
            grads, state, params, value=value, grad=grads, value_fn=fn
        )
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"].astype(jnp.float32), 1, rtol=1e-2)


def test_other_functions_are_refused():
    params, _, _ = problem(jnp.float32)
    optimizer = wnjax.weight_normalized(optax.sgd(0.1), AXES)
    with pytest.raises(TypeError, match="the extra argument 'my_fn' of update is a function"):
        optimizer.update(params, optimizer.init(params), params, my_fn=lambda p: p)


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize("around", ["alone", "chain", "masked"])
def test_schedule_free_inside(around):
    """What it evaluates is that of training (g, v) leaves, by way of `inner_params`."""
    params, x, y = problem(jnp.float64)
    schedule_free = optax.contrib.schedule_free_adamw(0.1)
    optimizer = wnjax.weight_normalized(schedule_free, AXES)
    mask = {"first": True, "second": around != "masked"}
    if around == "masked":
        optimizer = optax.masked(optimizer, mask)
    if around != "alone":
        optimizer = optax.chain(optax.zero_nans(), optimizer)

    def run(optimizer, params, loss):
        state = optimizer.init(params)

        @jax.jit
        def step(params, state):
            grads = jax.grad(loss)(params)
            grads["second"] = jax.tree.map(
                lambda g: g if mask["second"] else jnp.zeros_like(g), grads["second"]
            )
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(10):
            params, state = step(params, state)
        return params, state

    plain, state = run(optimizer, params, lambda p: loss(p, x, y))
    state = optax.tree.get(state, "WeightNormalizedState", state)
    masked = jax.tree.map(lambda keep, p: p if keep else optax.MaskedNode(), mask, plain)
    normalized_params = wnjax.inner_params(state, masked)
    found = wnjax.fold(optax.contrib.schedule_free_eval_params(state.inner, normalized_params))

    normalized_params = wnjax.weight_norm(params, AXES)
    normalized_params, state = run(
        schedule_free, normalized_params, lambda t: loss(wnjax.fold(t), x, y)
    )
    expected = wnjax.fold(optax.contrib.schedule_free_eval_params(state, normalized_params))
    parts = ["first", "second"] if mask["second"] else ["first"]
    assert distance([plain[k] for k in parts], [expected[k] for k in parts]) > 0.01
    assert distance([found[k] for k in parts], [expected[k] for k in parts]) < 1e-12


def test_inner_params_hold_what_rounding_took_and_take_lengths_from_the_state():
    params = {"kernel": jnp.array([[3.0], [4.0]], jnp.bfloat16), "bias": jnp.zeros(1)}
    optimizer = wnjax.weight_normalized(optax.sgd(1.0))
    state = optimizer.init(params)
    state = state._replace(
        lengths=state.lengths | {"kernel": jnp.array([[-10.0]])},
        residuals=state.residuals | {"kernel": jnp.array([[0.001], [0.0]])},
    )
    normalized_params = wnjax.inner_params(state, params)
    w = np.array([[3.001], [4.0]])
    assert normalized_params["kernel"].v.dtype == jnp.float32
    np.testing.assert_allclose(normalized_params["kernel"].g, [[-np.linalg.norm(w)]], rtol=1e-6)
    np.testing.assert_allclose(
        normalized_params["kernel"].v, -10 * w / np.linalg.norm(w), rtol=1e-6
    )
    np.testing.assert_array_equal(normalized_params["bias"], params["bias"])


def test_inner_params_of_shards():
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 3), jnp.float32)}
    optimizer = wnjax.weight_normalized(optax.sgd(0.1))
    state = optimizer.init(params)
    state = state._replace(lengths={"kernel": 2 * state.lengths["kernel"]})
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("x")
    state_specs = jax.tree.map(lambda _: PartitionSpec(), state)

    def run(**options):
        return jax.shard_map(
            lambda *args: wnjax.inner_params(*args, **options),
            mesh=mesh,
            in_specs=(state_specs, {"kernel": rows}),
            out_specs={"kernel": wnjax.WeightNorm(PartitionSpec(), rows)},
        )(state, params)

    found, expected = run(axis_name="x"), wnjax.inner_params(state, params)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="kernel: its fan-in axes seem to be split over 'x'"):
        run()


@pytest.mark.parametrize("name", toys.TREES)
def test_inner_params_of_every_tree_fit_the_inner_state(name):
    params = toys.TREES[name]()
    optimizer = wnjax.weight_normalized(optax.trace(0.9), {".*kernel": 1, ".*bias": None})
    state = optimizer.init(params)
    normalized_params = wnjax.inner_params(state, params)
    assert jax.tree.structure(normalized_params) == jax.tree.structure(state.inner.trace)
    chex.assert_trees_all_close(wnjax.fold(normalized_params), params, rtol=1e-6)


@pytest.mark.parametrize("edit", ["average", "half", "clip"])
def test_other_parameters_are_gone_on_with(edit):
    params, x, y = problem(jnp.float32)
    optimizer = wnjax.weight_normalized(optax.sgd(0.1), AXES)
    state = optimizer.init(params)
    grads = jax.grad(loss)(params, x, y)
    updates, state = optimizer.update(grads, state, params)
    stepped = optax.apply_updates(params, updates)
    other = {
        "average": jax.tree.map(lambda a, b: 0.5 * (a + b), params, stepped),
        "half": {"first": params["first"], "second": stepped["second"]},
        "clip": jax.tree.map(lambda p: jnp.clip(p, -0.5, 0.5), stepped),
    }[edit]
    grads = jax.grad(loss)(other, x, y)
    updates, _ = optimizer.update(grads, state, other)
    normalized_params = wnjax.weight_norm(
        other, AXES
    )  # as if v had followed w at the length it had
    lengths = {k: state.lengths[k]["kernel"] for k in normalized_params}
    normalized_params = {
        k: v | {"kernel": v["kernel"]._replace(v=v["kernel"].v / v["kernel"].g * lengths[k])}
        for k, v in normalized_params.items()
    }
    gv_leaves_grads = jax.grad(lambda t: loss(wnjax.fold(t), x, y))(normalized_params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, normalized_params, gv_leaves_grads)
    chex.assert_trees_all_close(
        optax.apply_updates(other, updates), wnjax.fold(expected), rtol=2e-5, atol=2e-6
    )


def test_state_and_compilation():
    params, x, y = problem(jnp.float32)
    optimizer = wnjax.weight_normalized(optax.sgd(0.1), AXES)
    state = optimizer.init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) == 8 + 16
    vertices = jax.tree.leaves(state, is_leaf=wnjax.is_weight_norm)
    assert not any(map(wnjax.is_weight_norm, vertices))  # no (g, v) leaves of its own

    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    given = params["first"]["kernel"]
    for _ in range(3):
        params, state = jitted(params, state)
    assert given.is_deleted()


def test_zero_updates_leave_weights_alone():
    params, x, y = problem(jnp.float32)
    optimizer = wnjax.weight_normalized(optax.set_to_zero(), AXES)
    updates, _ = optimizer.update(jax.grad(loss)(params, x, y), optimizer.init(params), params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))


def test_train_state():
    model, x = nn.Dense(4), jax.random.normal(jax.random.key(0), (32, 3))
    params = model.init(jax.random.key(1), x)["params"]
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=wnjax.weight_normalized(optax.adam(1e-2))
    )

    def loss(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - 1) ** 2)

    before = loss(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(50):
            state = state.apply_gradients(grads=jax.grad(loss)(state.params))
    assert loss(state.params) < 0.8 * before


def test_nnx_optimizer():
    model, x = toys.TwoLayers(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (32, 3))
    optimizer = nnx.Optimizer(model, wnjax.weight_normalized(optax.adam(1e-2)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):
        values = [float(step(model, optimizer)) for _ in range(60)]
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("name", toys.TREES)
def test_every_tree(name):
    params = toys.TREES[name]()
    optimizer = wnjax.weight_normalized(optax.adam(1e-2), {".*kernel": 1, ".*bias": None})
    grads = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        updates, _ = optimizer.update(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_tree_all_finite(updates)


@pytest.mark.usefixtures("x64")
def test_sharded_parameters():
    params, x, y = problem(jnp.float64)
    mesh = Mesh(jax.devices(), "i")
    spec = jax.tree.map(lambda p: PartitionSpec(*[None] * (p.ndim - 1), "i"), params)
    sharded = jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), params, spec)
    optimizer = wnjax.weight_normalized(optax.adam(1e-2), AXES)
    found = trajectory(optimizer, sharded, lambda p: loss(p, x, y), 20)
    expected = trajectory(optimizer, params, lambda p: loss(p, x, y), 20)
    assert distance(found, expected) < 1e-12
    assert not found["first"]["kernel"].sharding.is_fully_replicated


def compiled_bytes(optimizer):
    """XLA's bytes for a step in place, in those of the weight."""
    params = {"kernel": jax.ShapeDtypeStruct((2048, 2048), jnp.float32)}

    # JAX gives donated buffers to the results in their order: in another one, XLA has to copy.
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(optimizer.init, params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    return compiled.cost_analysis()["bytes accessed"] / (2048 * 2048 * 4)


def test_bytes_of_an_update():
    """Nine more than Adam: sums over w 3, over Δv 2; w beside the gradient 2; to store Δv 2."""
    assert compiled_bytes(optax.adam(1e-3)) == pytest.approx(10, rel=0.01)
    stored_twice = 0 if jax.__version_info__ < (0, 11) else 2  # Δv, before it is scaled too
    wrapped = compiled_bytes(wnjax.weight_normalized(optax.adam(1e-3)))
    assert wrapped <= 19.1 + stored_twice


def test_errors():
    params, _, _ = problem(jnp.float32)
    optimizer = wnjax.weight_normalized(optax.sgd(0.1), AXES)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="pass them"):
        optimizer.update(params, state)
    restored = serialization.to_state_dict(state)
    with pytest.raises(TypeError, match=r"a dict.*optimizer\.init\(params\) as the target"):
        optimizer.update(params, restored, params)
    with pytest.raises(TypeError, match=r"inner_params: .* got a dict"):
        wnjax.inner_params(restored, params)
    with pytest.raises(TypeError, match=r'optax.tree.get\(state, "WeightNormalizedState"\)'):
        wnjax.inner_params((state,), params)
    with pytest.raises(ValueError, match=r"\(g, v\) leaves already.*\n  first/kernel"):
        optimizer.init(wnjax.weight_norm(params, AXES))
    with pytest.raises(ValueError, match="no leaf is a weight"):
        wnjax.weight_normalized(optax.sgd(0.1)).init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="matches no leaf"):
        wnjax.weight_normalized(optax.sgd(0.1), {"nothing": 0}).init(params)
    with pytest.raises(TypeError, match="first/kernel has dtype int32"):
        optimizer.init(jax.tree.map(lambda p: p.astype(jnp.int32), params))
