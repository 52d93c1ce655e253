"""MNIST, variational autoencoder: section 5.2 of the paper, figure 2 on the left.

A convolutional ResNet VAE: three sequences of two residual blocks with 16, 32 and 32 feature
maps, the image halved between them, a dense layer of 450 units, 32 latent variables, and the
mirror image as decoder. The posterior is a diagonal Gaussian; the paper's is autoregressive. With
weight norm, v ~ N(0, 0.05²). In the variants with `init`, 500 images set gains and biases, or the
scales and biases of plain weights; the branches of residual blocks and the posterior are scaled
down. `fast_gains` multiplies the updates of gains by the square root of their fan-in. Adamax with
learning rate 0.002, batches of 100, moving averages of the parameters over about ten epochs.
Pixels are binarized at random each time; the metric is minus the lower bound on log p(x) of the
test set in nats, under the averages.

Run:      python -m experiments.train --config=configs/mnist_vae.py:weight_norm_init
Expect:   the paper's figure has weight norm ahead of plain at equal epochs. Ours, minus the bound
          after twelve epochs, one seed: plain_short 102.7, weight_norm_short 101.7,
          weight_norm_init_short 100.4 nats; at a learning rate of 0.006 98.7, 99.4 and 102.5.
Time:     about 5 min for a short variant on 2 CPU cores (x86-64, jax 0.10.2)
Sweep:    two learning rates on a CPU.
Variants: weight_norm_init, plain, plain_init, weight_norm, weight_norm_fast_gains,
          weight_norm_init_fast_gains, weight_norm_init_short, plain_short, plain_init_short,
          weight_norm_short, weight_norm_fast_gains_short, weight_norm_init_fast_gains_short, smoke
"""

from collections.abc import Iterator
from typing import Any

from experiments.command_line import choose
from experiments.config import Config, Optimizer, Update, merge
from experiments.tasks.images import MnistVae

EPOCH = 600  # steps, of 100 images
WEIGHT_NORM = {"weight_norm": True, "v_std": 0.05}  # the paper's
FAST_GAINS = {"optimizer": {"fast_gains": True}}
NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain_init": {"init_examples": 500},
    "weight_norm": WEIGHT_NORM,
    "weight_norm_fast_gains": {**WEIGHT_NORM, **FAST_GAINS},
    "weight_norm_init": {**WEIGHT_NORM, "init_examples": 500},
    "weight_norm_init_fast_gains": {**WEIGHT_NORM, "init_examples": 500, **FAST_GAINS},
}
FULL: dict[str, Any] = {
    "task": MnistVae(),
    "optimizer": Optimizer(name=Update.ADAMAX, learning_rate=0.002),
    "batch_size": 100,
    "steps": 100 * EPOCH,
    "steps_per_eval": EPOCH,
    "steps_per_call": 0,
    "ema_decay": 1 - 1 / (10 * EPOCH),
}
# For a CPU: half the maps, one block in a sequence, a fifth of the images, twelve epochs.
SHORT: dict[str, Any] = {
    "task": MnistVae(maps=(8, 16, 16), blocks=1, units=128),
    "steps": 12 * 120,
    "steps_per_eval": 120,
    "steps_per_call": 1,
    "train_examples": 12_000,
    "test_examples": 2_000,
    "ema_decay": 1 - 1 / (2 * 120),
}
SMOKE: dict[str, Any] = {
    "task": MnistVae(maps=(4,), blocks=1, units=8, latents=2),
    **WEIGHT_NORM,
    "init_examples": 100,
    "batch_size": 8,
    "steps": 6,
    "steps_per_eval": 2,
    "steps_per_call": 1,
    "train_examples": 200,
    "test_examples": 20,
    "ema_decay": 0.5,
}


def get_config(variant: str = "weight_norm_init") -> Config:
    """The configuration of one variant."""
    full = {name: merge(FULL, changes) for name, changes in NORMS.items()}
    short = {f"{name}_short": merge({**FULL, **SHORT}, changes) for name, changes in NORMS.items()}
    return Config(**choose({**full, **short, "smoke": {**FULL, **SMOKE}}, variant))


def sweep() -> Iterator[dict[str, Any]]:
    """The shortened protocol, at the paper's learning rate and at three times as much."""
    for learning_rate in (0.002, 0.006):
        for name in NORMS:
            yield {"variant": f"{name}_short", "optimizer.learning_rate": learning_rate}
