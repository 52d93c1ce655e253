"""Which cases of a test run on accelerators too: `pytest -m accelerator --accelerator`."""

import pytest


def also_on_accelerators(names, chosen):
    """All names, as parameters of a test, of which those chosen are marked."""
    assert set(chosen) <= set(names)
    mark = pytest.mark.accelerator
    return [pytest.param(name, marks=mark) if name in chosen else name for name in names]
