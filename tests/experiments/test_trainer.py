"""The pure functions of training: calls equal single steps, seeds equal runs of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnjax
from experiments.config import VARIANTS, Config, Mesh, Optimizer, Update
from experiments.datasets import Data
from experiments.datasets.digits import digits
from experiments.networks.layers import ActivationNorm
from experiments.placement import make_mesh
from experiments.programs import Programs
from experiments.tasks.classification import Digits
from experiments.trainer import Trainer
from tests.toys import in_float64

SMALL = Config(
    task=Digits(widths=(4, 8)), steps=4, steps_per_eval=2, steps_per_call=2, batch_size=8
)


class Float64Digits(Digits):
    """The task of `SMALL`, with a loss that is not rounded to float32."""

    __slots__ = ()

    def measures(self, outputs, batch):
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"])
        return super().measures(outputs, batch) | {"loss": loss}


# For what two programs compute: they round differently, as the processor has it, and in float32 two
# steps carry that to the fourth digit.
FLOAT64 = dataclasses.replace(SMALL, task=Float64Digits(widths=(4, 8)))

pytestmark = pytest.mark.usefixtures("standard_promotion")


def on_device(examples):
    return examples and {name: jnp.asarray(x) for name, x in examples.items()}


@pytest.fixture(scope="module")
def data():
    return Data(*map(on_device, digits()))


STARTS = {}  # by config: initializers take long to compile


def begin(trainer, data, seed=0):
    same = {"task": SMALL.task, "steps_per_call": 1, "unroll": False, "batch_size": 8}
    key = repr(dataclasses.replace(trainer.config, **same))
    if key not in STARTS:
        STARTS[key] = jax.jit(trainer.init)
    return STARTS[key](jnp.int32(seed), data.train)


def begin_in_float64(trainer, data, seed=0):
    with jax.enable_x64(False):
        start = begin(trainer, data, seed)
    return in_float64(start)


def first_batch(data):
    return {name: x[:8] for name, x in data.train.items()}


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def close64(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_call_equals_single_steps(variant, data):
    changes = {**VARIANTS[variant], "ema_decay": 0.9}
    trainer = Trainer(dataclasses.replace(FLOAT64, **changes))
    state = start = begin_in_float64(trainer, data)
    train = in_float64(data.train)
    step, losses = jax.jit(trainer.step), []
    for rows in trainer.indices(state, train, 2):
        batch, before = {name: x[rows] for name, x in train.items()}, state.loss
        state = step(state, batch)
        losses.append(state.loss - before)
    with jax.transfer_guard("disallow"):
        called = jax.jit(trainer.steps)(start, train)
    floats = [x for x in jax.tree.leaves(called) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.dtype == jnp.float64 for x in floats)
    jax.tree.map(close64, called, state)
    assert called.step == 2
    assert called.failed == -1
    close64(called.loss, sum(losses))


def test_the_loss_begins_anew_after_an_evaluation(data):
    trainer = Trainer(dataclasses.replace(SMALL, steps_per_call=1))
    state, steps, losses = begin(trainer, data), jax.jit(trainer.steps), []
    for _ in range(3):
        state = steps(state, data.train)
        losses.append(float(state.loss))
    assert losses[1] > losses[0] > 0  # a sum of two
    assert losses[2] < losses[1]


def test_the_first_failure_is_a_loss_or_an_update_that_is_not_finite(data):
    trainer = Trainer(SMALL)
    start = begin(trainer, data)
    state = start._replace(step=jnp.int32(7))
    assert trainer.first_failure(state) == -1
    assert trainer.first_failure(state._replace(failed=jnp.int32(3))) == 3
    spoilt = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), start.params)
    one = {**start.params, "Dense_0": spoilt["Dense_0"]}  # the loss before it was finite
    assert trainer.first_failure(state._replace(params=one)) == 7
    assert trainer.first_failure(state._replace(params=one, failed=jnp.int32(3))) == 3
    after = jax.jit(trainer.step)(start._replace(params=one), first_batch(data))
    assert after.failed == 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("parts", "groups", "unroll"), [(1, 2, True), (2, 2, False), (8, 1, False)]
)
def test_seeds_side_by_side_equal_runs_of_their_own(parts, groups, unroll, data):
    """Spread over the eight devices, with one for each or several, or together on all."""
    config = dataclasses.replace(FLOAT64, unroll=unroll, seeds=2, mesh=Mesh(data=parts))
    few = {name: x[:44] for name, x in data.test.items()}  # five batches, and half a one
    train, few = in_float64((data.train, few))
    programs = Programs(config, Data(train, few))
    assert programs.mesh.devices.shape == (groups, parts, 1, 1)
    with jax.set_mesh(programs.mesh):
        both, _ = programs.steps(in_float64(programs.init()))
        error = programs.metrics(both)["test_error"]
    trainer = Trainer(dataclasses.replace(FLOAT64, unroll=unroll))
    for seed in (0, 1):
        alone = jax.jit(trainer.steps)(begin_in_float64(trainer, data, seed), train)
        jax.tree.map(lambda x, a, seed=seed: close64(x[seed], a), both.params, alone.params)
        sums = [jax.jit(trainer.evaluate)(alone, few, i)["error"] for i in range(6)]
        np.testing.assert_allclose(error[seed], sum(sums) / 44, atol=1e-6)


@pytest.mark.parametrize(
    ("seeds", "sizes", "groups"),
    [
        (3, (1, 1, 1), 3),
        (6, (2, 1, 1), 3),
        (6, (1, 1, 2), 3),
        (5, (3, 1, 1), 1),
        (9, (1, 1, 1), 3),
        (2, (2, 2, 1), 2),
        (1, (2, 2, 2), 1),
    ],
)
def test_seeds_are_spread_evenly_over_eight_devices(seeds, sizes, groups):
    mesh = make_mesh(
        dataclasses.replace(
            SMALL,
            seeds=seeds,
            mesh=Mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]),
            batch_size=24,
        )
    )
    assert mesh.devices.shape == (groups, *sizes)
    assert len(set(mesh.devices.flat)) == mesh.size


def test_programs_use_their_states_up_and_are_traced_once(data, monkeypatch):
    traces = []
    steps = Trainer.steps
    monkeypatch.setattr(Trainer, "steps", lambda *a: traces.append(1) or steps(*a))
    config = dataclasses.replace(SMALL, weight_norm=True, seeds=2)
    programs = Programs(config, digits())
    with jax.set_mesh(programs.mesh):
        states = programs.init()
        programs.compile(states)
        after, _ = programs.steps(states)
        assert all(x.is_deleted() for x in jax.tree.leaves((states.params, states.optimizer)))
        assert not any(x.is_deleted() for x in jax.tree.leaves((after, programs.train)))
        after, _ = programs.steps(after)
        metrics, norms = programs.metrics(after), programs.norms(after)
    assert len(traces) == 1
    assert after.step.tolist() == [4, 4]
    assert metrics["loss"].shape == metrics["test_error"].shape == (2,)
    assert set(norms) == {"Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel"}


@pytest.mark.usefixtures("optimized")
def test_weight_norm_starts_at_the_plain_network_and_trains_g(data):
    plain, normalized = Trainer(SMALL), Trainer(dataclasses.replace(SMALL, weight_norm=True))
    start, wn_start = (
        jax.jit(trainer.init)(jnp.int32(0), data.train) for trainer in (plain, normalized)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        wnjax.fold(wn_start.params),
        start.params,
    )
    after = jax.jit(normalized.steps)(wn_start, data.train)
    for path, norms in wnjax.norms(after.params).items():
        assert (norms["g"] != wnjax.norms(wn_start.params)[path]["g"]).any(), path


def test_the_scale_of_v_at_the_start_changes_no_weight(data):
    unscaled, scaled = (
        begin(Trainer(dataclasses.replace(SMALL, weight_norm=True, v_std=std)), data).params
        for std in (0.0, 0.05)
    )
    jax.tree.map(close, wnjax.fold(unscaled), wnjax.fold(scaled))
    for layer in ("Conv_1", "Dense_0"):
        v = scaled[layer]["kernel"].v
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(v**2)), 0.05, rtol=1e-5)


def test_initialization_from_data_for_both_parameterizations(data):
    changes = {"init_examples": 200}
    plain = Trainer(dataclasses.replace(SMALL, **changes))
    normalized = Trainer(dataclasses.replace(SMALL, weight_norm=True, **changes))
    weights, nodes = (begin(trainer, data).params for trainer in (plain, normalized))
    jax.tree.map(close, weights, wnjax.fold(nodes))
    without = begin(Trainer(SMALL), data).params
    assert (weights["Conv_0"]["bias"] != without["Conv_0"]["bias"]).all()


def test_batch_norm_keeps_running_statistics(data):
    trainer = Trainer(dataclasses.replace(SMALL, norm=ActivationNorm.BATCH))
    start = begin(trainer, data)
    after = jax.jit(trainer.steps)(start, data.train)
    mean = [s.statistics["batch_stats"]["BatchNorm_0"]["mean"] for s in (start, after)]
    assert (mean[0] != mean[1]).all()


def test_the_moving_average_is_evaluated(data):
    trainer = Trainer(dataclasses.replace(SMALL, ema_decay=0.75, steps_per_call=1))
    state, seen = begin(trainer, data), []
    steps = jax.jit(trainer.steps)
    for _ in range(3):
        state = steps(state, data.train)
        seen.append(state.params["Dense_0"]["kernel"])
    weights = np.array([0.75**2, 0.75, 1]) * 0.25 / (1 - 0.75**3)
    expected = sum(weight * one for weight, one in zip(weights, seen, strict=True))
    found = trainer.weights(state)["Dense_0"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_last_batch_of_the_test_set_counts_as_what_it_is(data):
    trainer = Trainer(dataclasses.replace(SMALL, batch_size=100))
    state = begin(trainer, data)
    sums = [trainer.evaluate(state, data.test, jnp.int32(i))["error"] for i in range(4)]
    logits, _ = trainer.forward(
        state.params, state.statistics, data.test, jax.random.key(0), train=False
    )
    wrong = logits.argmax(-1) != data.test["labels"]
    assert sum(sums) == wrong.sum()
    assert 0 < wrong.sum() < 360


@pytest.mark.parametrize("weight_norm", [False, True])
def test_norms_and_effective_steps(weight_norm, data):
    """By SGD without momentum the step of v is the learning rate times its gradient."""
    optimizer = Optimizer(name=Update.SGD, learning_rate=0.5, momentum=0.0)
    changes = {"weight_norm": weight_norm, "optimizer": optimizer}
    trainer = Trainer(dataclasses.replace(SMALL, steps_per_call=1, **changes))
    state = begin(trainer, data)
    norms = jax.jit(trainer.norms)(state, data.train)["Conv_1/kernel"]
    after = jax.jit(trainer.steps)(state, data.train)

    def v(state):
        leaf = state.params["Conv_1"]["kernel"]
        return np.asarray(leaf.v if weight_norm else leaf).reshape(-1, 8)

    lengths = np.linalg.norm(v(state), axis=0)
    turned = np.linalg.norm(v(after) - v(state), axis=0) / lengths
    np.testing.assert_allclose(norms["v"], lengths.mean(), rtol=1e-5)
    np.testing.assert_allclose(norms["step"], turned.mean(), rtol=1e-3)
    assert ("g" in norms) == weight_norm


def test_the_first_loss_that_is_not_finite_is_noted(data):
    optimizer = Optimizer(learning_rate=1e30)
    trainer = Trainer(dataclasses.replace(SMALL, optimizer=optimizer, steps_per_call=1))
    state, steps = begin(trainer, data), jax.jit(trainer.steps)
    values = []
    for _ in range(5):
        state = steps(state, data.train)
        values.append(int(state.failed))
    first = next(value for value in values if value >= 0)
    assert values[: first - 1] == [-1] * (first - 1)
    assert set(values[first - 1 :]) == {first}


def test_bfloat16_computes_in_it_and_keeps_float32(data):
    trainer = Trainer(dataclasses.replace(SMALL, weight_norm=True, bfloat16=True))
    state = begin(trainer, data)
    key = jax.random.key(0)
    few = {name: x[:2] for name, x in data.train.items()}
    forward = wnjax.wrap(trainer.forward)
    logits, _ = forward(state.params, state.statistics, few, key, train=True)
    assert logits.dtype == jnp.bfloat16
    after = jax.jit(trainer.steps)(state, data.train)
    leaves = jax.tree.leaves((after.params, after.loss))
    assert {x.dtype for x in leaves} == {jnp.dtype(jnp.float32)}
