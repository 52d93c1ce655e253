"""Training of the CIFAR-10 network, held against one written from the paper's equations alone.

The first half of this module is that second implementation. It uses JAX and nothing of Flax, of
Optax or of wnjax. Sources: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, and what the
authors' code does beyond it, https://github.com/TimSalimans/weight_norm.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnjax
from experiments.command_line import parse
from experiments.tasks.classification import Cifar10
from experiments.trainer import Trainer
from tests.toys import in_float64

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")

STEPS, DECAY_FROM, TAKEN = 20, 5, 10  # those of the schedules, and those that are compared
RATE, BATCH, DENSE = 0.003, 8, 9  # the last is the index of the dense layer


class Form(NamedTuple):
    """What is computed and trained; the last three are as they are but for planted faults."""

    weight: str  # "free": V; "fixed": g·V with constant g; "gain": g·V/‖V‖
    norm: str = "none"  # or "mean" or "batch"
    from_data: bool = True
    fast: bool = False  # gains
    are_logits_normalized: bool = True
    is_gradient_centered: bool = True
    is_scale_trained: bool = False


class Numbers(NamedTuple):
    """The constants that planted faults change."""

    decay_from: int = DECAY_FROM
    late_momentum: float = 0.5
    eps_in_root: float = 1e-8
    eps: float = 0.0
    variance_factor: float = BATCH / (BATCH - 1)


FORMS = {
    "plain": Form("fixed"),
    "weight_norm": Form("gain", from_data=False),
    "weight_norm_init": Form("gain"),
    "weight_norm_fast_gains": Form("gain", fast=True),
    "batch_norm": Form("free", "batch", from_data=False),
    "mean_only": Form("fixed", "mean"),
    "weight_norm_mean_only": Form("gain", "mean"),
}


# Numbers of neurons keep their weight's rank, which is that of the layer's output, too.


def over_neurons(reduce, x):
    return reduce(x, axis=tuple(range(x.ndim - 1)), keepdims=True)


def length(v):
    return jnp.sqrt(over_neurons(jnp.sum, v**2))


def moments(t):
    mean = over_neurons(jnp.mean, t)
    return mean, over_neurons(jnp.mean, (t - mean) ** 2)


def product(i, x, w):
    """x*W of layer i."""
    if i == DENSE:
        return x @ w
    padding = "VALID" if i == 6 else "SAME"
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def larger(a, b):
    """The larger numbers. Compiled derivatives of `jnp.maximum` ask which one equals the result."""
    return jnp.where(a > b, a, b)


def network(images, layer):
    """ConvPool-CNN-C, of what its layers compute: layer(i, x)."""
    x = images
    for i in range(DENSE):
        x = layer(i, x)
        x = larger(x, 0.1 * x)
        if i in (2, 5):
            x = larger(x[:, ::2], x[:, 1::2])
            x = larger(x[:, :, ::2], x[:, :, 1::2])
    return layer(DENSE, x.mean(axis=(1, 2)))


def start(form, directions, images):
    """For every layer, what is trained and a constant scale; g and b from the images."""
    params, scales = [], []

    def layer(i, x):
        v = directions[i]
        w = v / length(v) if form.weight == "gain" else v
        mean, variance = moments(t := product(i, x, w))
        sigma = jnp.sqrt(variance)
        has_mean = form.norm == "none"
        params.append({"v": v, "g": 1 / sigma, "b": -mean / sigma if has_mean else 0 * mean})
        scales.append(1 / sigma)
        return (t - mean) / sigma

    if form.from_data:
        network(images, layer)
    else:
        gains = [length(v) for v in directions]
        ones = [jnp.ones_like(g) for g in gains]
        first = gains if form.weight == "gain" else ones
        params = [
            {"v": v, "g": g, "b": jnp.zeros_like(g)} for v, g in zip(directions, first, strict=True)
        ]
        scales = ones
    if form.weight == "fixed":
        params = [{"v": p["v"], "b": p["b"]} for p in params]
    if form.is_scale_trained:
        params = [{**p, "v": p["v"] * s} for p, s in zip(params, scales, strict=True)]
        scales = [jnp.ones_like(s) for s in scales]
    return params, scales


class State(NamedTuple):
    """What training changes, and the scales; lists over the layers."""

    params: list
    scales: list
    running: list  # means and variances
    first: list  # moments
    second: list


def weight(form, p, scale):
    match form.weight:
        case "gain":
            return p["g"] * p["v"] / length(p["v"])
        case "fixed":
            return scale * p["v"]
    return p["v"]


def forward(form, state, images, factor=None):
    """The logits, and the running means and variances after them; in test mode without factor."""
    after = []

    def layer(i, x):
        p, running = state.params[i], state.running[i]
        t = product(i, x, weight(form, p, state.scales[i]))
        mean, variance = running if factor is None else moments(t)
        if factor is not None:
            new = mean, factor * variance
            after.append(tuple(0.9 * a + 0.1 * b for a, b in zip(running, new, strict=True)))
        if form.norm == "none" or (i == DENSE and not form.are_logits_normalized):
            return t + p["b"]
        if not form.is_gradient_centered:
            mean = jax.lax.stop_gradient(mean)
        if form.norm == "mean":
            return t - mean + p["b"]
        return p["g"] * (t - mean) / jnp.sqrt(variance + 1e-6) + p["b"]

    return network(images, layer), after


def cross_entropy(logits, labels):
    right = jnp.sum(logits * jax.nn.one_hot(labels, 10, dtype=logits.dtype), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - right)


def adam(form, numbers, state, grads, count):
    """The changes of the parameters, and both moments."""
    is_late = count >= numbers.decay_from
    b1 = jnp.where(is_late, numbers.late_momentum, 0.9)
    left = (STEPS - count) / (STEPS - numbers.decay_from)
    rate = RATE * jnp.where(is_late, left, 1.0)
    first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, grads)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state.second, grads)

    def change(m, v):
        m, v = m / (1 - b1 ** (count + 1)), v / (1 - 0.999 ** (count + 1))
        return -rate * m / (jnp.sqrt(v + numbers.eps_in_root) + numbers.eps)

    changes = jax.tree.map(change, first, second)
    if form.fast:
        changes = [{**c, "g": c["g"] * (c["v"].size / c["g"].size) ** 0.5} for c in changes]
    return changes, first, second


@functools.partial(jax.jit, static_argnums=0)
def one_step(form, numbers, state, batch, count):
    images, labels = batch

    def loss(params):
        new = state._replace(params=params)
        logits, running = forward(form, new, images, numbers.variance_factor)
        return cross_entropy(logits, labels), running

    (value, running), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    changes, first, second = adam(form, numbers, state, grads, count)
    params = jax.tree.map(jnp.add, state.params, changes)
    return value, State(params, state.scales, running, first, second)


class Course(NamedTuple):
    """What is compared; lists over the layers, or over the steps."""

    start: list  # dicts of v, g and b
    scales: list  # empty where they are not fixed
    losses: list  # summed over the steps so far
    params: list
    running: list  # of means, and of variances, where these are used
    logits: jax.Array  # in test mode


def by_paper(form, numbers, directions, images, labels):
    """Training by the code above."""
    params, scales = jax.jit(start, static_argnums=0)(form, directions, images)
    running = [(jnp.zeros_like(p["b"]), jnp.ones_like(p["b"])) for p in params]
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, losses = State(params, scales, running, zeros, zeros), []
    for count in range(TAKEN):
        rows = slice(count * BATCH, (count + 1) * BATCH)
        value, state = one_step(form, numbers, state, (images[rows], labels[rows]), float(count))
        losses.append(value)
    evaluate = jax.jit(forward, static_argnums=0)
    kinds = {"none": 0, "mean": 1, "batch": 2}[form.norm]
    return Course(
        start=params,
        scales=scales if form.weight == "fixed" else [],
        losses=list(np.cumsum(losses)),
        params=state.params,
        running=[pair[:kinds] for pair in state.running],
        logits=evaluate(form, state, images[TAKEN * BATCH :])[0],
    )


# From here on, the code under test.

NAMES = [*(f"Conv_{i}" for i in range(DENSE)), "Dense_0"]
NORMS = {"mean": "MeanOnlyBatchNorm", "batch": "BatchNorm"}


class Float64Cifar10(Cifar10):
    """The task, with a loss that is not rounded to float32."""

    __slots__ = ()

    def measures(self, outputs, batch):
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"])
        return super().measures(outputs, batch) | {"loss": loss}


class Float64Network:
    """A network whose variables are float64 from the start."""

    def __init__(self, network):
        self.network, self.apply = network, network.apply

    def init(self, *args, **kwargs):
        return in_float64(self.network.init(*args, **kwargs))


def trainer_of(variant):
    sizes = {
        **{"task.widths": "(4,5,6)", "task.noise": 0, "task.dropout": 0, "batch_size": BATCH},
        **{"steps": STEPS, "steps_per_eval": STEPS, "steps_per_call": STEPS},
        **{"optimizer.learning_rate": RATE, "optimizer.decay_from": DECAY_FROM},
    }
    if FORMS[variant].from_data:
        sizes["init_examples"] = 100
    fields = [f"--config.{name}={value}" for name, value in sizes.items()]
    config = parse([f"--config=configs/cifar10.py:{variant}", *fields]).config
    task = config.task
    task = Float64Cifar10(**{x.name: getattr(task, x.name) for x in dataclasses.fields(task)})
    trainer = Trainer(dataclasses.replace(config, task=task))
    trainer.network = Float64Network(trainer.network)
    return trainer


def layers(form, params):
    """The parameters of every layer, named as above."""
    found = []
    for i, name in enumerate(NAMES):
        kernel = params[name]["kernel"]
        norm = params[f"{NORMS[form.norm]}_{i}"] if form.norm in NORMS else params[name]
        layer = {"v": kernel, "b": norm["bias"]}
        if form.weight == "gain":
            layer |= {"v": kernel.v, "g": kernel.g}
        if form.norm == "batch":
            layer["g"] = norm["scale"]
        found.append(layer)
    return found


@functools.cache
def examples():
    random = np.random.default_rng(0)
    images = random.normal(size=(100, 16, 16, 3))  # half the width, a quarter of the time
    return {"images": images, "labels": random.integers(0, 10, 100, np.int32)}


@functools.cache
def by_trainer(variant):
    """Training by the code under test."""
    form, train = FORMS[variant], jax.tree.map(jnp.asarray, examples())
    trainer = trainer_of(variant)
    state = first = in_float64(trainer.init(jnp.int32(0), train))
    step, losses = jax.jit(trainer.step), []
    for count in range(TAKEN):
        rows = slice(count * BATCH, (count + 1) * BATCH)
        state = step(state, {name: x[rows] for name, x in train.items()})
        losses.append(state.loss)
    few = {name: x[TAKEN * BATCH :] for name, x in train.items()}

    def in_test_mode(state):
        weights, key = wnjax.fold(trainer.weights(state)), jax.random.key(0)
        return trainer.forward(weights, state.statistics, few, key, train=False)[0]

    statistics = state.statistics.get("batch_stats", {})
    norms = [statistics.get(f"{NORMS.get(form.norm)}_{i}", {}) for i in range(len(NAMES))]
    return Course(
        start=layers(form, first.params),
        scales=[first.scale[name]["kernel"] for name in NAMES] if first.scale else [],
        losses=losses,
        params=layers(form, state.params),
        running=[tuple(norm[kind] for kind in ("mean", "var") if kind in norm) for norm in norms],
        logits=jax.jit(in_test_mode)(state),
    )


def difference(a, b):
    """The largest one, relative to the largest number."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype == np.float64
    return np.abs(a.reshape(b.shape) - b).max() / (np.abs(b).max() or 1)


def compare(variant, form, numbers):
    """The differences, as a `Course` of numbers."""
    ours = by_trainer(variant)
    data = jax.tree.map(jnp.asarray, examples())
    directions = [layer["v"] for layer in ours.start]
    paper = by_paper(form, numbers, directions, data["images"], data["labels"])
    return jax.tree.map(difference, ours, paper)


@pytest.mark.parametrize("variant", FORMS)
def test_training_is_that_of_the_paper(variant):
    found = compare(variant, FORMS[variant], Numbers())
    assert np.max(jax.tree.leaves((found.start, found.scales))) < 1e-12
    assert np.max(jax.tree.leaves(found)) < 1e-10


@pytest.mark.parametrize(
    ("variant", "fault"),
    [
        ("plain", {"decay_from": DECAY_FROM + 1}),
        ("plain", {"late_momentum": 0.9}),
        ("plain", {"eps_in_root": 0.0, "eps": 1e-8}),
        ("plain", {"is_scale_trained": True}),
        ("weight_norm_fast_gains", {"fast": False}),
        ("batch_norm", {"variance_factor": 1.0}),
        ("batch_norm", {"are_logits_normalized": False}),
        ("weight_norm_mean_only", {"is_gradient_centered": False}),
    ],
)
def test_faults_are_seen(variant, fault):
    numbers = {name: x for name, x in fault.items() if name in Numbers._fields}
    form = {name: x for name, x in fault.items() if name in Form._fields}
    found = compare(variant, FORMS[variant]._replace(**form), Numbers(**numbers))
    assert found.logits > 1e-4
