"""Handwritten digits: the paper's claim in a minute, on real data that a package ships.

Beyond the paper: a small convolutional network on the 1,797 images of 8x8 pixels that come
with scikit-learn (a fifth of them held out), SGD with momentum, three seeds.

Run:      python -m experiments.train --config=configs/digits.py:weight_norm
Expect:   test error after 400 steps, mean ± std over 3 seeds: plain 3.1 ± 0.0 %, weight_norm
          3.0 ± 0.3 %, batch_norm 1.0 ± 0.2 %. With --config.learning_rate=0.3 and 10 seeds:
          4.7 ± 1.5, 2.8 ± 0.9, 1.4 ± 0.3 %.
Time:     about 20 s on 2 CPU cores, most of it compiling (x86-64, jax 0.10.2).
Variants: plain, weight_norm (the default), batch_norm
"""

from experiments.config import Config, Norm, choose


def get_config(variant: str = "weight_norm") -> Config:
    """The configuration of one variant."""
    return Config(norm=choose(Norm, variant), unroll=True)
