"""Compiles training steps and times them, all in turn, so that they meet the same machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.logs import log
from experiments.peers import IMPLEMENTATIONS, Eager, Implementation, Training
from experiments.problems import Problem

COMPILATIONS = 2  # of everything; the faster one counts
LEAST_ROUNDS = 3
VISIT_SECONDS = 0.1  # so long does one implementation run before it is the next one's turn

Program = Callable[[int], float]  # takes so many steps, waits, and returns the last loss


class Compiled(NamedTuple):
    """A program, and what compiling it cost and told; None where nothing is compiled."""

    program: Program
    compile_seconds: float | None = None  # with tracing
    bytes_accessed: float | None = None  # by a step, as XLA counts them
    temporary_bytes: int | None = None


class Measurement(NamedTuple):
    """One implementation in one cell, a cell being a network and a batch size."""

    model: str
    batch: int
    implementation: str
    seconds: list[float]  # a step, for every round
    compile_seconds: float | None
    bytes_accessed: float | None
    temporary_bytes: int | None


class Ratios(NamedTuple):
    """A measurement against that of the network without normalization."""

    step: np.ndarray  # the quartiles
    compile: float | None
    bytes: float | None
    memory: float | None


Cell = dict[str, Measurement]  # by implementation


def measure(
    model: str,
    problem: Problem,
    names: Sequence[str],
    seconds: float,
    repeats: int | None,
) -> Cell:
    """One cell; for how long is explained at `time_all`."""
    size = len(problem.inputs)
    log.info("%s, batch %d: compiling", model, size)
    chosen = {name: IMPLEMENTATIONS[name] for name in names}
    compiled = compile_all(chosen, problem)
    programs = {name: one.program for name, one in compiled.items()}
    times = time_all(programs, seconds, repeats)
    return {
        name: Measurement(model, size, name, times[name], *compiled[name][1:]) for name in names
    }


def ratios(cell: Cell, name: str) -> Ratios:
    """What an implementation costs."""
    one, base = cell[name], cell[IMPLEMENTATIONS[name].against]

    def ratio(value: float | None, of: float | None) -> float | None:
        return value / of if value is not None and of else None

    return Ratios(
        np.quantile(np.divide(one.seconds, base.seconds), (0.25, 0.5, 0.75)),
        ratio(one.compile_seconds, base.compile_seconds),
        ratio(one.bytes_accessed, base.bytes_accessed),
        ratio(one.temporary_bytes, base.temporary_bytes),
    )


def compile_all(
    implementations: Mapping[str, Implementation], problem: Problem
) -> dict[str, Compiled]:
    """Everything, compiled in turn, with the time of the faster of several compilations."""
    best: dict[str, Compiled] = {}
    for _ in range(COMPILATIONS):
        for name, implementation in implementations.items():
            built = implementation.build(problem)  # anew: nothing of it has been traced
            new = _run_eagerly(built) if isinstance(built, Eager) else _compile(built)
            best[name] = min(best.pop(name, new), new, key=lambda one: one.compile_seconds or 0)
    return best


def compile_side_by_side(
    implementations: Mapping[str, Implementation], problem: Problem
) -> tuple[dict[str, Compiled], dict[str, str]]:
    """Everything, compiled once: tracing takes turns, while XLA compiles in threads.

    Where compiling takes minutes this saves most of them, but `compile_seconds` then depend on
    what else is compiled at the same time.

    Returns:
      What could be compiled, and the errors of the others.
    """
    futures: dict[str, Future[Compiled]] = {}
    errors: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, implementation in implementations.items():
            try:
                built = implementation.build(problem)
                if isinstance(built, Eager):
                    raise TypeError("nothing is compiled")
                futures[name] = pool.submit(_compile_lowered, _lower(built))
            except Exception as error:
                errors[name] = first_line(error)
    compiled: dict[str, Compiled] = {}
    for name, future in futures.items():
        try:
            compiled[name] = future.result()
        except Exception as error:
            errors[name] = first_line(error)
    return compiled, errors


def first_line(error: Exception) -> str:
    """What went wrong, on one line. The error itself would keep arrays alive by its traceback."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _run_eagerly(eager: Eager) -> Compiled:
    def program(steps: int) -> float:
        return [eager.step() for _ in range(steps)][-1]

    return Compiled(program)


class _Lowered(NamedTuple):
    """A traced training step."""

    step: Any
    state: Any
    batch: tuple[jax.Array, jax.Array]
    seconds: float  # of tracing


def _compile(training: Training) -> Compiled:
    return _compile_lowered(_lower(training))


def _lower(training: Training) -> _Lowered:
    batch = training.inputs, training.labels
    # A copy, since it is used up, and problems share their parameters.
    state = jax.tree.map(jnp.copy, training.state)
    begin = time.perf_counter()
    step = jax.jit(training.step, donate_argnums=0).lower(state, *batch)
    return _Lowered(step, state, batch, time.perf_counter() - begin)


def _compile_lowered(lowered: _Lowered) -> Compiled:
    state, batch = lowered.state, lowered.batch
    begin = time.perf_counter()
    compiled = lowered.step.compile()
    seconds = lowered.seconds + time.perf_counter() - begin

    def program(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, loss = compiled(state, *batch)
        jax.block_until_ready(state)
        return float(loss)

    cost: Any = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    return Compiled(
        program,
        seconds,
        cost.get("bytes accessed"),
        memory.temp_size_in_bytes if memory else None,
    )


def time_all(
    programs: Mapping[str, Program], seconds: float, repeats: int | None
) -> dict[str, list[float]]:
    """Seconds a step of every program, one for each round.

    In a round every program takes some steps, in an order drawn for the round: what slows the
    machine for longer than a round slows all alike.

    Args:
      programs: by name.
      seconds: for all rounds together; but there are three at least.
      repeats: the number of rounds, whatever they take.
    """
    begin = time.perf_counter()
    times = {name: _time(program, 1) for name, program in programs.items()}
    rounds, steps = [times], 1
    if 4 * sum(times.values()) < seconds:  # else too slow for throwing the first steps away
        times = {name: _time(program, 1) for name, program in programs.items()}
        rounds, steps = [], max(1, round(VISIT_SECONDS / float(np.median([*times.values()]))))
    log.info("rounds of %d steps each, of about %.1f s", steps, steps * sum(times.values()))
    order = np.random.default_rng(0)
    while len(rounds) < (repeats or LEAST_ROUNDS) or (
        repeats is None and time.perf_counter() - begin < seconds
    ):
        names = order.permutation(sorted(programs))
        rounds.append({str(name): _time(programs[name], steps) for name in names})
    return {name: [times[name] for times in rounds] for name in programs}


def _time(program: Program, steps: int) -> float:
    begin = time.perf_counter()
    program(steps)
    return (time.perf_counter() - begin) / steps
