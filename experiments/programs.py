"""The compiled programs of a run, over all its seeds, and the data that they use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import wnjax
from experiments.cluster import fetch
from experiments.config import Config
from experiments.datasets import Data
from experiments.placement import layout, make_mesh
from experiments.tasks import Measures
from experiments.trainer import Dataset, State, Trainer

Metrics = dict[str, np.ndarray]  # by name; a value for every seed
Norms = dict[str, dict[str, np.ndarray]]  # by path and name; a value for every seed


class Programs:
    """The compiled programs of one run, and the data that they use."""

    def __init__(self, config: Config, data: Data):
        """Puts the data on the devices; compiles nothing yet."""
        self.config, self.trainer = config, Trainer(config)
        self.count = len(next(iter(data.train.values())))  # of training examples
        self.mesh = make_mesh(config)
        whole = NamedSharding(self.mesh, PartitionSpec())
        by_seed = NamedSharding(self.mesh, PartitionSpec("seeds"))
        self.train, *held_out = (
            {name: _on_all(np.asarray(x), whole) for name, x in split.items()}
            for split in data
            if split
        )
        self.held_out = dict(zip(("test", "validation"), held_out, strict=False))
        self.test = self.held_out["test"]
        seeds = np.arange(config.seed, config.seed + config.seeds, dtype=np.int32)
        self.seeds = jax.device_put(seeds, by_seed)
        # Devices of a CPU that are in different calls wait for each other for ever, some in the
        # all-reduce of one call, the others in that of another.
        self._one_call_at_a_time = config.mesh.size > 1 and jax.default_backend() == "cpu"
        self._init: Any = jax.jit(self._init_all)
        self._steps: Any = jax.jit(self._advance_all, donate_argnums=0)
        evaluate: Any = jax.jit(self._over_seeds(self.trainer.evaluate, 2))
        self._evaluate = dict.fromkeys(self.held_out, evaluate)
        self._norms: Any = jax.jit(self._over_seeds(self.trainer.norms, 1))
        self._first_failures: Any = jax.jit(self._over_seeds(self.trainer.first_failure, 0))

    def _over_seeds(self, function: Callable[..., Any], others: int) -> Callable[..., Any]:
        """The function of a state and `others` that are the same for all, for stacked states."""
        return self._on_groups(jax.vmap(function, in_axes=(0, *[None] * others)), others)

    def _on_groups(self, function: Callable[..., Any], others: int) -> Callable[..., Any]:
        """The function of stacked states and `others`, on each group of devices for its own."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(PartitionSpec("seeds"), *[PartitionSpec()] * others),
            out_specs=PartitionSpec("seeds"),
            axis_names={"seeds"},
            check_vma=False,
        )

    def init(self) -> State:
        """The states of all seeds before the first step."""
        states: State = self._init(self.seeds, self.train)
        return states

    def compile(self, states: State) -> None:
        """Compiles what is called again and again, before anything is timed."""
        self._steps = self._steps.lower(states, self.train).compile()
        for name, examples in self.held_out.items():
            evaluate = self._evaluate[name].lower(states, examples, jnp.int32(0))
            self._evaluate[name] = evaluate.compile()
        self._norms = self._norms.lower(states, self.train).compile()
        self._first_failures = self._first_failures.lower(states).compile()

    def steps(self, states: State) -> tuple[State, jax.Array]:
        """The steps of one call. The states are used up; the second result tells when they end."""
        after: tuple[State, jax.Array] = self._steps(states, self.train)
        if self._one_call_at_a_time:
            jax.block_until_ready(after)
        return after

    def _init_all(self, seeds: jax.Array, train: Dataset) -> State:
        def one_by_one(seeds: jax.Array, train: Dataset) -> State:
            # Side by side, initializers take twice as long to compile.
            states: State = jax.lax.map(lambda seed: self.trainer.init(seed, train), seeds)
            return states

        return self._placed(self._on_groups(one_by_one, 1)(seeds, train))

    def _advance_all(self, states: State, train: Dataset) -> tuple[State, jax.Array]:
        states = self._placed(self._over_seeds(self.trainer.steps, 1)(states, train))
        return states, states.step

    def _placed(self, states: State) -> State:
        places = layout(self.mesh, states, self.config.task.layouts)
        placed: State = jax.lax.with_sharding_constraint(states, places)
        return placed

    def summary(self, states: State) -> str:
        """Which weights of a network are normalized, a line each."""
        first: State = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], states))
        few = jax.eval_shape(lambda: jax.tree.map(lambda x: x[:2], self.train))
        is_plain = self.config.in_optimizer
        what = self.trainer.axes(first.params, first.statistics, few) if is_plain else first.params
        return wnjax.summary(what)

    def metrics(self, states: State) -> Metrics:
        """The mean loss since the last evaluation, and the measures of the held-out examples."""
        means: dict[str, jax.Array] = {"loss": states.loss / self.config.steps_per_eval}
        for split, examples in self.held_out.items():
            count = len(next(iter(examples.values())))
            sums: list[Measures] = []
            for number in range(-(-count // self.config.batch_size)):
                sums.append(self._evaluate[split](states, examples, jnp.int32(number)))
                if self._one_call_at_a_time:
                    jax.block_until_ready(sums[-1])
            for name in sums[0]:
                means[f"{split}_{name}"] = (
                    sum((one[name] for one in sums[1:]), sums[0][name]) / count
                )
        metrics: Metrics = fetch(means)
        return metrics

    def norms(self, states: State) -> Norms:
        """`Trainer.norms` of all seeds."""
        found: Norms = fetch(self._norms(states, self.train))
        return found

    def first_failures(self, states: State) -> np.ndarray:
        """`Trainer.first_failure` of all seeds."""
        failures: np.ndarray = fetch(self._first_failures(states))
        return failures

    def pictures(self, states: State) -> dict[str, np.ndarray]:
        """What the task draws with the first network."""
        first: State = fetch(jax.tree.map(lambda x: x[0], states))
        params = wnjax.fold(self.trainer.weights(first))
        rngs = {name: jax.random.key(i) for i, name in enumerate(("latent", "binarization"))}

        def apply(*arguments: Any, method: str) -> np.ndarray:
            variables = {"params": params, **first.statistics}
            network: Any = self.trainer.network
            call = partial(network.apply, variables, *arguments, method=method, rngs=rngs)
            return np.asarray(fetch(jax.jit(call)()), np.float32)

        few = fetch(jax.tree.map(lambda x: x[:100], self.test))
        return self.config.task.pictures(apply, few)


def _on_all(x: np.ndarray, whole: NamedSharding) -> jax.Array:
    """An array whole on all devices, of which each process has its own copy."""
    return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])
