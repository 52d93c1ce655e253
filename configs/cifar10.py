"""CIFAR-10, supervised: section 5.1 of the paper, table 2 and figure 1.

ConvPool-CNN-C as in the authors' code, https://github.com/TimSalimans/weight_norm: noise of 0.15
on the whitened images, three 3x3 convolutions of 96 feature maps, pooling, dropout of 0.5, three
of 192, pooling, dropout, a 3x3 convolution without padding and two 1x1 convolutions of 192, the
average over the image, a dense layer; leaky ReLU of 0.1. The dense layer is normalized like the
others: batch norm and mean-only batch norm stand on the logits too. Adam with √(v + 1e-8) as
denominator, batches of 100, 200 epochs, the learning rate falling linearly to 0 and β₁ from 0.9
to 0.5 from epoch 100 on. Weights are drawn from N(0, 0.05²). 500 images set the scale and the
bias of every neuron, so that all variants start from standardized pre-activations. The network
without normalization has weights w = s·v, with v from Glorot's uniform distribution; data set s
once, s stays fixed, and Adam moves v.

Different from the authors' code: the learning rate falls after every step, not after every
epoch; pixels lie between -1 and 1 before they are whitened, not between -127.5/128 and 127.5/128;
the 500 images are drawn at random. The paper has a row for mean-only batch norm alone, but no
published code for it (the code's mean-only batch norm comes with weight norm); `mean_only` here is
`plain` with mean-only batch norm. The paper chose the learning rate of each row among the four of
the sweep, and does not say which; 0.001 is the default of the authors' code.

Run:      python -m experiments.train --config=configs/cifar10.py:weight_norm_init
Expect:   published test errors in %: plain 8.43, weight_norm_init 8.46, batch_norm 8.05, mean_only
          8.52, weight_norm_mean_only 7.31. We have not trained these at length. Ours with the
          shortened protocol: docs/experiments.md.
Time:     about 2 min for a `_short` run of three seeds on 2 CPU cores (x86-64, jax 0.10.2); a step
          of the whole network takes seconds there
Sweep:    the paper's four learning rates for the variants of its table, and three for every
          `_short` variant, `--config=configs/cifar10.py:*_short` (less than an hour on 2 CPU cores)
Variants: weight_norm_init, plain, weight_norm, weight_norm_fast_gains, batch_norm, mean_only,
          weight_norm_mean_only, weight_norm_init_short, plain_short, weight_norm_short,
          weight_norm_fast_gains_short, batch_norm_short, mean_only_short,
          weight_norm_mean_only_short, smoke
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from experiments.command_line import choose
from experiments.config import VARIANTS, Config, Optimizer, Update, merge
from experiments.tasks.classification import Cifar10

EPOCH = 500  # steps, of 100 images
PUBLISHED = {  # final test error, https://arxiv.org/abs/1602.07868, table 2
    "plain": 0.0843,
    "weight_norm_init": 0.0846,
    "batch_norm": 0.0805,
    "mean_only": 0.0852,
    "weight_norm_mean_only": 0.0731,
}
# The authors' network without normalization: v from Glorot's distribution, a fixed scale from data.
FIXED_SCALE = {"fixed_scale": True, "init_examples": 500, "task": {"weight_std": 0.0}}
NORMS: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "plain": FIXED_SCALE,
    "mean_only": {**VARIANTS["mean_only"], **FIXED_SCALE},
    "weight_norm_fast_gains": {**VARIANTS["weight_norm_init"], "optimizer": {"fast_gains": True}},
}
ADAM = Optimizer(
    name=Update.ADAM,
    learning_rate=0.001,
    late_momentum=0.5,
    decay_from=100 * EPOCH,
    eps=0.0,
    eps_root=1e-8,
)
FULL: dict[str, Any] = {
    "task": Cifar10(),
    "optimizer": ADAM,
    "batch_size": 100,
    "steps": 200 * EPOCH,
    "steps_per_eval": EPOCH,
    "steps_per_call": 0,
}
# For a CPU: a sixth of the feature maps, 8,000 images in batches of 50, 400 steps, the learning
# rate falling over the second half, and three seeds. β₁ stays at 0.9: at 0.5, Adam's steps are 2.5
# times as long where gradients are mostly noise, which few steps into training makes networks
# diverge. 2,000 more training images choose the learning rate.
SHORT: dict[str, Any] = {
    "task": Cifar10(widths=(16, 32, 32)),
    "optimizer": dataclasses.replace(ADAM, late_momentum=-1.0, learning_rate=0.003, decay_from=200),
    "batch_size": 50,
    "steps": 400,
    "steps_per_eval": 100,
    "train_examples": 10_000,
    "validation_examples": 2_000,
    "test_examples": 5_000,
    "seeds": 3,
}
SMOKE: dict[str, Any] = {
    "task": Cifar10(whiten=False, widths=(4, 4, 4)),
    "optimizer": dataclasses.replace(ADAM, decay_from=4),
    **VARIANTS["weight_norm_mean_only"],
    "init_examples": 100,
    "batch_size": 8,
    "steps": 6,
    "steps_per_eval": 2,
    "train_examples": 200,
    "validation_examples": 20,
    "test_examples": 20,
}


def get_config(variant: str = "weight_norm_init") -> Config:
    """The configuration of one variant."""
    full = {name: merge(FULL, changes) for name, changes in NORMS.items()}
    short = {f"{name}_short": merge(SHORT, changes) for name, changes in NORMS.items()}
    for name, error in PUBLISHED.items():
        full[name]["published"] = error
    return Config(**choose({**full, **short, "smoke": SMOKE}, variant))


def sweep() -> Iterator[dict[str, Any]]:
    """The learning rates of the paper for its table; three of them for the shortened protocol."""
    for variant in PUBLISHED:
        for learning_rate in (0.0003, 0.001, 0.003, 0.01):
            yield {"variant": variant, "optimizer.learning_rate": learning_rate}
    for variant in NORMS:
        for learning_rate in (0.001, 0.003, 0.01):
            yield {"variant": f"{variant}_short", "optimizer.learning_rate": learning_rate}
