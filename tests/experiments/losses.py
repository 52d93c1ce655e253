"""Two small networks and what they learn from, trained for fifty steps on any devices.

As a program, python -m tests.experiments.losses NAME FORM, the same in several processes.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from experiments import cluster
from experiments.config import Cluster, Config, Mesh, Optimizer, Start, Update
from experiments.datasets import Data
from experiments.datasets.digits import digits
from experiments.networks.layers import ActivationNorm
from experiments.placement import claim_devices
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
FORMS = "nodes", "optimizer"  # where g and v are


def text():
    """Bytes with a pattern to learn."""
    random = np.random.default_rng(0)
    tokens = (random.integers(0, 256, (400, 1)) + 3 * np.arange(17)) % 256
    return Data(*({"tokens": part.astype(np.uint8)} for part in np.split(tokens, [300])))


DATA = {"cnn": digits, "transformer": text}


def losses(name, mesh, form, **changes):
    """Of each call, and the last states."""
    changes |= {"mesh": mesh, "in_optimizer": form == "optimizer"}
    config = dataclasses.replace(CONFIGS[name], **changes)
    programs = Programs(config, DATA[name]())
    found = []
    with jax.set_mesh(programs.mesh):
        states = programs.init()
        for _ in range(STEPS // CALL):
            states, _ = programs.steps(states)
            found.append(float(cluster.fetch(states.loss)[0]) / CALL)
    return np.array(found), states


def main(name, form):
    """Prints the losses on the devices of all processes."""
    mesh = Mesh(data=2, fsdp=2, tensor=2)
    together = Cluster(start=Start.ON, devices=mesh.size, timeout=20)
    cluster.join(together)
    claim_devices(dataclasses.replace(CONFIGS[name], mesh=mesh, cluster=together))
    found, _ = losses(name, mesh, form)
    if cluster.is_first():
        print(json.dumps(found.tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
