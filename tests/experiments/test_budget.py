"""Runs of limited time: how many steps they take, and that their schedules end with them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import budget, records, report, train
from experiments.config import Optimizer, Update
from experiments.interrupts import Interrupts

pytestmark = pytest.mark.usefixtures("standard_promotion")

ARGUMENTS = ["--config=configs/digits.py:plain", "--config.steps=8", "--config.steps_per_eval=2"]
ARGUMENTS += ["--config.steps_per_call=1", "--config.unroll=false", "--config.batch_size=8"]
ARGUMENTS += ["--config.seeds=1", "--config.task.widths=(4,8)", "--config.minutes=1"]


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        (13, 6),  # 3 of 13 s are gone; a round is two calls and an evaluation of 1 s each
        (14, 6),
        (11, 4),
        (1, 2),  # one round in any case
        (1000, 8),  # never more than the config says
    ],
)
def test_steps_that_fit(seconds, steps, tmp_path, monkeypatch):
    """A clock that goes on by a second whenever it is read."""
    clock = itertools.count()
    monkeypatch.setattr(budget.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(budget, "SHARE", 1.0)
    monkeypatch.setattr(train.time, "monotonic", lambda: 0.0)
    arguments = [*ARGUMENTS, f"--config.minutes={seconds / 60}", f"--workdir={tmp_path / 'run'}"]
    assert train.main(arguments) == 0
    lines = records.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(2, steps + 1, 2))
    assert records.read_about(tmp_path / "run")["length"] == steps
    assert f"after {steps} steps" in records.read_outcome(tmp_path / "run")
    assert report.main([str(tmp_path / "run"), f"--out={tmp_path / 'report'}"]) == 0
    assert "(step" not in (tmp_path / "report/table.md").read_text()


def test_a_run_that_goes_on_keeps_its_length(tmp_path, monkeypatch):
    def to_six(programs, states, seconds):
        del programs, seconds
        return states._replace(
            length=jax.device_put(np.array([6], np.int32), states.length.sharding)
        )

    monkeypatch.setattr(train, "shorten", to_six)
    monkeypatch.setattr(Interrupts, "stops_at", lambda self, step: step == 3)
    arguments = [*ARGUMENTS, f"--workdir={tmp_path}"]
    assert train.main(arguments) == 0
    assert not records.has_outcome(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(train, "shorten", None)  # nothing is timed again
    assert train.main(arguments) == 0
    assert [line["step"] for line in records.read_metrics(tmp_path)] == [2, 4, 6]


@pytest.mark.parametrize("length", [8, 12, 24])
def test_schedules_end_with_the_run(length):
    """The gradient is 1, so that an update of SGD is the learning rate."""
    optimizer = Optimizer(name=Update.SGD, learning_rate=1.0, momentum=0.0, decay_from=6)
    made = optimizer.make(12, length)
    params = jnp.zeros((), jnp.float32)
    state, rates = made.init(params), []
    for _ in range(length + 1):
        update, state = made.update(jnp.ones((), jnp.float32), state, params)
        rates.append(-float(update))
    expected = np.clip(2 * (1 - np.arange(length + 1) / length), 0, 1)
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_momentum_changes_when_the_decay_begins():
    optimizer = Optimizer(
        name=Update.ADAM, learning_rate=0.1, momentum=0.9, late_momentum=0.5, decay_from=6
    )
    made = optimizer.make(12, 4)
    params = jnp.ones((), jnp.float32)
    state, found = made.init(params), []
    for _ in range(4):
        _, state = made.update(params, state, params)
        found.append(float(state[0].hyperparams["b1"]))
    np.testing.assert_allclose(found, [0.9, 0.9, 0.5, 0.5])
