"""The trainer: chunks equal single steps, seeds equal runs of their own, runs end in a record."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnjax
from experiments import records
from experiments.config import Config, Norm, parse
from experiments.data import Split, batch_indices, digits
from experiments.train import Trainer, compile_chunk, main
from tests.experiments.test_config import CASES

SMALL = Config(norm=Norm.PLAIN, widths=(4, 8), steps=4, steps_per_chunk=2, batch_size=8, seeds=2)
TINY = ["--config.widths=(4,8)", "--config.steps=4", "--config.steps_per_chunk=2"]

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion():
    """Optax and flax promote dtypes in training."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def begin(trainer, key, data):
    return jax.jit(trainer.init)(key, data.train.images)


@pytest.mark.parametrize("norm", Norm)
def test_a_chunk_equals_single_steps(norm):
    trainer, data = Trainer(dataclasses.replace(SMALL, norm=norm)), digits()
    state = start = begin(trainer, jax.random.key(0), data)
    step = jax.jit(trainer.step)
    losses = []
    for rows in batch_indices(state.key, state.step, 2, 8, 1437):
        state, loss = step(state, Split(*(x[rows] for x in data.train)))
        losses.append(loss)

    with jax.transfer_guard("disallow"):
        chunked, metrics = jax.jit(trainer.chunk)(start, data)
    np.testing.assert_allclose(metrics["loss"], jnp.mean(jnp.stack(losses)), rtol=1e-5)
    error = jax.jit(trainer.error)(state, data.test)
    np.testing.assert_allclose(metrics["test_error"], error, atol=2 / 360)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (chunked.params, chunked.statistics),
        (state.params, state.statistics),
    )
    assert chunked.step == 2


@pytest.mark.parametrize("unroll", [False, True])
def test_seeds_side_by_side_equal_runs_of_their_own(unroll):
    trainer, data = Trainer(dataclasses.replace(SMALL, unroll=unroll)), digits()
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    alone = [begin(trainer, key, data) for key in keys]
    both, _ = jax.jit(jax.vmap(trainer.chunk, in_axes=(0, None)))(
        jax.tree.map(lambda *states: jnp.stack(states), *alone), data
    )
    second, _ = jax.jit(trainer.chunk)(alone[1], data)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-6),
        both.params,
        second.params,
    )


def test_a_chunk_uses_its_states_up():
    trainer, data = Trainer(dataclasses.replace(SMALL, norm=Norm.WEIGHT_NORM)), digits()
    states = jax.tree.map(lambda x: x[None], begin(trainer, jax.random.key(0), data))
    after, _ = compile_chunk(trainer, states, data)(states, data)
    assert all(x.is_deleted() for x in jax.tree.leaves((states.params, states.optimizer)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((after, data)))


def test_weight_norm_starts_at_the_plain_network_and_trains_g():
    data = digits()
    plain, normalized = (
        Trainer(dataclasses.replace(SMALL, norm=norm)) for norm in (Norm.PLAIN, Norm.WEIGHT_NORM)
    )
    start, wn_start = (begin(t, jax.random.key(0), data) for t in (plain, normalized))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        wnjax.fold(wn_start.params),
        start.params,
    )
    assert set(wnjax.norms(wn_start.params)) == {"Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel"}
    after, _ = jax.jit(normalized.chunk)(wn_start, data)
    for path, norms in wnjax.norms(after.params).items():
        assert (norms["g"] != wnjax.norms(wn_start.params)[path]["g"]).any(), path


def test_batch_norm_keeps_running_statistics():
    data, trainer = digits(), Trainer(dataclasses.replace(SMALL, norm=Norm.BATCH_NORM))
    start = begin(trainer, jax.random.key(0), data)
    after, _ = jax.jit(trainer.chunk)(start, data)
    mean = [s.statistics["batch_stats"]["BatchNorm_0"]["mean"] for s in (start, after)]
    assert (mean[0] != mean[1]).all()


@pytest.mark.parametrize("case", CASES)
def test_every_config_runs_and_leaves_a_record(case, tmp_path, capsys):
    assert main([case, *TINY, f"--workdir={tmp_path}"]) == 0
    config = parse([case, *TINY]).config
    assert capsys.readouterr().out.startswith(f"{config.norm.value}: test error ")
    lines = records.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert np.isfinite(line["loss"]).all()
        assert len(line["test_error"]) == config.seeds
        assert line["seconds_per_step"] > 0


def test_the_command_line_learns_digits(tmp_path):
    """As a user runs it: another process, the whole way to a low test error, then once more."""
    command = [
        *(sys.executable, "-m", "experiments.train", "--config=configs/digits.py:weight_norm"),
        *("--config.steps=120", "--config.seeds=1", f"--workdir={tmp_path}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert (
        "Conv_2/kernel   (3, 3, 32, 32)  float32  32 neurons, norm over axes (0, 1, 2)"
        in done.stderr
    )
    assert "step 120 of 120: loss" in done.stderr  # a line per chunk: this is no terminal
    assert f"% after 120 steps (seeds: 1); records in {tmp_path}" in done.stdout
    assert records.read_metrics(tmp_path)[-1]["test_error"][0] < 0.12

    refused = subprocess.run(
        [*command, "--config.seed=1"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "holds a different run:\n  config.seed: 0 there, 1 here" in refused.stderr


@pytest.mark.parametrize("argument", ["--help", "--config=configs/digits.py:plian"])
def test_help_and_errors(argument, capsys):
    status = main([argument])
    out, err = capsys.readouterr()
    if argument == "--help":
        assert status == 0
        assert "\n  steps_per_chunk: steps compiled into one program" in out
    else:
        assert status == 2
        assert err.startswith("error: --config=configs/digits.py:plian: unknown variant 'plian'")


def test_a_batch_larger_than_the_data(tmp_path, capsys):
    arguments = [CASES[0], "--config.batch_size=1438", f"--workdir={tmp_path / 'run'}"]
    assert main(arguments) == 2
    assert "batch_size must be at most 1437, the number of training" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_compilation_for_all_chunks(tmp_path, monkeypatch):
    traces = []
    chunk = Trainer.chunk
    monkeypatch.setattr(Trainer, "chunk", lambda *a: traces.append(1) or chunk(*a))
    assert main(["--config=configs/digits.py:plain", *TINY, f"--workdir={tmp_path}"]) == 0
    assert len(traces) == 1
    assert len(records.read_metrics(tmp_path)) == 2
