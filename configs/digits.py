"""Handwritten digits: the paper's claim in a minute, on real data that a package ships.

Beyond the paper: a small convolutional network on the 1,797 images of 8x8 pixels that come
with scikit-learn (a fifth of them held out), SGD with momentum, three seeds.

Run:      python -m experiments.train --config=configs/digits.py:weight_norm
Variants: plain, weight_norm (the default), batch_norm
"""

from experiments.config import Config, Norm, choose


def get_config(variant: str = "weight_norm") -> Config:
    """The configuration of one variant."""
    return Config(norm=choose(Norm, variant), unroll=True)
