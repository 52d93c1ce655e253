"""Weight normalization as Linen modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.core import lift
from flax.linen import transforms

from wnjax._axes import Axes
from wnjax._neurons import neurons
from wnjax._weight_norm import weight_norm
from wnjax._wrap import wrap


class WeightNorm(nn.Module):
    """A module whose weights are normalized: w = g·v/‖v‖.

    A drop-in for `flax.linen.WeightNorm` that computes what the module computed: g is the
    length of the weight that the module's own initializer draws. Where the weights are, and
    over which axes their norms run, is traced when the parameters are made.

    The parameters are the module's own, under their own names, with a `wnjax.WeightNorm` node in
    the place of every weight: `fold` makes plain ones of them, and `weight_norm` makes these
    of plain ones.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Attributes:
      layer_instance: the module: a layer, or a whole network.
      axes: which of its parameters are weights, in any form that `weight_norm` takes, with
        paths inside the module; `"traced"` finds them by `neurons`.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> import wnjax
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return wnjax.linen.WeightNorm(nn.Dense(4))(x)
    >>> params = Net().init(jax.random.key(0), jnp.ones((2, 3)))["params"]
    >>> print(wnjax.summary(params))
    leaf            shape   dtype    normalized
    Dense_0/bias    (4,)    float32  no: a single axis
    Dense_0/kernel  (3, 4)  float32  4 neurons, norm over axes (0,)
    1 of 2 leaves normalized: 4 neurons, 12 of 16 numbers
    """

    layer_instance: nn.Module
    axes: Axes | str = "traced"

    @nn.compact
    def __call__(
        self, *args: Any, method: str | Callable[..., Any] | None = None, **kwargs: Any
    ) -> Any:
        """Calls the module, or one of its methods.

        Args:
          *args: go to the module.
          method: the name of one of its methods, or a function whose first argument it is; else
            `__call__`.
          **kwargs: go to the module.

        Returns:
          What the module returns.

        Raises:
          ValueError: when the parameters are made: if none of them is a weight, or if the axes
            do not fit them; see `weight_norm` and `neurons`.
        """

        def call(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            function = (
                getattr(type(layer), method or "__call__") if not callable(method) else method
            )
            return function(layer, *args, **kwargs)

        lifted = transforms.lift_transform(_normalized, call, self.axes, self.is_initializing())
        return lifted(self.layer_instance, args, kwargs)


def _normalized(fn: Callable[..., Any], axes: Axes | str, init: bool) -> Callable[..., Any]:
    """Lifts a function of scopes: outside, its parameters are nodes; inside, plain weights."""

    def inner(scope_fn: Any, repack: Any, groups: Any, rngs: Any, *call: Any) -> Any:
        (params, others), (args, kwargs) = groups, call

        def run(params: Any, others: Any, args: Any, kwargs: Any) -> Any:
            scopes = scope_fn((params, others), rngs)
            y = fn(scopes, args, kwargs)
            return y, repack(scopes)

        if init and not jax.tree.leaves(params):
            _, (plain, _) = run(params, others, args, kwargs)
            found = neurons(run, plain, others, args, kwargs) if axes == "traced" else axes
            params = weight_norm(plain, found)
        y, (_, others) = wrap(run)(params, others, args, kwargs)
        return y, (params, others)

    return lift.pack(inner, ("params", True), ("params", True), (True,), name="weight_norm")
