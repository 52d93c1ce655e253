"""Properties of random programs: `wrap` is `fold`, and feature axes are what outputs depend on.

WNJAX_PROGRAMS=5000 asks for that many programs of each property instead of the usual number, some
with `shard_map`, and for a smaller program where one fails, which takes minutes.
"""

import os

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnjax
from tests import random_programs
from wnjax._transforms import wrap as wrapping

PARTS = 8  # for the processes that run tests
ASKED = os.environ.get("WNJAX_PROGRAMS")
MANY = int(ASKED or 200) // PARTS
PHASES = [hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if ASKED else [])]


def for_programs(strategy, part):
    """A decorator that runs a test of one program for many, no two of them alike."""

    def decorator(test):
        passed = set()

        @hypothesis.seed(part)
        @hypothesis.settings(
            max_examples=MANY,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=PHASES,
            print_blob=False,
            report_multiple_bugs=False,
        )
        @hypothesis.given(strategy)
        def run(program):
            hypothesis.assume(program.source not in passed)
            test(program)
            passed.add(program.source)

        run()
        assert len(passed) >= MANY

    return decorator


def normalized(program):
    """A tree with gains that are not ‖v‖; what `infer_axes` refuses stays plain.

    Now and then a weight gets other axes than those that were inferred, or a refused leaf some.
    """
    rng = np.random.default_rng(program.seed + 2)
    axes = wnjax.infer_axes(program.fn)(program.params, program.x)
    features = {k: a.feature_axes for k, a in axes.items() if isinstance(a, wnjax.Weight)}
    tree = dict(program.params)
    for name, v in program.params.items():
        if rng.random() < 0.1 or not features:
            features[name] = tuple(rng.permutation(v.ndim)[: rng.integers(v.ndim)].tolist())
        if name in features:
            sizes = [n if axis in features[name] else 1 for axis, n in enumerate(v.shape)]
            tree[name] = wnjax.WeightNorm(rng.uniform(0.5, 1.5, sizes), v)
    hypothesis.note(f"feature axes = {features}")
    return tree


def derivatives(fn, tree, x):
    """Value and gradient of a loss, and what they change by along a direction."""

    def total(tree, x):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(tree, x)))

    direction = jax.tree.map(jnp.cos, (tree, x))
    return jax.jvp(jax.value_and_grad(total, (0, 1)), (tree, x), direction)


@pytest.mark.usefixtures("x64")
@pytest.mark.filterwarnings("ignore:.*such as a mask")
@pytest.mark.parametrize("part", range(PARTS))
def test_wrap_is_fold(part, monkeypatch):
    """Also in first and second derivatives; for half of the programs whatever wrap would scale."""
    if part % 2:
        monkeypatch.setattr(wrapping, "scales_output", lambda *_: True)

    @for_programs(random_programs.programs(), part)
    def check(program):
        tree = normalized(program)

        @jax.jit
        def both(tree, x):
            wrapped = derivatives(wnjax.wrap(program.fn), tree, x)
            return wrapped, derivatives(lambda t, x: program.fn(wnjax.fold(t), x), tree, x)

        actual, expected = map(jax.tree.leaves, jax.device_get(both(tree, program.x)))
        scale = max(np.max(abs(y)) for y in expected)
        for found, right in zip(actual, expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=0, atol=1e-9 * scale)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("part", range(PARTS))
def test_outputs_depend_on_one_index_of_the_feature_axes(part):
    """And every fan-in axis is summed over. Half of the programs or more must have a weight."""
    weights = []

    @for_programs(random_programs.linear_programs(), part)
    def check(program):
        (w,) = program.params.values()
        (axes,) = wnjax.infer_axes(program.fn)(program.params, program.x).values()
        weights.append(isinstance(axes, wnjax.Weight))
        if not weights[-1]:
            return
        hypothesis.note(f"{axes}")
        fn = jax.jit(lambda w: jnp.ravel(program.fn({"w0": w}, program.x)))
        columns = [fn(e.reshape(w.shape)) for e in np.eye(w.size)]  # fn is linear
        depends = np.reshape(np.stack(columns, -1) != 0, (-1, *w.shape))
        features = [1 + axis for axis in axes.feature_axes]
        fan_in = sorted(set(range(1, depends.ndim)) - set(features))
        neurons = depends.any(tuple(fan_in)).reshape(len(depends), -1)
        assert set(neurons.sum(1)) in ({1}, {0, 1})
        for axis in fan_in:
            others = tuple(i for i in range(1, depends.ndim) if i != axis)
            is_summed = depends.any(others).sum(1) > 1
            if w.shape[axis - 1] > 1:
                assert np.array_equal(neurons[is_summed].any(0), neurons.any(0))

    assert np.mean(weights) >= 0.5
