"""The sources of Python's standard library, byte by byte: a small transformer, beyond the paper.

A decoder-only transformer: 4 blocks of width 128, 4 heads, 128 bytes at once, 0.9 million
parameters. Weight norm in place of layer norm, and together with it; gains, biases and the scale
of every branch come from 32 sequences in the variants with `init`. Adam, batches of 32. The
metric is the cross entropy of held-out files in bits a byte. Releases of Python differ in their
sources, so that numbers compare on one alone.

Run:      python -m experiments.train --config=configs/char_lm.py:weight_norm_init
Expect:   after 600 steps, one seed, in bits a byte: plain 2.70, weight_norm 2.70, weight_norm_init
          2.63, layer_norm 2.58, weight_norm_layer_norm 2.58 (Python 3.11.7). 2,000 steps: not
          measured.
Time:     4 to 5 min for 600 steps on 2 CPU cores (x86-64, jax 0.10.2)
Sweep:    four learning rates for all variants.
Variants: weight_norm_init, plain, weight_norm, weight_norm_init_fast_gains, layer_norm,
          weight_norm_layer_norm, smoke
"""

from collections.abc import Iterator
from typing import Any

from experiments.command_line import choose
from experiments.config import Config, Optimizer, Update, merge
from experiments.networks.layers import ActivationNorm
from experiments.tasks.language import CharLm

NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight_norm": {"weight_norm": True},
    "weight_norm_init": {"weight_norm": True, "init_examples": 32},
    "weight_norm_init_fast_gains": {
        "weight_norm": True,
        "init_examples": 32,
        "optimizer": {"fast_gains": True},
    },
    "layer_norm": {"norm": ActivationNorm.LAYER},
    "weight_norm_layer_norm": {"weight_norm": True, "norm": ActivationNorm.LAYER},
}
FULL: dict[str, Any] = {
    "task": CharLm(),
    "optimizer": Optimizer(name=Update.ADAM, learning_rate=0.001),
    "batch_size": 32,
    "steps": 2000,
    "steps_per_eval": 200,
    "test_examples": 512,
}
SMOKE: dict[str, Any] = {
    "task": CharLm(layers=1, width=8, heads=2, hidden=16, length=16),
    **NORMS["weight_norm_init"],
    "batch_size": 8,
    "steps": 4,
    "steps_per_eval": 2,
    "train_examples": 100,
    "test_examples": 20,
}


def get_config(variant: str = "weight_norm_init") -> Config:
    """The configuration of one variant."""
    return Config(**merge(FULL, choose({**NORMS, "smoke": SMOKE}, variant)))


def sweep() -> Iterator[dict[str, Any]]:
    """What the learning rate does."""
    for variant in NORMS:
        for learning_rate in (0.0003, 0.001, 0.003, 0.01):
            yield {"variant": variant, "optimizer.learning_rate": learning_rate}
