"""Whether modules with weight norm are called for plain weights, as while a function is traced."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_PLAIN = contextvars.ContextVar("plain weights are meant", default=False)


@contextlib.contextmanager
def plain_weights() -> Iterator[None]:
    """Inside, `wnjax.linen.WeightNorm` takes plain weights: a transformation folds them."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def takes_plain_weights() -> bool:
    """Whether this is inside `plain_weights`."""
    return _PLAIN.get()
