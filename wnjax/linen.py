"""Weight normalization as Linen modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax.core import lift
from flax.linen import transforms

from wnjax._axes import Axes, Neuron, decide
from wnjax._leaves import flatten
from wnjax._neurons import neurons
from wnjax._weight_norm import fold, weight_norm
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
            function = method if callable(method) else getattr(type(layer), method or "__call__")
            return function(layer, *args, **kwargs)

        lifted = transforms.lift_transform(_normalized, call, self.axes, self.is_initializing())
        return lifted(self.layer_instance, args, kwargs)


def _normalized(fn: Callable[..., Any], axes: Axes | str, init: bool) -> Callable[..., Any]:
    """Lifts a function of scopes: outside, its parameters are nodes; inside, plain weights."""

    def inner(scope_fn: Any, repack: Any, groups: Any, rngs: Any, *call: Any) -> Any:
        params, others = groups

        def run(params: Any, others: Any, call: Any) -> Any:
            scopes = scope_fn((params, others), rngs)
            return fn(scopes, *call), repack(scopes)

        if init:
            _, (plain, _) = run(fold(params), others, call)
            params = _with_new(params, plain, axes, lambda plain: neurons(run, plain, others, call))
        y, (_, others) = wrap(run)(params, others, call)
        return y, (params, others)

    return lift.pack(inner, ("params", True), ("params", True), (True,), name="weight_norm")


def _with_new(params: Any, plain: Any, axes: Any, find: Callable[[Any], Any]) -> Any:
    """`params` and, normalized, those of `plain` that it lacks: a call may make some."""
    old = dict(flatten(_inside(params))[0])
    leaves, treedef = flatten(_inside(plain))
    if not (new := {path: leaf for path, leaf in leaves if path not in old}):
        return params
    found = _inside(find(plain)) if axes == "traced" else axes
    decisions = {path: what for path, _, what in decide(_inside(plain), found) if path in new}
    if old and not any(isinstance(what, Neuron) for what in decisions.values()):
        normalized = new
    else:
        normalized = weight_norm(new, decisions)
    tree = treedef.unflatten((old | normalized)[path] for path, _ in leaves)
    trees = [tree] if len(plain) == 1 else tree
    return tuple({**scope, "params": tree} for scope, tree in zip(plain, trees, strict=True))


def _inside(scopes: Any) -> Any:
    """The parameters alone, of the only scope or of several."""
    trees = [scope.get("params", {}) for scope in scopes]
    return trees[0] if len(trees) == 1 else trees
