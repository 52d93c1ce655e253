"""What the wrappers of optimizers say of a state that is not theirs."""

from __future__ import annotations

from typing import Any


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
