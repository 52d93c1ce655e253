"""What the tests of the experiments share."""

import gzip

import jax
import numpy as np
import pytest

from experiments.datasets.published import CIFAR10, MNIST


@pytest.fixture
def standard_promotion():
    """Optax and flax promote dtypes in training."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """CIFAR-10 and MNIST of noise, in the published formats."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for file in CIFAR10:
        records = random.integers(0, 256, (10_000, 3073), np.uint8)
        records[:, 0] %= 10
        (folder / file).parent.mkdir(exist_ok=True)
        records.tofile(folder / file)
    for file in MNIST:
        count = 60_000 if "train" in file else 10_000
        shape = (count, 28, 28) if "images" in file else (count,)
        values = random.integers(0, 256 if "images" in file else 10, shape, np.uint8)
        write_idx(folder / file, values)
    return folder


def write_idx(file, values):
    """A gzipped IDX file of bytes."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(gzip.compress(header + values.tobytes(), compresslevel=1))
