"""The data sets: arrays on the host, one example after the other along the first axis."""

from typing import NamedTuple

import numpy as np

Examples = dict[str, np.ndarray]  # by name, such as "images" and "labels"


class Data(NamedTuple):
    """What a network is trained on, what it is tested on, and what hyperparameters are chosen by.

    There need not be any examples for validation.
    """

    train: Examples
    test: Examples
    validation: Examples | None = None


class DataError(Exception):
    """Data cannot be had or is damaged; the message says which file, and what to do."""
