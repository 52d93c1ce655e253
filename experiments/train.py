"""Trains the networks of a config file: python -m experiments.train --config=configs/digits.py.

All seeds train side by side in one program. A chunk of steps is one call of it, which
also takes the test error; state and data stay on the device.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import wnjax
from experiments import records
from experiments.config import USAGE, Config, ConfigError, parse
from experiments.data import Data, Split, batch_indices, digits
from experiments.models import ConvNet

log = logging.getLogger("experiments")

Metrics = dict[str, np.ndarray]  # by name; a value for every seed


class State(NamedTuple):
    """Everything that changes in training; stacked over the seeds outside of `Trainer`."""

    step: jax.Array
    key: jax.Array  # for the order of the images
    params: Any  # with nodes where weight norm is on
    statistics: Any  # of batch norm; empty without
    optimizer: optax.OptState


class Trainer:
    """The pure functions of one experiment. None of them keeps anything."""

    def __init__(self, config: Config):
        """Takes what does not change: the network and its optimizer."""
        self.config = config
        self.model = ConvNet(config.widths, 10, config.norm.of_activations)
        self.optimizer = optax.sgd(config.learning_rate, config.momentum)

    def init(self, key: jax.Array, images: jax.Array) -> State:
        """The state of one network before its first step."""
        init_key, order_key = jax.random.split(key)
        batch_key = jax.random.fold_in(init_key, 1)
        variables = self.model.init(init_key, images[:1], train=True)
        params = variables.pop("params")
        if self.config.norm.of_weights:
            axes = wnjax.neurons(self.forward, params, variables, images[:2], train=True)
            params = wnjax.weight_norm(params, axes)
        if self.config.norm.from_data:
            shape = (self.config.init_images,)
            batch = images[jax.random.choice(batch_key, len(images), shape, replace=False)]
            params = wnjax.data_init(self.forward, params, variables, batch, train=True)
        return State(jnp.int32(0), order_key, params, variables, self.optimizer.init(params))

    def forward(
        self, params: Any, statistics: Any, images: jax.Array, *, train: bool
    ) -> tuple[Any, Any]:
        """Logits, and the new statistics, for plain weights."""
        mutable = list(statistics) if train else []
        variables = {"params": params, **statistics}
        return self.model.apply(variables, images, train=train, mutable=mutable)

    def step(self, state: State, batch: Split) -> tuple[State, jax.Array]:
        """One step of one network, and its loss in nats."""

        def loss(params: Any) -> tuple[jax.Array, Any]:
            forward = wnjax.wrap(self.forward)  # params may hold nodes
            logits, statistics = forward(params, state.statistics, batch.images, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return losses.mean(), statistics

        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, state.key, params, statistics, optimizer), value

    def error(self, state: State, split: Split) -> jax.Array:
        """The share of images that one network gets wrong."""
        forward = wnjax.wrap(self.forward)
        logits, _ = forward(state.params, state.statistics, split.images, train=False)
        return jnp.mean(logits.argmax(-1) != split.labels)

    def chunk(self, state: State, data: Data) -> tuple[State, dict[str, jax.Array]]:
        """`steps_per_chunk` steps of one network, their mean loss, and its test error then."""
        indices = batch_indices(
            state.key,
            state.step,
            self.config.steps_per_chunk,
            self.config.batch_size,
            len(data.train.labels),
        )

        def step(state: State, rows: jax.Array) -> tuple[State, jax.Array]:
            return self.step(state, Split(*(x[rows] for x in data.train)))

        state, losses = jax.lax.scan(step, state, indices, unroll=self.config.unroll)
        return state, {"loss": losses.mean(), "test_error": self.error(state, data.test)}


def compile_chunk(trainer: Trainer, states: State, data: Data) -> jax.stages.Compiled:
    """`Trainer.chunk` over all seeds, compiled before any step is timed. It uses its states up."""
    chunk = jax.jit(jax.vmap(trainer.chunk, in_axes=(0, None)), donate_argnums=0)
    return chunk.lower(states, data).compile()


def train(config: Config, workdir: Path) -> Metrics:
    """Trains all seeds, writes a record after every chunk, and returns the last metrics.

    Raises:
      ConfigError: if a batch is larger than the data.
      RecordError: if `workdir` holds another run.
    """
    data, trainer = digits(), Trainer(config)
    images = len(data.train.labels)
    for name in ("batch_size", "init_images"):
        if (size := getattr(config, name)) > images:
            raise ConfigError(
                f"{name} must be at most {images}, the number of training images, got {size}"
            )
    records.create(workdir, config)
    keys = jax.vmap(jax.random.key)(config.seed + jnp.arange(config.seeds))
    states = jax.jit(jax.vmap(trainer.init, in_axes=(0, None)))(keys, data.train.images)
    if config.norm.of_weights:
        one = jax.tree.map(lambda x: x[0], states.params)
        log.info("the first of %d networks:\n%s", config.seeds, wnjax.summary(one))
    log.info("compiling")
    chunk = compile_chunk(trainer, states, data)

    metrics: Metrics = {}
    steps = range(config.steps_per_chunk, config.steps + 1, config.steps_per_chunk)
    bar = tqdm(steps, unit="chunk", disable=None)  # on a terminal only
    start = time.perf_counter()
    for step in bar:
        began = time.perf_counter()
        states, on_device = chunk(states, data)
        metrics = jax.device_get(on_device)
        seconds = time.perf_counter() - began
        times = {
            "seconds": began + seconds - start,
            "seconds_per_step": seconds / config.steps_per_chunk,
        }
        values = {name: x.tolist() for name, x in metrics.items()}
        records.append(workdir, {"step": step, **times, **values})
        if bar.disable:
            log.info("step %d of %d: %s", step, config.steps, describe(metrics))
        else:
            bar.set_postfix_str(describe(metrics))
    return metrics


def describe(metrics: Metrics) -> str:
    """The metrics as text: means, and standard deviations where there are several seeds."""
    return ", ".join(f"{name} {records.mean_and_std(x, 4)}" for name, x in metrics.items())


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        config, workdir = parse(arguments)
        metrics = train(config, workdir)
    except (ConfigError, records.RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    percent = records.mean_and_std(100 * metrics["test_error"], 2)
    print(
        f"{config.norm.value}: test error {percent} % after {config.steps} steps "
        f"(seeds: {config.seeds}); records in {workdir}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
