"""Weight normalization as Linen modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import lift
from flax.linen import transforms

from wnjax._axes import Axes, Weight, decide
from wnjax._check_module import check_module
from wnjax._infer_axes import infer_axes
from wnjax._leaves import flatten, is_normalized
from wnjax._mean_only import batch_mean, canonical, centered, running
from wnjax._nodes import norm_dtype
from wnjax._weight_norm import fold, weight_norm
from wnjax._wrap import wrap


class WeightNorm(nn.Module):
    """A module whose weights are normalized: w = g·v/‖v‖.

    A drop-in for `flax.linen.WeightNorm` that computes what the module computed: g is the
    length of the weight that the module's own initializer draws. Where the weights are, and
    over which axes their norms run, is traced when the parameters are made.

    The parameters are the module's own, under their own names, with a `wnjax.WeightNorm` node in
    the place of every weight: `fold` makes plain ones of them, and `weight_norm` makes these
    of plain ones. Inside `shard_map`, keep the fan-in axes whole; `wrap` takes them split.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Attributes:
      layer_instance: the module: a layer, or a whole network.
      axes: which of its parameters are weights, in any form that `weight_norm` takes, with
        paths inside the module; `"traced"` finds them by `infer_axes`.

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

    def __post_init__(self) -> None:
        """Checks the module.

        Raises:
          TypeError: if `layer_instance` is no instance of a Linen module.
        """
        check_module("wnjax.linen.WeightNorm", self.layer_instance, nn.Module)
        super().__post_init__()

    def __getattr__(self, name: str) -> Any:
        """Finds the methods of the module, so that `init` and `apply` take `method="encode"`."""
        layer = self.__dict__.get("layer_instance")
        if not callable(getattr(type(layer), name, None)):
            return super().__getattr__(name)

        def call(self: WeightNorm, *args: Any, **kwargs: Any) -> Any:
            return self(*args, method=name, **kwargs)

        return MethodType(call, self)

    @nn.compact
    def __call__(
        self, *args: Any, method: str | Callable[..., Any] | None = None, **kwargs: Any
    ) -> Any:
        """Calls the module, or one of its methods.

        Args:
          *args: go to the module.
          method: the name of one of its methods, or a function whose first argument it is; else
            `__call__`. At the top level `init` and `apply` take the name.
          **kwargs: go to the module.

        Returns:
          What the module returns.

        Raises:
          ValueError: when the parameters are made: if none of them is a weight, or if the axes
            do not fit them; see `weight_norm` and `infer_axes`.
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
            infer = infer_axes(run)
            params = _with_new(params, plain, axes, lambda plain: infer(plain, others, call))
        function = wrap(run) if is_normalized(params) else run
        y, (_, others) = function(params, others, call)
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
    if old and not any(isinstance(what, Weight) for what in decisions.values()):
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


class MeanOnlyBatchNorm(nn.Module):
    """Batch normalization that takes the mean away, and leaves the variance to weight norm.

        y = x − μ[x] + b

    with μ over all axes but the feature axes, of the minibatch or, with running averages, of
    past ones. The gradient is centered likewise. The layer before it needs no bias.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, section 4.

    Arguments are those of `flax.linen.BatchNorm` that apply; the running mean is `mean` in the
    collection `batch_stats`, in float32 or wider.

    Attributes:
      use_running_average: whether to take the running mean; here or in the call.
      axis: the feature axis, or several.
      momentum: of the running mean: momentum·old + (1 − momentum)·new.
      dtype: of the result; that of the input and the bias unless given.
      param_dtype: of the bias.
      use_bias: whether to add b.
      bias_init: what it starts from.
      axis_name: under `pmap`, `shard_map` or `vmap`, an axis to average over.
      axis_index_groups: groups of devices along it, each with a mean of its own.

    >>> import jax, jax.numpy as jnp
    >>> import wnjax
    >>> layer, x = wnjax.linen.MeanOnlyBatchNorm(momentum=0.9), jnp.array([[1.0], [3.0]])
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
    >>> y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    >>> y, new["batch_stats"]["mean"].round(3)
    (Array([[-1.],
           [ 1.]], dtype=float32), Array([0.2], dtype=float32))
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    bias_init: Callable[..., Any] = nn.initializers.zeros
    axis_name: Any = None
    axis_index_groups: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Centers x.

        Args:
          x: the activations, of any shape that has the feature axes.
          use_running_average: whether to take the running mean.
          mask: booleans that broadcast to x: what the mean is taken over.

        Returns:
          An array of x's shape, of the dtype that Flax's BatchNorm would give it: `dtype`, or that
          of x and the bias together; float32 where both are missing or of integers.
        """
        from_past = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        features = canonical(self.axis, x.ndim)
        shape = [x.shape[axis] for axis in features]
        zeros = partial(jnp.zeros, shape, norm_dtype(x.dtype))
        past = self.variable("batch_stats", "mean", zeros)
        if from_past:
            mean = past.value
        elif self.is_initializing():
            mean = batch_mean(x, features, mask)
        else:
            mean = batch_mean(x, features, mask, self.axis_name, self.axis_index_groups)
            past.value = running(past.value, mean, self.momentum)
        bias = (
            self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        )
        return centered(x, mean, bias, features, self.dtype)
