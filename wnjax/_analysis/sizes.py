"""Comparing sizes of values. Under `jax.export` these may be symbols, as for an open batch.

JAX compares symbols where the answer is the same for all their values, and raises elsewhere. Here
what cannot be compared counts as large. (`==` and `!=` never raise: such sizes are not equal.)
"""

from __future__ import annotations

from typing import Any

from jax.errors import InconclusiveDimensionOperation


def is_known(*sizes: Any) -> bool:
    """Whether sizes are numbers, and no symbols."""
    return all(isinstance(size, int) for size in sizes)


def is_less(a: Any, b: Any) -> bool:
    """Whether `a` is less than `b`, for all values of symbols in them."""
    try:
        return bool(a < b)
    except InconclusiveDimensionOperation:
        return False


def is_at_most(a: Any, b: Any) -> bool:
    """Whether `a` is at most `b`, for all values of symbols in them."""
    try:
        return bool(a <= b)
    except InconclusiveDimensionOperation:
        return False


def is_long(size: Any) -> bool:
    """Whether an axis of this size may have more than one position."""
    return not is_at_most(size, 1)


def is_part(a: Any, b: Any) -> bool:
    """Whether `a` is less than `b`, or divides it if they cannot be compared."""
    try:
        return bool(a < b)
    except InconclusiveDimensionOperation:
        return bool(b % a == 0)
