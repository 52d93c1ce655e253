"""Which cases of a test run on accelerators too: `pytest -m accelerator --accelerator`."""

import pytest


def also_on_accelerators(names, chosen):
    """The names as parameters of a test; the chosen ones carry the mark `accelerator`."""
    assert set(chosen) <= set(names)
    mark = pytest.mark.accelerator
    return [pytest.param(name, marks=mark) if name in chosen else name for name in names]
