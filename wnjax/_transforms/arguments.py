"""Calls of a transformed function, which are those of the function itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def params_of_call(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The parameters in a call of `fn`, its first argument, and the other arguments.

    Raises:
      TypeError: if the call lacks the first argument.
    """
    if args:
        return args[0], args[1:], kwargs
    name = next(iter(inspect.signature(fn).parameters), None)
    if name not in kwargs:
        raise TypeError(f"the first argument of the function, {name!r}, is missing: pass params")
    return kwargs[name], (), {key: x for key, x in kwargs.items() if key != name}
