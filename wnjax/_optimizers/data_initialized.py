"""`data_initialized`: an optimizer whose first step initializes from a minibatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from wnjax._leaves.states import check_state
from wnjax._transforms.data_init import data_init
from wnjax._transforms.moments import AxisName


class DataInitializedState(NamedTuple):
    """The state of `data_initialized`.

    Attributes:
      inner: the optimizer's.
      initialized: a boolean array: whether the first step is done.
    """

    inner: Any
    initialized: Any


def data_initialized(  # noqa: PLR0913 - the options of `data_init` beside its own
    optimizer: optax.GradientTransformation,
    fn: Callable[..., Any],
    *,
    initialized: bool = False,
    std: float | Mapping[str, float] = 1.0,
    mask: Any = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes the first `update` the initialization by `data_init`; all later ones are `optimizer`'s.

    It is one function to compile. The first call leaves the optimizer's state and the
    gradients alone, later ones do not pay for the initialization.

    The state remembers that the first step is done. To go on from a checkpoint, restore the state
    with the parameters; a new state for trained parameters needs `initialized=True`, or its
    first step initializes them again. In `optax.chain` this must come last: what comes after it
    would clip or scale the initialization as if it were a step.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, section 3.

    Args:
      optimizer: of plain parameters, `weight_normalized` for one, or of a tree with (g, v) leaves.
      fn: the forward function `fn(params, batch)`, as for `data_init`.
      initialized: whether the parameters are initialized, or trained, already: then every update
        is one of `optimizer`, and `batch` may be left out.
      std: as for `data_init`.
      mask: as for `data_init`, of that minibatch.
      axis_name: as for `data_init`.

    Returns:
      A gradient transformation. Its `update` needs `params` and, by keyword, `batch`: the
      second argument of `fn`. Only where it is known, outside of `jit`, that the first step
      is done, `batch` may be left out. Other extra arguments are passed on.

    Raises:
      ValueError: by `update`: if `params` or `batch` are missing; and as `data_init`.
      TypeError: by `update`: if the state is not that of `init`, as one that was restored without
        a target.

    >>> import jax, jax.numpy as jnp, optax
    >>> import wnjax
    >>> params = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    >>> def fn(params, x):
    ...     return x @ params["kernel"] + params["bias"]
    >>> optimizer = wnjax.data_initialized(wnjax.weight_normalized(optax.adam(1e-3)), fn)
    >>> state = optimizer.init(params)
    >>> batch = jnp.linspace(1, 9, 101)[:, None]
    >>> updates, state = optimizer.update(params, state, params, batch=batch)
    >>> y = fn(optax.apply_updates(params, updates), batch)
    >>> float(y.std().round(3)), float(abs(y.mean()).round(3))
    (1.0, 0.0)
    """
    inner = optax.with_extra_args_support(optimizer)
    initialize_params = data_init(fn, std=std, mask=mask, axis_name=axis_name)

    def init(params: Any) -> DataInitializedState:
        return DataInitializedState(inner.init(params), jnp.full((), initialized))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        batch: Any = None,
        **extra: Any,
    ) -> tuple[Any, DataInitializedState]:
        check_state(state, DataInitializedState, "data_initialized")
        if params is None:
            raise ValueError("data_initialized sets the params: pass them")
        is_known = not isinstance(state.initialized, jax.core.Tracer)

        def step() -> Any:
            return inner.update(updates, state.inner, params, **extra)

        def initialize() -> Any:
            new = initialize_params(params, batch)
            like = jax.eval_shape(step)[0]
            change = jax.tree.map(lambda a, b, x: (a - b).astype(x.dtype), new, params, like)
            return change, state.inner

        if initialized or (is_known and state.initialized):
            changes, inner_state = step()
        elif batch is None:
            raise ValueError(
                "data_initialized: the first step initializes from a minibatch: pass batch=... to "
                "update; under jit in every step, since there no step is known to be the first. "
                "apply_gradients of Flax's TrainState does not pass it on: write "
                "state.tx.update(grads, state.opt_state, state.params, batch=...) and "
                "optax.apply_updates, or call wnjax.data_init before TrainState.create. For "
                "trained parameters, say initialized=True to data_initialized"
            )
        else:
            changes, inner_state = jax.lax.cond(state.initialized, step, initialize)
        return changes, DataInitializedState(inner_state, jnp.ones((), bool))

    return optax.GradientTransformationExtraArgs(init, update)
