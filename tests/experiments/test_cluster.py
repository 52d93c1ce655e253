"""Two processes of four virtual devices each: what one has, and how they end together."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments import launch, records, report
from experiments.checkpoints import Checkpoints
from experiments.cluster import ClusterError, join
from experiments.command_line import ConfigError
from experiments.config import Cluster, Config, Mesh, Start
from experiments.locks import hold
from experiments.placement import claim_devices
from experiments.tasks.classification import Digits
from tests.experiments.losses import CONFIGS, FORMS, losses
from tests.experiments.processes import run_two
from tests.experiments.test_train import assert_same_outcome

TRAIN = "tests.experiments.processes"
ARGUMENTS = (
    *("--config=configs/digits.py:plain", "--config.seeds=1", "--config.task.widths=(4,)"),
    *("--config.batch_size=8", "--config.test_examples=16", "--config.mesh.data=8"),
    *("--config.steps_per_eval=2", "--config.steps_per_call=1", "--config.evals_per_save=1"),
    *("--config.cluster.start=on", "--config.cluster.devices=8", "--config.cluster.timeout=5"),
)

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled programs, for the processes of one worker."""
    return tmp_path_factory.mktemp("cluster_cache")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_one_device(name, form, cache):
    """Fifty steps over all three axes of a mesh, with initialization from the global batch."""
    first, second = run_two("tests.experiments.losses", [name, form], cache=cache)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    found = json.loads(first.stdout.splitlines()[-1])
    np.testing.assert_allclose(found, losses(name, Mesh(), form)[0], rtol=1e-5)


def test_one_of_two_is_killed_and_both_go_on_exactly(cache, tmp_path, capfd, monkeypatch):
    """The reference is a whole run, launched as a user does."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as below: bits depend on it
    steps = (*ARGUMENTS, "--config.steps=8")
    whole, run = (f"--workdir={tmp_path / name}" for name in ("whole", "run"))
    assert launch.main([*steps, whole, "--on=local:2x4", "--run"]) == 0
    out = [line for line in capfd.readouterr().out.splitlines() if "test_error" in line]
    assert len(out) == 1  # of the first process alone
    survivor, killed = run_two(TRAIN, [*steps, run], cache=cache, end_at="SIGKILL:5")
    assert killed.returncode == -9
    # Of itself, or by JAX when it hears no more of the other.
    assert survivor.returncode in (75, -6), survivor.stderr
    assert "another process has ended" in survivor.stderr or "task died" in survivor.stderr
    for done in run_two(TRAIN, [*steps, run], cache=cache):
        assert done.returncode == 0, done.stderr
    assert_same_outcome(steps, tmp_path / "whole", tmp_path / "run")
    assert records.read_about(tmp_path / "run")["devices"] == [
        {"step": 0, "mesh": {"seeds": 1, "data": 8, "fsdp": 1, "tensor": 1}, "processes": 2}
    ]
    assert report.main([str(tmp_path / "run"), f"--out={tmp_path / 'report'}"]) == 0
    assert "; 8 devices of 2 processes; " in (tmp_path / "report/table.md").read_text()


def test_a_run_of_limited_time_has_one_length(cache, tmp_path, monkeypatch):
    """Each process has a seed of its own, and each times its own calls."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    arguments = (*ARGUMENTS, "--config.seeds=2", "--config.mesh.data=4", "--config.steps=8")
    arguments += ("--config.minutes=0.001", f"--workdir={tmp_path}")
    for done in run_two(TRAIN, arguments, cache=cache):
        assert done.returncode == 0, done.stderr
    assert records.read_about(tmp_path)["length"] == 2  # one round, however slow the machine is
    assert [line["step"] for line in records.read_metrics(tmp_path)] == [2]


def test_a_signal_to_one_of_two_stops_both_at_one_step(cache, tmp_path):
    """In time: the run would take hours."""
    steps = (*ARGUMENTS, "--config.steps=1000000", f"--workdir={tmp_path}")
    first, second = run_two(TRAIN, steps, cache=cache, end_at="SIGTERM:3")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "stopped; the same command goes on" in first.stdout
    with Checkpoints(tmp_path) as checkpoints:  # of both: otherwise they would wait for ever
        assert checkpoints.latest() >= 3


def test_processes_that_differ_stop_before_anything_is_written(cache, tmp_path):
    steps = (*ARGUMENTS, "--config.steps=8", f"--workdir={tmp_path / 'run'}")
    for done in run_two(TRAIN, steps, (*steps, "--config.seed=1"), cache=cache):
        assert done.returncode == 2
        text = "error: config.seed: process 1 has another value than process 0. All must have"
        assert text in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_one_stops_all(cache, tmp_path):
    (tmp_path / "file").write_text("")
    steps = (*ARGUMENTS, "--config.steps=8")
    workdirs = (f"--workdir={tmp_path / name}" for name in ("run", "file"))
    first, second = run_two(TRAIN, *([*steps, one] for one in workdirs), cache=cache)
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.endswith("error: process 1 failed; what it printed says why\n")
    assert "file is not seen by all processes: give a --workdir that all" in second.stderr


def test_a_directory_that_is_in_use_is_refused_by_all(cache, tmp_path):
    """Of two processes of one run, the first one alone holds the lock."""
    steps = (*ARGUMENTS, "--config.steps=8", f"--workdir={tmp_path}")
    with hold(tmp_path):
        first, second = run_two(TRAIN, steps, cache=cache)
    assert (first.returncode, second.returncode) == (2, 2)
    assert f"error: {tmp_path} is in use by process {os.getpid()} on " in first.stderr
    assert second.stderr.endswith("error: process 0 failed; what it printed says why\n")
    assert [file.name for file in tmp_path.iterdir()] == ["run.lock"]


def test_both_go_on_from_the_checkpoint_before_one_that_is_damaged(cache, tmp_path, monkeypatch):
    """Of which the second process alone has lost its part."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    steps = (*ARGUMENTS, "--config.steps=8", "--config.mesh.data=1", "--config.mesh.fsdp=8")
    steps += ("--config.task.widths=(64,)",)  # small arrays are in one file of both
    whole, run = (f"--workdir={tmp_path / name}" for name in ("whole", "run"))
    for done in run_two(TRAIN, [*steps, whole], cache=cache):
        assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run/outcome.txt").unlink()  # as if they had been killed before
    shutil.rmtree(tmp_path / "run/checkpoints/8/state/ocdbt.process_1/d")
    first, second = run_two(TRAIN, [*steps, run], cache=cache)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "going on from step 6" in first.stderr
    assert_same_outcome(steps, tmp_path / "whole", tmp_path / "run")


def test_a_process_that_should_not_be_alone_stops(monkeypatch):
    alone = Cluster(start=Start.ON, devices=8)
    with pytest.raises(ClusterError, match=r"were not found: .*--config.cluster.start=off"):
        join(alone)
    with monkeypatch.context() as patch:
        patch.setenv("WNJAX_PROCESS_COUNT", "two")
        with pytest.raises(ClusterError, match="invalid literal"):
            join(alone)


def test_auto_is_alone_where_nothing_tells_of_others():
    """In a process that has not used JAX; how many devices there are is counted after that."""
    lines = (
        "import jax",
        "from experiments.cluster import join",
        "from experiments.config import Cluster, Start",
        "join(Cluster(start=Start.AUTO, devices=1))",
        "print(jax.process_count())",
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"


@pytest.mark.parametrize("name", ["WNJAX_PROCESS_COUNT", "SLURM_STEP_NUM_TASKS"])
def test_one_of_several_does_not_train_alone(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    join(Cluster())
    monkeypatch.setenv(name, "2")
    with pytest.raises(ClusterError, match=rf"one of several \({name}=2\), which would each train"):
        join(Cluster())


@pytest.mark.parametrize(
    ("cluster", "text"),
    [
        ({"devices": 16}, r"cluster.devices=16 are expected and 8 were found, in 1 processes"),
        ({"start": Start.ON}, "cluster.devices must say how many devices"),
        ({"timeout": 0}, "cluster.timeout must be positive"),
        ({"devices": -1}, "cluster.devices must not be negative"),
    ],
)
def test_devices_are_counted(cluster, text):
    with pytest.raises((ConfigError, ValueError), match=text):
        claim_devices(Config(task=Digits(), cluster=Cluster(**cluster)))


def test_all_processes_must_have_work(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    on = Cluster(start=Start.ON, devices=8)
    with pytest.raises(ConfigError, match="use 4 of 8 devices, which must all take part"):
        claim_devices(Config(task=Digits(), mesh=Mesh(data=4), cluster=on))
    with pytest.raises(ConfigError, match=r"2 processes must know .*cluster.start=on"):
        claim_devices(Config(task=Digits(), mesh=Mesh(data=8)))
