"""Trains the networks of a config file: python -m experiments.train --config=configs/digits.py.

All seeds train side by side in one program; state and data stay on the device. What was begun
is gone on with: a run that was interrupted ends with the parameters and metrics of one that was
not, bit for bit, on the same hardware.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import matplotlib.image
import numpy as np

from experiments import cluster, records
from experiments.boards import Board
from experiments.budget import shorten
from experiments.checkpoints import CheckpointError, Checkpoints
from experiments.command_line import ConfigError, Run, parse, usage
from experiments.config import Config
from experiments.datasets import Data, DataError, Examples
from experiments.interrupts import Interrupts, Preemptions
from experiments.locks import LockError
from experiments.logs import log, log_to_stderr
from experiments.loop import Loop, NotFiniteError
from experiments.placement import claim_devices
from experiments.programs import Programs
from experiments.trainer import State

MISTAKES = (
    *(ConfigError, DataError, NotFiniteError, cluster.ClusterError),
    *(records.RecordError, LockError, CheckpointError),
)


@cluster.ending_with_others()
def train(run: Run) -> bool:
    """Trains all seeds, from the last checkpoint on, and records every evaluation.

    Returns:
      Whether the run got to its end; if not, it was asked to stop, and can be gone on with.

    Raises:
      ConfigError: if the config asks for more examples or devices than there are.
      DataError: if the data cannot be had.
      RecordError: if the directory holds another run, or cannot be written.
      LockError: if another process trains in the directory.
      CheckpointError: if a checkpoint cannot be written.
      NotFiniteError: if a loss is infinite or NaN. The last checkpoint is kept.
      ClusterError: if the processes do not find one another, or differ.
    """
    config, workdir, started = run.config, run.workdir, time.monotonic()
    cluster.join(config.cluster)
    claim_devices(config)
    data = prepare(run)
    if data is None:
        log.info("%s is finished", workdir)
        return True
    with directory(run):
        with cluster.together(), records.writing(workdir / "tensorboard"):
            board = Board(workdir if config.tensorboard and cluster.is_first() else None)
        programs = Programs(config, data)
        with (
            jax.set_mesh(programs.mesh),
            Preemptions() if jax.process_count() > 1 else Interrupts() as interrupts,
            Checkpoints(workdir) as checkpoints,
            board,
            cluster.ending_with_others(),  # before the checkpoints wait for the others
        ):
            states, seconds = begin(programs, checkpoints, workdir, started)
            loop = Loop(programs, checkpoints, board, interrupts, workdir)
            states = loop.run(states, seconds)
            if done := loop.step == loop.length:
                pictures = programs.pictures(states)
        with cluster.together():
            if done and cluster.is_first():
                save_pictures(pictures, workdir / "pictures")
                records.finish(workdir, outcome(run, loop.length))
    return done


def prepare(run: Run) -> Data | None:
    """The data, the same for all processes; None if the run is done."""
    config = run.config
    if not cluster.is_first():
        log.setLevel(logging.WARNING)  # the first one tells what all do
    with cluster.together():
        is_finished = records.is_finished(run)
    if cluster.of_first(is_finished):
        return None
    with cluster.together():
        data = load(config) if cluster.is_first() else None  # it downloads what is not there
    with cluster.together():
        data = data or load(config)
        about = records.flat(records.about_run(config))
    about.pop("device.machine")  # hosts of accelerators may differ
    cluster.check_same(about)
    for split in filter(None, data):
        cluster.check_same(split)
    return data


@contextlib.contextmanager
def directory(run: Run) -> Iterator[None]:
    """The directory for the results, which all processes see, and no other run's processes use."""
    with contextlib.ExitStack() as held:
        with cluster.together():
            if cluster.is_first():
                held.enter_context(records.opened(run))
        number = cluster.of_first(random.getrandbits(30))
        with cluster.together():
            records.check_shared(run.workdir, number, run.config.cluster.timeout)
        yield


def load(config: Config) -> Data:
    """The data, cut to what the config asks for.

    Raises:
      ConfigError: if it asks for more than there is.
      DataError: if the data cannot be had.
    """
    data = config.task.data(Path(config.data_dir).expanduser())

    def cut(examples: Examples, name: str) -> Examples:
        number, there = getattr(config, name), len(next(iter(examples.values())))
        if number > there:
            raise ConfigError(f"{name} must be at most {there}, got {number}")
        return {key: x[: number or None] for key, x in examples.items()}

    train, validation = cut(data.train, "train_examples"), None
    if held_out := config.validation_examples:
        validation = {key: x[-held_out:] for key, x in train.items()}
        train = {key: x[:-held_out] for key, x in train.items()}
    count = len(next(iter(train.values())))
    for name in ("batch_size", "init_examples"):
        if (size := getattr(config, name)) > count:
            raise ConfigError(
                f"{name} must be at most {count}, the number of training examples, got {size}"
            )
    return Data(train, cut(data.test, "test_examples"), validation)


def begin(
    programs: Programs, checkpoints: Checkpoints, workdir: Path, started: float
) -> tuple[State, float]:
    """The states at the last checkpoint, or new ones; and the seconds that the run has taken.

    `started` is the time when the process began, for runs whose time is limited.
    """
    config, states = programs.config, programs.init()
    if config.weight_norm:
        log.info("the first of %d networks:\n%s", config.seeds, programs.summary(states))
    step, states = last_states(checkpoints, workdir, states, config.steps_per_eval)
    with cluster.together():
        first, mesh = cluster.is_first(), programs.mesh.shape
        seconds = records.go_on(workdir, step or 0, mesh) if first else 0.0
    if step is not None:
        checkpoints.go_on_from(step)
        log.info("going on from step %d", step)
    log.info("compiling")
    programs.compile(states)
    if config.minutes and step is None:
        left = 60 * config.minutes - (time.monotonic() - started)
        states = shorten(programs, states, left)
    length = int(cluster.fetch(states.length)[0])
    with cluster.together():
        if cluster.is_first():
            records.note_length(workdir, length)
    return states, seconds


def last_states(
    checkpoints: Checkpoints, workdir: Path, states: State, steps_per_eval: int
) -> tuple[int | None, State]:
    """The last states that a run can go on from, and their step; what is given without any.

    Their checkpoint is whole, and all evaluations before it are recorded.

    Raises:
      RecordError: if there are checkpoints, and none is such a one.
    """
    with cluster.together():
        found = records.recorded(workdir, steps_per_eval) if cluster.is_first() else 0
    lacking, reasons = cluster.of_first(found) + steps_per_eval, []
    for step in reversed(checkpoints.steps()):
        try:
            if step >= lacking:
                raise records.RecordError(
                    f"the evaluation of step {lacking}, before the checkpoint of step {step}, is "
                    f"not in {workdir / 'metrics.jsonl'}"
                )
            states = checkpoints.restore(states, step)
        except (records.RecordError, CheckpointError, cluster.ClusterError) as error:
            reasons.append(str(error))
            log.warning("going on from an earlier step than %d: %s", step, error)
        else:
            return step, states
    if reasons:
        raise records.RecordError(
            f"{workdir} cannot be resumed: {'; '.join(reasons)}. Put a copy of the files "
            f"back, or delete {workdir} to begin anew"
        )
    return None, states


def save_pictures(pictures: dict[str, np.ndarray], folder: Path) -> None:
    """Writes every picture as a PNG, enlarged."""
    for name, picture in pictures.items():
        large = np.repeat(np.repeat(picture, 2, axis=0), 2, axis=1)
        rgb = np.broadcast_to(large, (*large.shape[:2], 3))
        with records.writing(folder / f"{name}.png"):
            folder.mkdir(exist_ok=True)
            matplotlib.image.imsave(folder / f"{name}.png", np.ascontiguousarray(rgb))


def outcome(run: Run, length: int) -> str:
    """The last and the best value of the run's metric, as text."""
    name = f"test_{run.config.task.metric}"
    lines = records.read_metrics(run.workdir)
    values = np.array([line[name] for line in lines])
    best = values.min(axis=0)
    return (
        f"{run.workdir.name}: {name} {records.mean_and_std(values[-1], 4)} after "
        f"{length} steps, best {records.mean_and_std(best, 4)} "
        f"(seeds: {run.config.seeds}); records in {run.workdir}"
    )


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status."""
    log_to_stderr()
    try:
        if {"-h", "--help"} & set(arguments):
            rest = [argument for argument in arguments if argument not in ("-h", "--help")]
            print(usage(type(parse(rest).config.task) if rest else None))
            return 0
        run = parse(arguments)
        is_done = train(run)
        if cluster.is_first():
            stopped = f"stopped; the same command goes on: {run.workdir}"
            print(records.read_outcome(run.workdir) if is_done else stopped)
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
