"""Training as pure functions: a state, a step, an evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wnjax
from experiments.config import Config
from experiments.datasets.batches import batch_indices
from experiments.placement import BATCH
from experiments.tasks import Batch, Measures

_DECISIONS = wnjax.Weight, wnjax.NotWeight
RNGS = ("dropout", "noise", "latent", "binarization")  # streams that networks ask for
Dataset = dict[str, jax.Array]  # examples on the device


class State(NamedTuple):
    """Everything that changes in training; stacked over the seeds outside of `Trainer`."""

    step: jax.Array  # () int32: steps taken
    order: jax.Array  # data of the key of the order of examples
    noise: jax.Array  # data of the key of all that is drawn in training
    length: jax.Array  # () int32: steps of the whole run
    params: Any  # with (g, v) leaves where weight norm is on and not in the optimizer
    scale: Any  # constant factors of the weights, like the parameters; None without
    statistics: Any  # of batch norm; empty without
    optimizer: optax.OptState
    average: Any  # of the parameters; None without
    loss: jax.Array  # () float32: the sum over the steps since the last evaluation
    failed: jax.Array  # () int32: the first step whose loss was not finite; -1 for none


class Trainer:
    """The pure functions of one experiment. None of them keeps anything."""

    def __init__(self, config: Config):
        """Takes what does not change: the network and its optimizer."""
        self.config = config
        self.has_nodes = config.weight_norm and not config.in_optimizer  # in the parameters
        dtype = jnp.bfloat16 if config.bfloat16 else None
        self.network = config.task.network(config.norm, dtype)
        self.average = optax.ema(config.ema_decay) if config.ema_decay else None

    def init(self, seed: jax.Array, train: Dataset) -> State:
        """The state of one network before its first step."""
        config, task = self.config, self.config.task
        keys = jax.random.split(jax.random.key(seed), 5)
        init_key, order_key, training_key, batch_key, noise_key = keys
        few = jax.tree.map(lambda x: x[:2], train)
        rngs = {"params": init_key, **_rngs(noise_key)}
        variables = self.network.init(rngs, task.inputs(few), train=True)
        params = variables.pop("params")
        if self.has_nodes:
            axes = self.axes(params, variables, few)
            params = _scale_v(wnjax.weight_norm(params, axes), config.v_std)
        drawn, scale = params, None
        if config.init_examples:
            shape, n = (config.init_examples,), len(next(iter(train.values())))
            rows = jax.random.choice(batch_key, n, shape, replace=False)
            batch = jax.tree.map(lambda x: x[rows], train)
            initialize = wnjax.data_init(self.forward, std=task.init_std or 1.0)
            params = initialize(params, variables, batch, noise_key, train=True)
        if config.fixed_scale:
            params, scale = _split_scale(drawn, params, self.axes(params, variables, few))
        return State(
            step=jnp.int32(0),
            order=jax.random.key_data(order_key),
            noise=jax.random.key_data(training_key),
            length=jnp.int32(config.steps),
            params=params,
            scale=scale,
            statistics=variables,
            optimizer=self.optimizer(params, variables, few, config.steps).init(params),
            average=self.average.init(params) if self.average else None,
            loss=jnp.float32(0),
            failed=jnp.int32(-1),
        )

    def axes(self, params: Any, statistics: Any, few: Batch) -> Any:
        """Which axes of which weights are those of neurons, by a trace of the network."""
        infer = wnjax.infer_axes(self.forward)
        return infer(params, statistics, few, jax.random.key(0), train=True)

    def optimizer(
        self, params: Any, statistics: Any, few: Batch, length: int | jax.Array
    ) -> optax.GradientTransformation:
        """What updates the parameters, in a run of `length` steps."""
        optimizer = self.config.optimizer.make(self.config.steps, length)
        if not self.config.in_optimizer:
            return optimizer
        return wnjax.weight_normalized(optimizer, self.axes(params, statistics, few))

    def forward(
        self, params: Any, statistics: Any, batch: Batch, key: jax.Array, *, train: bool
    ) -> tuple[Any, Any]:
        """The network's outputs, and the new statistics, for plain weights."""
        variables = {"params": params, **statistics}
        mutable = list(statistics) if train else []
        inputs, rngs = self.config.task.inputs(batch), _rngs(key)
        return self.network.apply(variables, inputs, train=train, mutable=mutable, rngs=rngs)

    def measure(
        self, params: Any, statistics: Any, batch: Batch, key: jax.Array, *, train: bool
    ) -> tuple[Measures, Any]:
        """The measures of every example, and the new statistics; params may hold (g, v) leaves."""
        forward = wnjax.wrap(self.forward) if self.has_nodes else self.forward
        outputs, statistics = forward(params, statistics, batch, key, train=train)
        return self.config.task.measures(outputs, batch), statistics

    def updates(self, state: State, batch: Batch) -> tuple[jax.Array, Any, Any, optax.OptState]:
        """What one step does: the loss, the new statistics, the updates, the optimizer's state."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state.noise), state.step)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            params = _scaled(params, state.scale)
            measures, statistics = self.measure(params, state.statistics, batch, key, train=True)
            return measures["loss"].mean(), statistics

        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        few = jax.tree.map(lambda x: x[:2], batch)
        optimizer = self.optimizer(state.params, state.statistics, few, state.length)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        return value, statistics, updates, optimizer_state

    def step(self, state: State, batch: Batch) -> State:
        """One step of one network."""
        value, statistics, updates, optimizer = self.updates(state, batch)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if self.average:
            average = self.average.update(params, average)[1]
        is_first = state.step % self.config.steps_per_eval == 0  # since the last evaluation
        is_failure = (state.failed < 0) & ~jnp.isfinite(value)
        return state._replace(
            step=state.step + 1,
            params=params,
            statistics=statistics,
            optimizer=optimizer,
            average=average,
            loss=jnp.where(is_first, 0, state.loss) + value,
            failed=jnp.where(is_failure, state.step + 1, state.failed),
        )

    def steps(self, state: State, train: Dataset) -> State:
        """The steps of one call, of one network."""
        config = self.config
        indices = self.indices(state, train, config.call_steps)

        def step(state: State, rows: jax.Array) -> tuple[State, None]:
            return self.step(state, self.share(jax.tree.map(lambda x: x[rows], train))), None

        if config.call_steps == 1:  # without a loop of one step
            return step(state, indices[0])[0]
        return jax.lax.scan(step, state, indices, unroll=config.unroll)[0]

    def indices(self, state: State, train: Dataset, steps: int) -> jax.Array:
        """Which examples the next so many steps take: (steps, batch size)."""
        key, n = jax.random.wrap_key_data(state.order), len(next(iter(train.values())))
        return batch_indices(key, state.step, steps, self.config.batch_size, n)

    def share(self, batch: Batch) -> Batch:
        """The batch, split over the devices."""
        if self.config.mesh.size == 1:
            return batch
        return {name: jax.lax.with_sharding_constraint(x, BATCH) for name, x in batch.items()}

    def first_failure(self, state: State) -> jax.Array:
        """() int32: the first step whose loss, or whose update, is not finite; -1 for none."""
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state.params)]).all()
        return jnp.where((state.failed < 0) & ~finite, state.step, state.failed)

    def weights(self, state: State) -> Any:
        """The parameters that are evaluated: the moving average, where there is one."""
        params = state.params
        if self.average is not None and state.average is not None:
            correction = 1 - self.config.ema_decay ** state.step.astype(jnp.float32)
            params = jax.tree.map(lambda x: x / correction, state.average.ema)
        return _scaled(params, state.scale)

    def evaluate(self, state: State, test: Dataset, number: jax.Array) -> Measures:
        """The sums of all measures of one network over batch `number` of the test set."""
        n, size = len(next(iter(test.values()))), self.config.batch_size
        places = number * size + jnp.arange(size)
        batch = self.share(jax.tree.map(lambda x: x[jnp.minimum(places, n - 1)], test))
        key = jax.random.fold_in(jax.random.key(0), number)  # the same in every evaluation
        params = self.weights(state)
        measures, _ = self.measure(params, state.statistics, batch, key, train=False)
        return {name: jnp.sum(x, where=places < n) for name, x in measures.items()}

    def norms(self, state: State, train: Dataset) -> dict[str, dict[str, jax.Array]]:
        """For every weight, over its neurons: the mean ‖v‖, g, and effective step size.

        The latter is ‖Δv‖/‖v‖ for the update that the next step would make: how far directions
        turn. Without weight norm, or with it in the optimizer, v is the weight, and there is no g.
        """
        rows = self.indices(state, train, 1)[0]
        batch = self.share(jax.tree.map(lambda x: x[rows], train))
        _, _, updates, _ = self.updates(state, batch)
        if self.has_nodes:
            found = wnjax.norms(state.params)
            change = {path: norms["v"] for path, norms in wnjax.norms(updates).items()}
        else:
            few = jax.tree.map(lambda x: x[:2], batch)
            axes = self.axes(state.params, state.statistics, few)
            found = {path: {"v": norms} for path, norms in _lengths(state.params, axes).items()}
            change = _lengths(updates, axes)
        return {
            path: {
                **{name: jnp.mean(norms[name]) for name in ("v", "g") if name in norms},
                "step": jnp.mean(change[path] / jnp.maximum(norms["v"], 1e-30)),
            }
            for path, norms in found.items()
        }


def _scale_v(params: Any, std: float) -> Any:
    """The same weights, with entries of this standard deviation in every v; 0 for any."""

    def scale(x: Any) -> Any:
        if not std or not isinstance(x, wnjax.WeightNorm):
            return x
        root_mean_square = jnp.sqrt(jnp.mean(jnp.square(x.v)))
        return wnjax.WeightNorm(g=x.g, v=x.v * (std / root_mean_square))

    return jax.tree.map(scale, params, is_leaf=wnjax.is_weight_norm)


def _split_scale(drawn: Any, params: Any, axes: Any) -> tuple[Any, Any]:
    """Parameters with the weights of `drawn`, and the factors that make them those of `params`."""
    after, before = (wnjax.weight_norm(tree, axes) for tree in (params, drawn))

    def scale(after: Any, before: Any) -> jax.Array:
        is_weight = isinstance(after, wnjax.WeightNorm)
        factor: jax.Array = after.g / before.g if is_weight else jnp.ones((), after.dtype)
        return factor

    def start(after: Any, before: Any) -> jax.Array:
        w: jax.Array = before.v if isinstance(before, wnjax.WeightNorm) else after
        return w

    is_leaf = wnjax.is_weight_norm
    return tuple(jax.tree.map(f, after, before, is_leaf=is_leaf) for f in (start, scale))


def _scaled(params: Any, scale: Any) -> Any:
    """The weights that a network computes with, of parameters that constants may multiply."""
    return params if scale is None else jax.tree.map(lambda x, s: x * s, params, scale)


def _lengths(tree: Any, axes: Any) -> dict[str, jax.Array]:
    """By slash path, the norms of the neurons in a tree of plain weights."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    decisions = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, _DECISIONS))
    lengths = {}
    for (path, w), decision in zip(pairs, decisions, strict=True):
        if isinstance(decision, wnjax.Weight):
            features = np.atleast_1d(decision.feature_axes) % w.ndim
            fan_in = tuple(axis for axis in range(w.ndim) if axis not in features)
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            lengths[name] = jnp.sqrt(jnp.sum(jnp.square(w), fan_in))
    return lengths


def _rngs(key: jax.Array) -> dict[str, jax.Array]:
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(RNGS)}
