"""Weight normalization as Linen modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import EllipsisType, MethodType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import lift
from flax.linen import transforms

from wnjax._analysis.plain_weights import takes_plain_weights
from wnjax._axes.decisions import Axes, FeatureAxes, Weight
from wnjax._leaves.gv import norm_dtype
from wnjax._leaves.trees import flatten, is_normalized, listing, unbox_gv
from wnjax._modules.arguments import (
    BATCH_NORM_INSTEAD,
    WEIGHT_NORM_INSTEAD,
    check_module,
    check_one_form,
    decisions_of,
    refuse,
)
from wnjax._modules.mean_only import batch_mean, canonical, centered, running
from wnjax._transforms.infer_axes import infer_axes
from wnjax._transforms.weight_norm import fold, weight_norm
from wnjax._transforms.wrap import wrap


class WeightNorm(nn.Module):
    """A module whose weights are normalized: w = g·v/‖v‖.

    It takes the place of `flax.linen.WeightNorm`, and computes what the module computed: g is the
    norm of the weight that the module's own initializer draws. Where the weights are, and over
    which axes their norms run, is traced when the parameters are made.

    The parameters are the module's own, at the module's own paths, with a `wnjax.WeightNorm` leaf
    in the place of every weight. So `fold(params)` are the parameters of the same network without
    this wrapper. A module that has a name keeps it. A module without one, as in
    `self.net = WeightNorm(Net())` or at the top, takes the place of the wrapper.
    Inside `shard_map`, keep the fan-in axes whole; `wrap` takes them split.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Attributes:
      layer_instance: the module: a layer, or a whole network. Its methods are methods of the
        wrapper, and compute with the normalized weights.
      epsilon, dtype, param_dtype, scale_init: Flax's; refused with what to write instead.
      use_scale: Flax's; False is refused.
      feature_axes: Flax's: the feature axes of all weights that `variable_filter` chooses; None for
        one norm of the whole weight. Traced unless given.
      variable_filter: Flax's: strings. The path of a weight must contain one of them; None for all.
        The path begins with the module's name. Flax's own {"kernel"} where `feature_axes` is given.
      axes: which of its parameters are weights, in any form that `weight_norm` takes, with
        paths inside the module. It stands for `feature_axes` and `variable_filter`.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> import wnjax
    >>> layer, x = nn.Dense(4), jnp.ones((2, 3))
    >>> normalized = wnjax.linen.WeightNorm(layer)
    >>> params = normalized.init(jax.random.key(0), x)["params"]
    >>> print(wnjax.summary(params))
    leaf    shape   dtype    normalized
    bias    (4,)    float32  no: a single axis
    kernel  (3, 4)  float32  4 neurons, norm over axes (0,)
    1 of 2 leaves normalized: 4 neurons, 12 of 16 numbers
    >>> y = layer.apply({"params": wnjax.fold(params)}, x)
    >>> bool(jnp.allclose(y, normalized.apply({"params": params}, x), rtol=1e-6))
    True
    """

    layer_instance: nn.Module
    epsilon: None = None
    dtype: None = None
    param_dtype: None = None
    use_scale: bool = True
    scale_init: None = None
    feature_axes: FeatureAxes | EllipsisType | None = ...
    variable_filter: Iterable[str] | EllipsisType | None = ...
    axes: Axes = None

    def __post_init__(self) -> None:
        """Checks the arguments.

        Raises:
          TypeError: if `layer_instance` is no instance of a Linen module, or if an argument of
            Flax's is given that has no meaning here.
          ValueError: if both `axes` and one of `feature_axes` and `variable_filter` are given.
        """
        owner = "wnjax.linen.WeightNorm"
        check_module(owner, self.layer_instance, nn.Module)
        names = ("epsilon", "dtype", "param_dtype", "scale_init")
        given = {name: getattr(self, name) for name in names}
        given["use_scale"] = None if self.use_scale else False
        refuse(owner, given, WEIGHT_NORM_INSTEAD)
        check_one_form(owner, self.axes, self.feature_axes, self.variable_filter)
        super().__post_init__()

    def _register_submodules(self, name: str, val: Any) -> None:
        """Lets the parameters be those of the module, at its own paths.

        In `setup` that would be too late for a transformation around the parent.
        """
        super()._register_submodules(name, val)
        if name == "layer_instance" and self.layer_instance.scope is not self.scope:
            nn.share_scope(self, self.layer_instance)

    def __getattr__(self, name: str) -> Any:
        """Finds the methods of the module."""
        layer = self.__dict__.get("layer_instance")
        if not callable(getattr(type(layer), name, None)):
            return super().__getattr__(name)

        def method(self: WeightNorm, *args: Any, **kwargs: Any) -> Any:
            return self._call(name, args, kwargs)

        return MethodType(method, self)

    @nn.nowrap  # Flax would capture its output beside that of the module, under the same name
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with the normalized weights.

        Args:
          *args: go to the module.
          **kwargs: go to the module.

        Returns:
          What the module returns.

        Raises:
          ValueError: when the parameters are made: if none of them is a weight, or if the axes
            do not fit them; see `weight_norm` and `infer_axes`; or if a WeightNorm is inside the
            module. Later, if all parameters are plain: pass them through `weight_norm` first.
        """
        return self._call("__call__", args, kwargs)

    def _call(self, name: str, args: Any, kwargs: Any) -> Any:
        def call(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            return getattr(layer, name)(*args, **kwargs)

        lifted = transforms.lift_transform(_normalized, call, self)
        return lifted(self.layer_instance, args, kwargs)

    def _decisions(self, scopes: Any, infer: Callable[[Any], Any]) -> dict[str, Any]:
        """What the parameters of the scopes are."""
        chosen = self.variable_filter
        if isinstance(chosen, EllipsisType):
            chosen = None if self.feature_axes is ... else ("kernel",)

        def is_selected(path: str) -> bool:
            return not chosen or any(
                part in f"{self.layer_instance.name}/{path}" for part in chosen
            )

        params, find = _inside(scopes), lambda _: _inside(infer(scopes))
        return decisions_of(params, self.axes, self.feature_axes, is_selected, find)


def _normalized(fn: Callable[..., Any], module: WeightNorm) -> Callable[..., Any]:
    """Lifts a function of scopes: outside, weights are (g, v) leaves; inside, they are plain."""
    is_init = module.is_initializing()

    def inner(scope_fn: Any, repack: Any, groups: Any, rngs: Any, *call: Any) -> Any:
        params, others = groups

        def run(params: Any, others: Any, call: Any) -> Any:
            scopes = scope_fn((params, others), rngs)
            return fn(scopes, *call), repack(scopes)

        def decide(plain: Any) -> Any:
            return module._decisions(plain, lambda plain: infer_axes(run)(plain, others, call))

        if is_init:
            _, (plain, _) = run(fold(params), others, call)
            params = _with_new(params, plain, decide)
        elif not takes_plain_weights():
            _check_not_plain(params, decide, module.layer_instance.path)
        function = wrap(run) if is_normalized(params) else run
        y, (_, others) = function(params, others, call)
        return y, (params, others)

    return lift.pack(inner, ("params", True), ("params", True), (True,), name="weight_norm")


def _with_new(params: Any, plain: Any, decide: Callable[[Any], Any]) -> Any:
    """`params` and, normalized, those of `plain` that it lacks: a call may make some."""
    old = dict(flatten(_inside(params))[0])
    leaves, treedef = flatten(_inside(plain))
    if not (new := {path: leaf for path, leaf in leaves if path not in old}):
        return params
    if inside := [path for path, leaf in new.items() if unbox_gv(leaf) is not None]:
        raise ValueError(
            "wnjax.linen.WeightNorm: a WeightNorm inside the module has normalized these already, "
            f"and no weight may be normalized twice:{listing(inside)}"
        )
    decisions = {path: what for path, what in decide(plain).items() if path in new}
    if old and not any(isinstance(what, Weight) for what in decisions.values()):
        normalized = new
    else:
        normalized = weight_norm(new, decisions)
    tree = treedef.unflatten((old | normalized)[path] for path, _ in leaves)
    trees = [tree] if len(plain) == 1 else tree
    return tuple({**scope, "params": tree} for scope, tree in zip(plain, trees, strict=True))


def _check_not_plain(params: Any, decide: Callable[[Any], Any], path: tuple[str, ...]) -> None:
    """Finds parameters that never went through `weight_norm`."""
    leaves = flatten(_inside(params))[0]
    if leaves and all(unbox_gv(leaf) is None for _, leaf in leaves):
        axes = {
            "/".join((*path, inside)): what.feature_axes
            for inside, what in decide(params).items()
            if isinstance(what, Weight)
        }
        raise ValueError(
            "wnjax.linen.WeightNorm: these parameters are plain weights. To train them normalized, "
            f"write\n  params = wnjax.weight_norm(params, {axes})\nwith the weights of every "
            "WeightNorm in it. To serve folded weights, apply the module without WeightNorm"
        )


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

    Arguments are those of `flax.linen.BatchNorm`, in their order; those about the variance and the
    scale are refused with what to write instead. The running mean is `mean` in the collection
    `batch_stats`, in float32 or wider.

    Attributes:
      use_running_average: whether to take the running mean; here or in the call.
      axis: the feature axis, or several.
      momentum: of the running mean: momentum·old + (1 − momentum)·new.
      epsilon, scale_init, use_fast_variance: refused.
      dtype: of the result; that of the input and the bias unless given.
      param_dtype: of the bias.
      use_bias: whether to add b.
      use_scale: False; True is refused.
      bias_init: what b starts from.
      axis_name: under `pmap`, `shard_map` or `vmap`, an axis to average over.
      axis_index_groups: groups of devices along it, each with a mean of its own.
      force_float32_reductions: True; False is refused.

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
    epsilon: None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = False
    bias_init: Callable[..., Any] = nn.initializers.zeros
    scale_init: None = None
    axis_name: Any = None
    axis_index_groups: Any = None
    use_fast_variance: None = None
    force_float32_reductions: bool = True

    def __post_init__(self) -> None:
        """Checks the arguments.

        Raises:
          TypeError: if an argument of Flax's is given that has no meaning here.
        """
        given = {
            name: getattr(self, name) for name in ("epsilon", "scale_init", "use_fast_variance")
        }
        given["use_scale"] = self.use_scale or None
        given["force_float32_reductions"] = None if self.force_float32_reductions else False
        refuse("wnjax.linen.MeanOnlyBatchNorm", given, BATCH_NORM_INSTEAD)
        super().__post_init__()

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
