"""MNIST, DRAW: section 5.3 of the paper, figure 3.

A recurrent variational autoencoder: LSTMs of 256 units as encoder and decoder, a 2x2 grid of
filters to read and a 5x5 grid to write, 64 glimpses, 100 latent variables each. Weight norm on
all weight vectors, without initialization from data: in a recurrent network the steps share their
neurons. Adam, batches of 128. Pixels are binarized at random each time; the metric is minus the
lower bound on log p(x) of the test set in nats. The sizes are those of Gregor et al. 2015, table
3. The code that the paper used draws all weights from N(0, 0.01²), with zero biases: the variants
with `authors_init`. The others start from Flax's initializers, which give larger weights, and with
which training starts better. `fast_gains` multiplies the updates of gains by the square root of
their fan-in.

Run:      python -m experiments.train --config=configs/mnist_draw.py:weight_norm
Expect:   the paper's figure has weight norm ahead of plain at equal epochs. Ours, minus the bound
          of the shortened protocol, three seeds: plain_short 151.7 ± 5.9, weight_norm_short
          141.2 ± 2.6, weight_norm_fast_gains_short 140.5 ± 7.6 nats; plain_short at a learning rate
          of 0.003: 136.0 ± 9.1.
Time:     4 to 6 min for a short variant on 2 CPU cores (x86-64, jax 0.10.2); at full size not
          measured
Sweep:    the shortened protocol, plain also at a learning rate of 0.003.
Variants: weight_norm, plain, plain_authors_init, weight_norm_authors_init, weight_norm_fast_gains,
          weight_norm_short, plain_short, plain_authors_init_short, weight_norm_authors_init_short,
          weight_norm_fast_gains_short, smoke
"""

from collections.abc import Iterator
from typing import Any

from experiments.command_line import choose
from experiments.config import Config, Optimizer, Update, merge
from experiments.tasks.images import MnistDraw

EPOCH = 468  # steps, of 128 images
WEIGHT_NORM = {"weight_norm": True, "v_std": 0.05}
AUTHORS_INIT = {"task": {"weight_std": 0.01}}
NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain_authors_init": AUTHORS_INIT,
    "weight_norm": WEIGHT_NORM,
    "weight_norm_authors_init": {"weight_norm": True, **AUTHORS_INIT},
    "weight_norm_fast_gains": {**WEIGHT_NORM, "optimizer": {"fast_gains": True}},
}
FULL: dict[str, Any] = {
    "task": MnistDraw(),
    "optimizer": Optimizer(name=Update.ADAM, learning_rate=0.001, clip=10.0),
    "batch_size": 128,
    "steps": 100 * EPOCH,
    "steps_per_eval": EPOCH,
    "steps_per_call": 0,
}
# For a CPU: eight glimpses, a quarter of the units, a fifth of the images, 30 epochs, three seeds.
SHORT: dict[str, Any] = {
    "task": MnistDraw(glimpses=8, units=64, latents=16),
    "steps": 30 * 100,
    "steps_per_eval": 100,
    "train_examples": 12_800,
    "test_examples": 2_048,
    "seeds": 3,
}
SMOKE: dict[str, Any] = {
    "task": MnistDraw(glimpses=3, units=8, latents=2),
    **NORMS["weight_norm"],
    "batch_size": 8,
    "steps": 4,
    "steps_per_eval": 2,
    "steps_per_call": 1,
    "train_examples": 100,
    "test_examples": 20,
}


def get_config(variant: str = "weight_norm") -> Config:
    """The configuration of one variant."""
    full = {name: merge(FULL, changes) for name, changes in NORMS.items()}
    short = {f"{name}_short": merge({**FULL, **SHORT}, changes) for name, changes in NORMS.items()}
    return Config(**choose({**full, **short, "smoke": {**FULL, **SMOKE}}, variant))


def sweep() -> Iterator[dict[str, Any]]:
    """The shortened protocol; plain at three times the learning rate too."""
    for name in ("plain", "weight_norm", "weight_norm_fast_gains"):
        yield {"variant": f"{name}_short", "optimizer.learning_rate": 0.001}
    yield {"variant": "plain_short", "optimizer.learning_rate": 0.003}
