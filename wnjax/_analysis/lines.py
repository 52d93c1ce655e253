"""Where the user wrote an operation: lines that are neither JAX's, nor Flax's, nor ours."""

from __future__ import annotations

import os
import traceback
from collections.abc import Hashable, Iterable
from typing import Any

import flax
import jax

_JAX = os.path.dirname(jax.__file__) + os.sep
_PACKAGES = (jax.__file__, flax.__file__, os.path.dirname(__file__))
_NOT_USERS = tuple(os.path.dirname(path) + os.sep for path in _PACKAGES)


def line_of_source(sources: Iterable[Any]) -> str:
    """The innermost line of the user that an equation comes from, and its function.

    Args:
      sources: the source of the equation, and those of the equations around it. Of an equation in
        a function of JAX that is traced once for all its calls, only the latter are the user's.
    """
    for source in sources:
        for frame in source.traceback.frames if source.traceback else ():
            if not frame.file_name.startswith(_NOT_USERS):
                return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return "an unknown line"


def line_of_error(error: BaseException) -> str:
    """The innermost line of the user in the traceback of an exception."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_USERS)
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown line"


def is_transposed(source: Any) -> bool:
    """Whether an equation was made by transposing one, as for a gradient.

    The names of the user's own scopes are of another type than those of transformations.
    """
    return any(
        type(part).__name__ == "Transform" and part.name == "transpose"
        for part in source.name_stack.stack
    )


def calls_around_einsum(source: Any) -> Hashable:
    """The lines of the call of `jnp.einsum` that an equation is of, and around; None if of none."""
    frames = source.traceback.frames if source.traceback else ()
    stack = [(frame.file_name, frame.function_name, frame.line_num) for frame in frames]
    of_einsum = [
        i for i, (file, name, _) in enumerate(stack) if name == "einsum" and file.startswith(_JAX)
    ]
    return tuple(stack[of_einsum[0] :]) if of_einsum else None
