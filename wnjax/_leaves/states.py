"""States of optimizers: those that wrappers do not take for theirs, and none is a parameter."""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.training.train_state import TrainState


def check_state(state: Any, expected: type, name: str) -> None:
    """Raises TypeError if `state` is no state of the wrapper called `name`.

    It is none after it was restored without a target: Orbax and Flax then give dicts.
    """
    if isinstance(state, expected):
        return
    message = f"{name}: the state must be a {expected.__name__}, got a {type(state).__name__}"
    if isinstance(state, dict):
        raise TypeError(
            f"{message}. A checkpoint that is restored without a target holds dicts: restore it "
            "with optimizer.init(params) as the target"
        )
    raise TypeError(
        f"{message}. In the state of a chain, of optax.masked and the like, find it with "
        f'optax.tree.get(state, "{expected.__name__}")'
    )


def is_state(x: Any) -> bool:
    """Whether a vertex of a tree is the state of an optimizer, or holds one beside parameters."""
    kind = type(x)
    is_named_tuple = isinstance(x, tuple) and hasattr(kind, "_fields")
    is_of_optax = kind.__module__.split(".")[0] in ("optax", "wnjax")
    is_optax_state = is_named_tuple and is_of_optax and kind.__name__.endswith("State")
    return is_optax_state or isinstance(x, TrainState | nnx.OptState)


def refuse_state(path: str, state: Any) -> None:
    """Raises ValueError: `state` stands at `path` in a tree that should be one of parameters."""
    raise ValueError(
        f"{path or 'the tree'} is of the type {type(state).__name__}, which holds the state of an "
        "optimizer: moments are shaped like weights, but are none. Pass the parameters alone, such "
        "as train_state.params or nnx.state(model, nnx.Param)"
    )
