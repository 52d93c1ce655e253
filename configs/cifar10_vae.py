"""CIFAR-10, variational autoencoder: section 5.2 of the paper, figure 2 on the right.

Residual units with a layer of latent variables in each, at three resolutions, inferred from below
and from above; a logistic distribution over the 256 levels of a pixel. Posteriors are diagonal
Gaussians; the paper's are autoregressive. In the variants with `init`, 100 images set gains and
biases, or the scales and biases of plain weights. `fast_gains` multiplies the updates of gains by
the square root of their fan-in. Adamax with learning rate 0.002, batches of 100, moving averages of
the parameters over about ten epochs. The metric is minus the lower bound on log p(x) of the test
set in bits per pixel value, under the averages.

Run:      python -m experiments.train --config=configs/cifar10_vae.py:weight_norm_init
Expect:   the paper's figure has weight norm ahead of plain at equal epochs; the paper gives no
          number. Ours, in the shortened protocol, three seeds, JPEG re-encoded pixels, bits a value
          after 8 epochs: plain_short 6.265, plain_init_short 6.237, weight_norm_short 6.344,
          weight_norm_init_short 6.298, weight_norm_fast_gains_short 6.166,
          weight_norm_init_fast_gains_short 6.211.
Time:     6 to 9 min for a short variant on 2 CPU cores (x86-64, jax 0.10.2; four of the six runs
          had other work beside them); some minutes an epoch for the others on a GPU (an estimate:
          they were not run)
Sweep:    the shortened protocol.
Variants: weight_norm_init, plain, plain_init, weight_norm, weight_norm_fast_gains,
          weight_norm_init_fast_gains, weight_norm_init_short, plain_short, plain_init_short,
          weight_norm_short, weight_norm_fast_gains_short, weight_norm_init_fast_gains_short, smoke
"""

from collections.abc import Iterator
from typing import Any

from experiments.command_line import choose
from experiments.config import Config, Optimizer, Update, merge
from experiments.tasks.images import Cifar10Vae

EPOCH = 500  # steps, of 100 images
WEIGHT_NORM = {"weight_norm": True, "v_std": 0.05}  # the paper's
FAST_GAINS = {"optimizer": {"fast_gains": True}}
NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain_init": {"init_examples": 100},
    "weight_norm": WEIGHT_NORM,
    "weight_norm_fast_gains": {**WEIGHT_NORM, **FAST_GAINS},
    "weight_norm_init": {**WEIGHT_NORM, "init_examples": 100},
    "weight_norm_init_fast_gains": {**WEIGHT_NORM, "init_examples": 100, **FAST_GAINS},
}
FULL: dict[str, Any] = {
    "task": Cifar10Vae(),
    "optimizer": Optimizer(name=Update.ADAMAX, learning_rate=0.002),
    "batch_size": 100,
    "steps": 100 * EPOCH,
    "steps_per_eval": EPOCH,
    "steps_per_call": 0,
    "ema_decay": 1 - 1 / (10 * EPOCH),
}
# For a CPU: a quarter of the maps, one unit at a resolution, a fifth of the images, eight epochs,
# three seeds.
SHORT: dict[str, Any] = {
    "task": Cifar10Vae(maps=16, latents=8, units=1),
    "steps": 8 * 100,
    "steps_per_eval": 100,
    "steps_per_call": 1,
    "train_examples": 10_000,
    "test_examples": 1_000,
    "ema_decay": 1 - 1 / (2 * 100),
    "seeds": 3,
}
SMOKE: dict[str, Any] = {
    "task": Cifar10Vae(maps=4, latents=2, levels=1, units=1),
    **WEIGHT_NORM,
    "init_examples": 50,
    "batch_size": 8,
    "steps": 4,
    "steps_per_eval": 2,
    "steps_per_call": 1,
    "train_examples": 100,
    "test_examples": 20,
    "ema_decay": 0.5,
}


def get_config(variant: str = "weight_norm_init") -> Config:
    """The configuration of one variant."""
    full = {name: merge(FULL, changes) for name, changes in NORMS.items()}
    short = {f"{name}_short": merge({**FULL, **SHORT}, changes) for name, changes in NORMS.items()}
    return Config(**choose({**full, **short, "smoke": {**FULL, **SMOKE}}, variant))


def sweep() -> Iterator[dict[str, Any]]:
    """The shortened protocol."""
    for name in NORMS:
        yield {"variant": f"{name}_short"}
