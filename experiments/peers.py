"""Weight normalization by wnjax and by others, and other normalizations: a training step of each.

All train the same Linen network, or the same in another framework, on the same batch: gradients,
Adam, and the new parameters. Packages of others are imported only where they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import wnjax
from experiments import ports
from experiments.networks.layers import ActivationNorm
from experiments.problems import Problem, variables

# So small that the network stays where it begins: gradients that vanish could be slow numbers.
LEARNING_RATE = 1e-6

Apply = Callable[[Any, Any], Any]  # (params, inputs) -> logits


class Training(NamedTuple):
    """A pure function (state, inputs, labels) -> (state, loss), and what it starts from."""

    step: Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]
    state: Any
    inputs: jax.Array
    labels: jax.Array


class Eager(NamedTuple):
    """A step that is not compiled: it changes its state itself, waits, and returns the loss."""

    step: Callable[[], float]


class Implementation(NamedTuple):
    """A way to normalize.

    Attributes:
      about: what it does, in one line.
      build: makes its training step.
      package: what pip has to install for it, if not wnjax itself.
      against: the implementation without normalization that it is compared to.
      keeps: whether its first loss is the plain network's.
    """

    about: str
    build: Callable[[Problem], Training | Eager]
    package: str | None = None
    against: str = "plain"
    keeps: bool = True

    def is_installed(self) -> bool:
        """Whether it can run here."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _adam() -> optax.GradientTransformation:
    return optax.adam(LEARNING_RATE)


def _training(
    problem: Problem,
    apply: Any,
    params: Any,
    statistics: Any,
    optimizer: optax.GradientTransformation | None = None,
) -> Training:
    """Training of `apply(params, statistics, inputs) -> (logits, statistics)`, by Adam if None."""
    optimizer = optimizer or _adam()

    def step(state: Any, inputs: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        params, statistics, moments = state

        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, new = apply(params, statistics, inputs)
            wide = logits.astype(jnp.float32)  # sums of exponentials need its precision
            return optax.softmax_cross_entropy_with_integer_labels(wide, labels).mean(), new

        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), statistics, moments), value

    state = (params, statistics, optimizer.init(params))
    return Training(step, state, problem.inputs, problem.labels)


def _pure(
    problem: Problem,
    apply: Apply,
    params: Any,
    optimizer: optax.GradientTransformation | None = None,
) -> Training:
    """Training of a function without statistics."""
    return _training(problem, lambda params, _, x: (apply(params, x), {}), params, {}, optimizer)


def _network(problem: Problem) -> Apply:
    """The plain network, as a new function: nothing has been remembered about it."""

    def apply(params: Any, inputs: Any) -> Any:
        return problem.model.apply({"params": params}, inputs, train=True)

    return apply


def _plain(problem: Problem) -> Training:
    return _pure(problem, _network(problem), problem.params)


def _linen(problem: Problem, **fields: Any) -> Training:
    """The Linen network with other fields, which may add statistics and parameters."""
    model = problem.model.clone(**fields)
    statistics = variables(model, problem.inputs)
    params = statistics.pop("params")

    def apply(params: Any, statistics: Any, inputs: jax.Array) -> Any:
        both = {"params": params, **statistics}
        return model.apply(both, inputs, train=True, mutable=list(statistics))

    return _training(problem, apply, params, statistics)


def _axes(problem: Problem) -> Any:
    return wnjax.infer_axes(_network(problem))(problem.params, problem.inputs)


def _nodes(problem: Problem) -> Any:
    return wnjax.weight_norm(problem.params, axes=_axes(problem))


def _fold(problem: Problem) -> Training:
    network = _network(problem)
    return _pure(problem, lambda tree, x: network(wnjax.fold(tree), x), _nodes(problem))


def _wrap(problem: Problem) -> Training:
    return _pure(problem, wnjax.wrap(_network(problem)), _nodes(problem))


def _wrap_unordered(problem: Problem) -> Training:
    """`wrap` without the order that it gives XLA, which is no option of wnjax.

    On several devices `wrap` gives no order, and this is `wrap` itself.
    """
    training = _wrap(problem)

    def step(*arguments: Any) -> Any:
        # The step runs in Python only while it is traced, which is when `wrap` rewrites it.
        with mock.patch("wnjax._transforms.wrap.in_order", lambda x, scale: [x, scale]):
            return training.step(*arguments)

    return training._replace(step=step)


def _optimizer(problem: Problem) -> Training:
    optimizer = wnjax.weight_normalized(_adam(), _axes(problem))
    # Compiled at once: one operation after the other, it would be two programs for every shape.
    optimizer = optimizer._replace(init=jax.jit(optimizer.init))
    return _pure(problem, _network(problem), problem.params, optimizer)


def _naive(problem: Problem) -> Training:
    network = _network(problem)

    def apply(tree: Any, x: Any) -> Any:
        return network(jax.tree.map(_left_to_right, tree, is_leaf=wnjax.is_weight_norm), x)

    return _pure(problem, apply, _nodes(problem))


def _left_to_right(leaf: Any) -> Any:
    if not isinstance(leaf, wnjax.WeightNorm):
        return leaf
    axes = tuple(axis for axis, size in enumerate(leaf.g.shape) if size == 1)
    return leaf.g * leaf.v / jnp.sqrt(jnp.sum(leaf.v**2, axes, keepdims=True))


def _paramax(problem: Problem) -> Training:
    eqx, paramax = map(importlib.import_module, ("equinox", "paramax"))
    network = _network(problem)

    def wrap(path: Any, leaf: Any) -> Any:
        return paramax.WeightNormalization(leaf) if path[-1].key == "kernel" else leaf

    tree = jax.tree_util.tree_map_with_path(wrap, problem.params)
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)  # functions are among its leaves

    def apply(arrays: Any, x: Any) -> Any:
        return network(paramax.unwrap(eqx.combine(arrays, rest)), x)

    return _pure(problem, apply, arrays)


def _equinox(problem: Problem, *, normalize: bool) -> Training:
    eqx, framework = importlib.import_module("equinox"), ports.equinox()
    layers = ports.layers(problem.params, framework)
    if normalize:
        for path, layer in layers.items():
            if isinstance(layer, eqx.nn.Linear | eqx.nn.Conv2d):
                layers[path] = eqx.nn.WeightNorm(layer)
    arrays, rest = eqx.partition(layers, eqx.is_inexact_array)
    forward = ports.forward(problem.model, framework)

    def apply(arrays: Any, x: Any) -> Any:
        return forward(eqx.combine(arrays, rest), x)

    inputs = jnp.asarray(ports.channels_first(problem.inputs))
    return _pure(problem._replace(inputs=inputs), apply, arrays)


def _pytorch(problem: Problem, *, normalize: bool) -> Eager:
    torch, framework = importlib.import_module("torch"), ports.pytorch()
    layers = ports.layers(problem.params, framework)
    modules = [layer for layer in layers.values() if isinstance(layer, torch.nn.Module)]
    if normalize:
        for module in modules:
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                torch.nn.utils.parametrizations.weight_norm(module)
    params = [x for x in layers.values() if isinstance(x, torch.nn.Parameter)]
    params += [x for module in modules for x in module.parameters()]
    optimizer = torch.optim.Adam(params, LEARNING_RATE)
    forward = ports.forward(problem.model, framework)
    inputs = torch.tensor(ports.channels_first(problem.inputs))
    labels = torch.tensor(np.asarray(problem.labels)).long()

    def step() -> float:
        optimizer.zero_grad()
        logits = forward(layers, inputs).flatten(0, -2)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten())
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return Eager(step)


IMPLEMENTATIONS = {
    "plain": Implementation("the Linen network, without normalization", _plain),
    "wnjax-fold": Implementation("wnjax on the weights: loss(fold(params))", _fold),
    "wnjax-wrap": Implementation("wnjax.wrap of the network's function", _wrap),
    "wnjax-wrap-unordered": Implementation(
        "wnjax.wrap where XLA is not told which gradient comes first; on one device only",
        _wrap_unordered,
    ),
    "wnjax-optimizer": Implementation(
        "Adam in wnjax.weight_normalized, for the plain network and plain parameters", _optimizer
    ),
    "naive": Implementation("wnjax's g and v, with g * v / norm(v) from left to right", _naive),
    "linen": Implementation(
        "flax.linen.WeightNorm around every layer; norms become 1, heads share a norm",
        partial(_linen, normalize=nn.WeightNorm),
        keeps=False,
    ),
    "paramax": Implementation(
        "paramax.WeightNormalization of the kernels as they are; its norm runs over the last axis",
        _paramax,
        package="paramax",
        keeps=False,
    ),
    "equinox": Implementation(
        "equinox.nn.WeightNorm around every layer, against the same network in Equinox",
        partial(_equinox, normalize=True),
        package="equinox",
        against="equinox-plain",
    ),
    "equinox-plain": Implementation(
        "the network in Equinox, without normalization",
        partial(_equinox, normalize=False),
        package="equinox",
        against="equinox-plain",
    ),
    "torch": Implementation(
        "PyTorch's weight_norm parametrization, against the same network in PyTorch, both eager",
        partial(_pytorch, normalize=True),
        package="torch",
        against="torch-plain",
    ),
    "torch-plain": Implementation(
        "the network in PyTorch, without normalization",
        partial(_pytorch, normalize=False),
        package="torch",
        against="torch-plain",
    ),
    "batch-norm": Implementation(
        "Linen's BatchNorm after every hidden layer",
        partial(_linen, norm=ActivationNorm.BATCH),
        keeps=False,
    ),
    "layer-norm": Implementation(
        "Linen's LayerNorm after every hidden layer",
        partial(_linen, norm=ActivationNorm.LAYER),
        keeps=False,
    ),
}
