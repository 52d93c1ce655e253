"""Settings that every test runs under: eight virtual CPU devices, nothing promoted silently.

With --accelerator tests run on the device that JAX takes by default, compiled as for users.
"""

import os
import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Programs are compiled in one part, since several pay for large ones alone; and without XLA's
# fusion emitters, which take a third of the time. The newest JAX has those: it does not know the
# flag, and ends where it finds it.
FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
# Many cases come down to one program: containers and transforms differ, what is computed does not.
# A cache for each process, since JAX does not write its files atomically.
PROGRAMS = tempfile.TemporaryDirectory(prefix="wnjax-tests-")
jax.config.update("jax_compilation_cache_dir", PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_addoption(parser):
    text = "run on JAX's default device: with -m accelerator, tests that are made for any"
    parser.addoption("--accelerator", action="store_true", help=text)


def pytest_configure(config):
    if config.getoption("--accelerator"):
        return
    jax.config.update("jax_platforms", "cpu")
    # LLVM's optimizations would take much of the time; tests of exact numbers compile with them.
    jax.config.update("jax_disable_most_optimizations", True)


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


@pytest.fixture(scope="module")
def optimized():
    """Compiles the tests of a module with LLVM's optimizations, as users do.

    The bits of results depend on it, and JAX's caches in memory do not: a program that was compiled
    one way would go on to serve where the other is asked for.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", before)
