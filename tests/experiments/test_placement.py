"""Networks spread over eight devices in every way: their losses are those of one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments.config import Config, Mesh, Optimizer, Update
from experiments.datasets import Data
from experiments.datasets.digits import digits
from experiments.networks.layers import ActivationNorm
from experiments.programs import Programs
from experiments.tasks.classification import Digits
from experiments.tasks.language import CharLm

STEPS = 50
CALL = 10  # steps in one: a loss for every call
COMMON = {
    "weight_norm": True,
    "batch_size": 16,
    "steps": STEPS,
    "steps_per_eval": CALL,
    "steps_per_call": CALL,
    "optimizer": Optimizer(name=Update.ADAM, learning_rate=0.003),
}
CONFIGS = {
    "cnn": Config(
        task=Digits(widths=(8, 16)), norm=ActivationNorm.MEAN_ONLY, init_examples=128, **COMMON
    ),
    "transformer": Config(
        task=CharLm(layers=1, width=16, heads=2, hidden=32, length=16), init_examples=128, **COMMON
    ),
}
MESHES = {
    "data": Mesh(data=8),
    "fsdp": Mesh(fsdp=8),
    "tensor": Mesh(tensor=2),
    "mixed": Mesh(data=2, fsdp=2, tensor=2),
}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def text():
    """Bytes with a pattern to learn."""
    random = np.random.default_rng(0)
    tokens = (random.integers(0, 256, (400, 1)) + 3 * np.arange(17)) % 256
    return Data(*({"tokens": part.astype(np.uint8)} for part in np.split(tokens, [300])))


DATA = {"cnn": digits, "transformer": text}


def losses(name, mesh):
    """Of each call, and the last states."""
    programs = Programs(dataclasses.replace(CONFIGS[name], mesh=mesh), DATA[name]())
    found = []
    with jax.set_mesh(programs.mesh):
        states = programs.init()
        for _ in range(STEPS // CALL):
            states, _ = programs.steps(states)
            found.append(float(states.loss[0]) / CALL)
    return np.array(found), states


@functools.cache
def alone(name):
    return losses(name, Mesh())[0]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_one_device(name, mesh):
    """For 50 steps, with initialization from data and statistics of the whole batch."""
    found, states = losses(name, MESHES[mesh])
    assert alone(name)[-1] < 0.95 * alone(name)[0]  # it learns
    np.testing.assert_allclose(found, alone(name), rtol=1e-5)
    for x in jax.tree.leaves(states):
        assert len(x.devices()) == MESHES[mesh].size


def test_weights_are_split_and_not_only_the_batch():
    """A device has its part of v, of g, and of the optimizer's moments."""
    _, states = losses("transformer", MESHES["mixed"])
    kernel = "Dense_0", "kernel"  # (16, 32): 32 neurons over fsdp and tensor
    nodes = [t[kernel[0]][kernel[1]] for t in (states.params, *moments(states.optimizer))]
    for node in nodes:
        assert {x.data.shape for x in node.v.addressable_shards} == {(1, 16, 8)}
        assert {x.data.shape for x in node.g.addressable_shards} == {(1, 1, 8)}


def moments(state):
    adam = next(part for part in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(part))
    return adam.mu, adam.nu


def is_adam(x):
    return hasattr(x, "mu")
