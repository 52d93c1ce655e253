"""CIFAR-10, supervised: section 5.1 of the paper, table 2 and figure 1.

ConvPool-CNN-C as in the authors' code: noise of 0.15 on the whitened images, three 3x3
convolutions of 96 feature maps, pooling, dropout of 0.5, three of 192, pooling, dropout, a 3x3
convolution without padding and two 1x1 convolutions of 192, the average over the image, a dense
layer; leaky ReLU of 0.1; weights from N(0, 0.05²); Adam, batches of 100, 200 epochs, the learning
rate falling linearly to 0 and β₁ from 0.9 to 0.5 from epoch 100 on. Gains and biases come from
500 images; the network without normalization is initialized from data as well.

Run:      python -m experiments.train --config=configs/cifar10.py:weight_norm_init
Expect:   published test errors in %: plain 8.43, weight_norm_init 8.46, batch_norm 8.05, mean_only
          8.52, weight_norm_mean_only 7.31. We have not trained these at length. Ours with the
          shortened protocol, on pixels re-encoded as JPEG: plain_short 53.9 ± 1.3,
          weight_norm_init_short 54.7 ± 3.4, batch_norm_short 46.0 ± 0.8, mean_only_short
          48.0 ± 2.0, weight_norm_mean_only_short 49.5 ± 1.5.
Time:     8 min for a short variant, three seeds, on 2 CPU cores (x86-64, jax 0.10.2); a step of
          the whole network takes seconds there
Sweep:    the paper's four learning rates for the variants of its table.
Variants: weight_norm_init, plain, weight_norm, batch_norm, mean_only, weight_norm_mean_only,
          weight_norm_init_short, plain_short, weight_norm_short, batch_norm_short,
          mean_only_short, weight_norm_mean_only_short, smoke
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from experiments.command_line import choose
from experiments.config import VARIANTS, Config, Optimizer, Update
from experiments.tasks.classification import Cifar10

EPOCH = 500  # steps, of 100 images
PUBLISHED = {  # final test error, https://arxiv.org/abs/1602.07868, table 2
    "plain": 0.0843,
    "weight_norm_init": 0.0846,
    "batch_norm": 0.0805,
    "mean_only": 0.0852,
    "weight_norm_mean_only": 0.0731,
}
NORMS = {
    name: {**changes, "published": PUBLISHED.get(name, -1.0)} for name, changes in VARIANTS.items()
}
NORMS["plain"]["init_examples"] = 500
ADAM = Optimizer(name=Update.ADAM, learning_rate=0.001, late_momentum=0.5, decay_from=100 * EPOCH)
# For a CPU: a sixth of the feature maps, a fifth of the images, eight epochs, three times the
# learning rate, and three seeds. β₁ stays at 0.9: at 0.5, Adam's steps are 2.5 times as long where
# gradients are mostly noise, which few steps into training makes networks diverge at this rate.
SHORT = {
    "task": Cifar10(widths=(16, 32, 32)),
    "optimizer": Optimizer(name=Update.ADAM, learning_rate=0.003, decay_from=400),
    "steps": 800,
    "steps_per_eval": 100,
    "train_examples": 10_000,
    "seeds": 3,
}
SMOKE = {
    "task": Cifar10(whiten=False, widths=(4, 4, 4)),
    "optimizer": dataclasses.replace(ADAM, decay_from=4),
    **VARIANTS["weight_norm_mean_only"],
    "init_examples": 100,
    "batch_size": 8,
    "steps": 6,
    "steps_per_eval": 2,
    "train_examples": 200,
    "test_examples": 20,
}


def get_config(variant: str = "weight_norm_init") -> Config:
    """The configuration of one variant."""
    short = {f"{name}_short": {**changes, **SHORT} for name, changes in NORMS.items()}
    changes = choose({**NORMS, **short, "smoke": SMOKE}, variant)
    base = {
        "task": Cifar10(),
        "optimizer": ADAM,
        "batch_size": 100,
        "steps": 200 * EPOCH,
        "steps_per_eval": EPOCH,
    }
    return Config(**{**base, **changes})


def sweep() -> Iterator[dict[str, Any]]:
    """The learning rates of the paper, for every variant of its table."""
    for variant in PUBLISHED:
        for learning_rate in (0.0003, 0.001, 0.003, 0.01):
            yield {"variant": variant, "optimizer.learning_rate": learning_rate}
