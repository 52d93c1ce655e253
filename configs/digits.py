"""Handwritten digits: the paper's claim in a minute, on real data that a package ships.

Beyond the paper: a small convolutional network on the 1,797 images of 8x8 pixels that come
with scikit-learn (a fifth of them held out), SGD with momentum, three seeds. Gains and biases of
`weight_norm_init` and `weight_norm_mean_only` come from 500 images.

Run:      python -m experiments.train --config=configs/digits.py:weight_norm
Expect:   test error after 400 steps, mean ± std over 3 seeds: plain 3.2 ± 0.2 %, weight_norm
          2.9 ± 0.2 %, weight_norm_init 2.8 ± 1.0 %, batch_norm 0.9 ± 0.3 %, mean_only
          2.7 ± 0.3 %, weight_norm_mean_only 2.1 ± 0.4 %, weight_norm_fast_gains 3.4 ± 0.3 %. With
          --config.optimizer.learning_rate=0.3 and --config.seeds=10: plain 5.5 ± 1.3,
          weight_norm 2.8 ± 0.7, batch_norm 1.4 ± 0.3 %.
Time:     about 20 s on 2 CPU cores, most of it compiling (x86-64, jax 0.10.2).
Sweep:    the learning rate and three of the variants: docs/experiments.md.
Variants: weight_norm, plain, weight_norm_init, weight_norm_fast_gains, batch_norm, mean_only,
          weight_norm_mean_only, smoke
"""

from collections.abc import Iterator
from typing import Any

from experiments.command_line import choose
from experiments.config import VARIANTS, Config, Optimizer, merge
from experiments.tasks.classification import Digits

FAST_GAINS = {"weight_norm": True, "optimizer": {"fast_gains": True}}
SMOKE = {"weight_norm": True, "init_examples": 128, "steps": 4, "steps_per_eval": 2}
SMOKE |= {"steps_per_call": 1, "unroll": False, "seeds": 2, "batch_size": 8}


def get_config(variant: str = "weight_norm") -> Config:
    """The configuration of one variant."""
    changes = choose({**VARIANTS, "weight_norm_fast_gains": FAST_GAINS, "smoke": SMOKE}, variant)
    # Initialized from data, the dense layer after the average over the image has large gains: at
    # 0.1, one network of six does not learn (17 ± 29 % with 6 seeds; 2.6 ± 0.9 % at 0.03).
    learning_rate = 0.03 if variant == "weight_norm_init" else 0.1
    task = Digits(widths=(4, 8)) if variant == "smoke" else Digits()
    base = {
        "optimizer": Optimizer(learning_rate=learning_rate),
        "batch_size": 64,
        "steps": 400,
        "steps_per_eval": 20,
        "steps_per_call": 10,
        "unroll": True,
        "evals_per_save": 10,
        "seeds": 3,
    }
    return Config(task=task, **merge(base, changes))


def sweep() -> Iterator[dict[str, Any]]:
    """Three learning rates for three variants, ten seeds each."""
    for variant in ("plain", "weight_norm", "batch_norm"):
        for learning_rate in (0.03, 0.1, 0.3):
            yield {"variant": variant, "optimizer.learning_rate": learning_rate, "seeds": 10}
