"""What the trainer gains over a plain loop: python -m experiments.throughput --config=FILE:VARIANT.

The plain loop is the usual one in Flax: a TrainState, batches that numpy gathers on the host, a
call for every step, and the loss read after each. Both train the network without weight norm on
batches of the same size, in turn in one process; compiling is not counted.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from experiments.command_line import ConfigError, parse
from experiments.config import Config
from experiments.datasets import Data, DataError
from experiments.placement import claim_devices
from experiments.programs import Programs
from experiments.train import load
from experiments.trainer import Trainer

ROUNDS = 5
SECONDS = 4.0  # of a round, about, for either of the two


def plain_loop(config: Config, data: Data) -> Callable[[int], None]:
    """So many steps of the plain loop, for a network without weight norm."""
    trainer = Trainer(config)
    start = trainer.init(jnp.int32(config.seed), {k: jnp.asarray(x) for k, x in data.train.items()})
    optimizer = config.optimizer.make(config.steps)
    state = TrainState.create(apply_fn=None, params=start.params, tx=optimizer)
    statistics, random = start.statistics, np.random.default_rng(config.seed)
    count = len(next(iter(data.train.values())))

    @jax.jit
    def step(state: Any, statistics: Any, batch: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            outputs, new = trainer.forward(params, statistics, batch, key, train=True)
            return trainer.config.task.measures(outputs, batch)["loss"].mean(), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), new, value

    def run(steps: int) -> None:
        nonlocal state, statistics
        for number in range(steps):
            rows = random.choice(count, config.batch_size, replace=False)
            batch = {name: x[rows] for name, x in data.train.items()}
            state, statistics, value = step(state, statistics, batch, jax.random.key(number))
            float(value)

    return run


def ours(config: Config, data: Data) -> Callable[[int], None]:
    """So many steps of the trainer, rounded up to whole calls."""
    programs = Programs(config, data)
    states = programs.init()

    def run(steps: int) -> None:
        nonlocal states
        queued = None
        for _ in range(-(-steps // config.call_steps)):
            states, ends = programs.steps(states)
            jax.block_until_ready(queued)
            queued = ends
        jax.block_until_ready(queued)

    with jax.set_mesh(programs.mesh):
        programs.compile(states)
    return run


def measure(config: Config, data: Data) -> dict[str, list[float]]:
    """Seconds an epoch and network of both, one for each round; they take turns."""
    programs = {"plain loop": plain_loop(config, data), "trainer": ours(config, data)}
    networks = {"plain loop": 1, "trainer": config.seeds}
    per_epoch = len(next(iter(data.train.values()))) / config.batch_size
    size = config.call_steps
    steps = {}
    for name, program in programs.items():
        program(size)  # compiles, and fills caches
        begin = time.perf_counter()
        program(size)
        calls = SECONDS / (time.perf_counter() - begin)
        steps[name] = size * max(1, round(calls))
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            begin = time.perf_counter()
            program(steps[name])
            seconds = (time.perf_counter() - begin) / steps[name]
            times[name].append(seconds * per_epoch / networks[name])
    return times


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        run = parse(arguments)
        config = dataclasses.replace(run.config, weight_norm=False, init_examples=0)
        claim_devices(config)
        data = load(config)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    times = measure(config, data)
    ratios = np.divide(times["plain loop"], times["trainer"])
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    for name, seconds in times.items():
        print(f"{name}: {np.median(seconds):.3f} s an epoch and network")
    print(
        f"{median:.2f} times as fast ({low:.2f} to {high:.2f}, {ROUNDS} rounds); the trainer has "
        f"{config.seeds} networks side by side, {config.call_steps} steps a call"
    )
    print(json.dumps({"arguments": list(arguments), "seconds": times}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
