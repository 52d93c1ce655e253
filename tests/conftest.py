"""Settings that every test runs under: eight virtual CPU devices, nothing promoted silently."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")


@pytest.fixture(autouse=True)
def nothing_is_promoted():
    """In the tests only: the examples of the docstrings and the README run as a user's would."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_compilation():
    """Without LLVM's optimizations whole networks compile faster, and compute the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
