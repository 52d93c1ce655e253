"""Checkpoints that are damaged, and from which one a run goes on."""

import gc
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import records
from experiments.checkpoints import DIGESTS, CheckpointError, Checkpoints
from experiments.train import last_states
from tests.experiments.test_records import on_disk, run

EVERY = 10  # steps between evaluations
STEPS = 10, 20


def state(step):
    key = jax.random.key(step)
    return {"w": jax.random.normal(key, (64, 33)), "n": {"step": jnp.int32(step)}, "none": None}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("begun")
    records.create(run(folder))
    with Checkpoints(folder) as checkpoints:
        for step in STEPS:
            records.append(folder, {"step": step, "seconds": 1.0})
            checkpoints.save(step, state(step))
    return folder


@pytest.fixture
def workdir(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


def last(workdir):
    """The step of the last states, which are right."""
    with Checkpoints(workdir) as checkpoints:
        step, found = last_states(checkpoints, workdir, state(0), EVERY)
    jax.tree.map(np.testing.assert_array_equal, found, state(step or 0))
    return step


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file):
    file.unlink()


HARMS = cut, empty, flip, remove
# Where a file is damaged, Orbax leaves coroutines that nobody waits for.
noisy = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def coroutines_end_with_their_test():
    yield
    gc.collect()


@noisy
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_checkpoint_is_right_or_told_to_be_damaged(harm, begun, tmp_path, caplog):
    """Whichever of its files is damaged: another one is gone on from, with nothing cut before."""
    told = 0
    for number, original in enumerate(files(begun / "checkpoints/20")):
        workdir = tmp_path / str(number)
        shutil.copytree(begun, workdir)
        harm(workdir / original.relative_to(begun))
        before = on_disk(workdir)
        caplog.clear()
        step = last(workdir)
        assert step in STEPS
        assert ("going on from an earlier step than 20: " in caplog.text) == (step == 10)
        assert on_disk(workdir) == before
        told += step == 10
    assert told >= 4


@noisy
def test_a_damaged_checkpoint_is_set_aside_and_its_step_saved_again(workdir):
    shutil.rmtree(workdir / "checkpoints/20/state/d")
    for number in range(2):
        assert last(workdir) == 10
        with Checkpoints(workdir) as checkpoints:
            checkpoints.go_on_from(10)
            assert checkpoints.steps() == [10]
            checkpoints.save(20, state(20))
        assert last(workdir) == 20
        assert (workdir / f"damaged/20.{number}").is_dir()
        shutil.rmtree(workdir / "checkpoints/20/state/d")


@noisy
def test_without_a_whole_checkpoint_nothing_is_gone_on_with(workdir):
    for step in STEPS:
        (workdir / f"checkpoints/{step}/state/_METADATA").unlink()
    before = on_disk(workdir)
    with pytest.raises(
        records.RecordError,
        match=r"cannot be resumed: .*checkpoints/20 cannot be restored: FileNotFoundError.*; "
        r".*checkpoints/10 cannot .*Put a copy of the files back, or delete .* to begin anew",
    ):
        last(workdir)
    assert on_disk(workdir) == before


def test_a_checkpoint_behind_evaluations_that_lack_is_not_gone_on_from(workdir, caplog):
    metrics = workdir / "metrics.jsonl"
    first, second = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(first + second[:9])
    assert last(workdir) == 10
    assert "the last line, 2, was cut off" in caplog.text
    assert f"the evaluation of step 20, before the checkpoint of step 20, is not in {metrics}" in (
        caplog.text
    )
    metrics.write_text("")
    with pytest.raises(records.RecordError, match=r"the evaluation of step 10, before .* begin an"):
        last(workdir)


@pytest.mark.parametrize("content", [None, "", "3", '{"20": '])
def test_checkpoints_without_digests_are_restored(content, workdir, caplog):
    if content is None:  # as of older versions
        (workdir / DIGESTS).unlink()
    else:
        (workdir / DIGESTS).write_text(content)
    assert last(workdir) == 20
    assert ("digests.json is damaged" in caplog.text) == (content is not None)


def test_digests_are_those_of_the_checkpoints_that_are_left(workdir):
    with Checkpoints(workdir) as checkpoints:
        for step in range(30, 100, 10):
            checkpoints.save(step, state(step))
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == [80, 90]
    digests = json.loads((workdir / DIGESTS).read_text())
    assert digests.keys() >= {"80", "90"}
    assert len(digests) <= 4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("RESOURCE")])
def test_a_checkpoint_that_cannot_be_written_is_told(error, workdir):
    def fail(*arguments):
        raise error

    with Checkpoints(workdir) as checkpoints:
        orbax = checkpoints._checkpointer
        checkpoints._checkpointer = SimpleNamespace(
            checkpoints=orbax.checkpoints, save_async=fail, close=orbax.close
        )
        with pytest.raises(CheckpointError, match=r"cannot be written: .*free space on the disk"):
            checkpoints.save(30, state(30))
    assert last(workdir) == 20


def test_checkpoints_that_are_no_directory(workdir):
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be opened: "):
        Checkpoints(workdir)
