"""What a (g, v) leaf says where it is used as an array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Leaf = TypeVar("Leaf", bound=type)

_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow")
_BITWISE = ("and", "or", "xor", "lshift", "rshift")
_COMPARISONS = ("lt", "le", "gt", "ge")  # not ==, by which trees of labels or axes are compared
_UNARY = ("neg", "pos", "abs", "invert")
# By these jax.numpy and numpy, their operators included, take what is no array of theirs.
_CONVERSIONS = ("jax_array", "array", "array_ufunc")
_REFUSED = (
    *_BINARY,
    *_BITWISE,
    *(f"r{name}" for name in (*_BINARY, *_BITWISE)),
    *_COMPARISONS,
    *_UNARY,
    *_CONVERSIONS,
)


def not_an_array(leaf: Leaf) -> Leaf:
    """Makes a NamedTuple refuse to be used as an array, where a tuple would go along.

    A tuple adds and repeats: `leaf + leaf` would have four entries, and so would `leaf * 2`.

    What tuples need stays: unpacking, an integer or a slice as index, length and equality.

    Args:
      leaf: the class, which is changed in place. `typing.NamedTuple` takes no base class that
        could have these methods.

    Returns:
      The class.
    """
    members: dict[str, Callable[..., Any]] = {f"__{name}__": _refuse for name in _REFUSED}
    for name, member in (members | {"__getitem__": _item, "__getattr__": _attribute}).items():
        setattr(leaf, name, member)
    return leaf


def _refuse(leaf: Any, *_: Any, **__: Any) -> Any:
    raise TypeError(_message(leaf))


def _item(leaf: Any, index: Any) -> Any:
    """An entry of the tuple, or several."""
    try:
        return tuple.__getitem__(leaf, index)
    except TypeError:
        raise TypeError(_message(leaf)) from None


def _attribute(leaf: Any, name: str) -> Any:
    """Called for what the leaf lacks."""
    is_of_arrays = not name.startswith("_") and hasattr(jax.Array, name)
    default = f"{type(leaf).__name__!r} object has no attribute {name!r}"
    raise AttributeError(_message(leaf) if is_of_arrays else default, name=name, obj=leaf)


def _message(leaf: Any) -> str:
    return (
        f"a {type(leaf).__name__} was used as an array. It stands in the parameters for a weight "
        "w = g·v/‖v‖ and holds two arrays: fold the parameters, wnjax.fold(params), or wrap the "
        "function that takes them, wnjax.wrap(fn)"
    )
