"""What an accelerator will run, rehearsed with small networks; and how large the real ones are."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnjax
from experiments import items
from experiments.items import bandwidth, cost
from experiments.networks.layers import ActivationNorm
from experiments.networks.resnet import ResNet
from experiments.peers import IMPLEMENTATIONS, Implementation, Training
from experiments.problems import variables

REHEARSAL = items.Options(seconds=60, rehearsal=True, data_dir=None)
STEPS = [name for name, what in cost.CELLS.items() if isinstance(what, cost.Steps)]

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def fast(monkeypatch):
    """Implementations that compile within moments."""

    def build(problem):
        def step(state, inputs, labels):
            return state + inputs.mean(), state

        return Training(step, jnp.float32(0), problem.inputs, problem.labels)

    def fail(problem):
        raise MemoryError("no memory\nfor this one")

    def overflow(problem):
        return build(problem)._replace(state=jnp.float32(jnp.inf))

    for name, one in {
        "plain": build,
        "linen": build,
        "naive": fail,
        "batch-norm": overflow,
    }.items():
        monkeypatch.setitem(IMPLEMENTATIONS, name, Implementation(name, one))

    def run(*names, seconds=60.0, rehearsal=True):
        what = cost.CELLS["cost_mlp"]
        what = what._replace(implementations=names, network=what.rehearsal)
        monkeypatch.setattr(cost, "CELLS", {"cost_mlp": what})
        return cost.run("cost_mlp", items.Options(seconds, rehearsal, None))

    return run


@pytest.mark.parametrize("name", STEPS)
def test_a_rehearsal_runs_every_implementation(name):
    result = cost.run(name, REHEARSAL)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    what, (first, *_) = cost.CELLS[name], result["cells"]
    assert [cell["batch"] for cell in result["cells"]] == list(what.rehearsal.sizes)
    assert not first["errors"]
    assert set(first["measurements"]) == set(what.implementations)
    for one in first["measurements"].values():
        assert np.isfinite(one["ratios"]["step"]).all()
        assert min(*one["seconds"], one["bytes_accessed"], one["temporary_bytes"]) > 0
    assert first["measurements"]["naive"]["ratios"]["bytes"] > 1
    assert all(f"\n{name} " in cost.table(result) for name in what.implementations)


def test_a_rehearsal_of_the_bandwidth():
    result = cost.run("cost_bandwidth", REHEARSAL)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    v, gains = 64 * 64, 4 * 64
    for array, dtype, size in zip(result["arrays"], bandwidth.DTYPES, (4, 2), strict=True):
        assert array["dtype"] == dtype
        assert {name: one["minimum_bytes"] for name, one in array["passes"].items()} == {
            "copy": 2 * size * v,
            "fold": 2 * size * v + gains,
            "vjp of fold": 3 * size * v + 2 * gains,
        }
        assert array["passes"]["copy"]["share_of_copy"] == [1, 1, 1]
    text = cost.table(result)
    assert all(f"v of 64 x 64, {dtype} (3 rounds)" in text for dtype in bandwidth.DTYPES)
    assert "\nvjp of fold " in text


def test_the_gradients_whose_bandwidth_is_measured():
    node = wnjax.WeightNorm(jnp.array([[2.0, 0.5]]), jnp.array([[3.0, 0.0], [4.0, 1.0]]))
    (found,) = bandwidth.gradients(node, jnp.array([[1.0, 3.0], [0.0, 1.0]]))
    np.testing.assert_allclose(found.g, [[3 / 5, 1]], rtol=1e-6)
    # g/‖v‖ times the part of the gradient that is orthogonal to v.
    np.testing.assert_allclose(found.v, [[2 / 5 * 16 / 25, 1.5], [-2 / 5 * 12 / 25, 0]], rtol=1e-6)


def test_batch_sizes_are_left_out_where_time_is_short(fast):
    result = fast("plain", seconds=1e-9)
    assert [cell["batch"] for cell in result["cells"]] == [2]
    assert result["left_out"] == [4]
    assert cost.table(result).endswith("\nleft out, for want of time: 4")
    assert fast("plain")["left_out"] == []
    bandwidths = bandwidth.measure(bandwidth.Bandwidth(), REHEARSAL._replace(seconds=1e-9))
    assert bandwidths["left_out"] == ["bfloat16"]


def test_those_that_fail_are_recorded_and_the_others_go_on(fast):
    result = fast("plain", "naive", "batch-norm", "linen")
    for cell in result["cells"]:
        assert set(cell["measurements"]) == {"plain", "linen"}
        assert cell["errors"] == {
            "naive": "MemoryError: no memory",
            "batch-norm": "FloatingPointError: the loss is inf",
        }
    assert "\nnaive: MemoryError: no memory\n" in cost.table(result)


@pytest.mark.parametrize("rehearsal", [True, False])
@pytest.mark.parametrize("names", [("naive", "linen"), ("naive",)])
def test_without_the_plain_network_there_are_no_ratios(names, rehearsal, fast, monkeypatch):
    monkeypatch.setattr(cost, "ROUND_SECONDS", 0.3)
    monkeypatch.setattr(cost, "LEAST_SECONDS", 0.3)
    result = fast(*names, rehearsal=rehearsal)
    for cell in result["cells"]:
        assert [one["ratios"] for one in cell["measurements"].values()] == [None] * (len(names) - 1)
    assert "naive: MemoryError: no memory" in cost.table(result)


def test_the_setting_of_a_rehearsal_is_undone():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        cost.run("cost_bandwidth", REHEARSAL)
        assert jax.config.read("jax_disable_most_optimizations") is False
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize(
    ("name", "fields", "parameters", "outputs"),
    [
        # As many as with PyTorch's ResNet-50.
        ("cost_resnet50", {"norm": ActivationNorm.BATCH}, 25_557_032, (2, 1000)),
        # A bias in the place of the scale and the bias of a normalization.
        ("cost_resnet50", {}, 25_557_032 - 26_560, (2, 1000)),
        (
            "cost_gpt2",
            {},
            # GPT-2's 124,439,808, whose head is its table; and the head with its bias.
            124_439_808 + 50257 * 768 + 50257,
            (2, 1024, 50257),
        ),
    ],
)
def test_networks_are_of_the_size_that_is_claimed(name, fields, parameters, outputs):
    network = cost.CELLS[name].network
    inputs, labels = jax.eval_shape(lambda: network.batch(2))
    logits, found = jax.eval_shape(
        lambda x: network.model.clone(**fields).init_with_output(jax.random.key(0), x, train=True),
        inputs,
    )
    assert (logits.shape, labels.shape) == (outputs, outputs[:-1])
    assert sum(x.size for x in jax.tree.leaves(found["params"])) == parameters


def test_a_plain_residual_network_is_finite():
    """All of its blocks, whose outputs grow where nothing normalizes them."""
    model, x = ResNet(width=4, classes=7, dtype=jnp.bfloat16), jnp.ones((1, 32, 32, 3), jnp.float32)
    logits = jax.jit(lambda params: model.apply(params, x, train=True))(variables(model, x))
    assert np.isfinite(np.asarray(logits, np.float32)).all()
    assert np.abs(logits).max() > 0
