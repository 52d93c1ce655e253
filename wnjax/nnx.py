"""Weight normalization as NNX modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wnjax._axes import Axes, Weight, canonical_axes, decide
from wnjax._axis_name import check_split
from wnjax._check_module import check_module
from wnjax._infer_axes import infer_axes
from wnjax._leaves import as_apart, box_node, flatten, listing, rebox, unbox, unbox_node
from wnjax._mean_only import batch_mean, canonical, centered, running
from wnjax._nodes import LogWeightNorm, fan_in_axes, gain_axes
from wnjax._nodes import WeightNorm as Node
from wnjax._weight_norm import fold, weight_norm


class WeightNorm(nnx.Module):
    """A module whose weights are normalized: w = g·v/‖v‖.

    A drop-in for `flax.nnx.WeightNorm` that computes what the module computed, whose g is among
    the `nnx.Param`s and trains, and which never writes to v. The module's own Params
    hold v where they held w; the Params in `g` have the same paths, v's rank, and
    size 1 on the fan-in axes.

    Which Params are weights, and over which axes their norms run, is traced when the module is
    first called. Until then Flax's naming rules hold; they are right for `nnx.Linear`, `nnx.Conv`,
    `nnx.MultiHeadAttention` and, by their biases, for stacks of these, so that an optimizer may be
    made at once. Where the rules were wrong, the first call takes the norms anew without changing
    the function; make optimizers after it, or pass `axes`. Params that hold `wnjax.WeightNorm`
    nodes already, as after `nnx.update(module, wnjax.pytorch.from_state_dict(...))`, keep their g
    and v. Inside `shard_map`, keep the fan-in axes whole; `wrap` takes them split.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Attributes:
      layer_instance: the module, with v in the place of its weights.
      g: the gains: nested dicts of `nnx.Param`, by the paths of the weights.
      fan_in_axes: of every weight, by its path, counted from the end.
      needs_check: whether tracing has not yet confirmed the axes.

    >>> import jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> import wnjax
    >>> layer = wnjax.nnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    >>> layer(jnp.ones((2, 3))).shape
    (2, 4)
    >>> layer.g["kernel"].shape
    (1, 4)
    >>> optimizer = nnx.Optimizer(layer, optax.adam(1e-3), wrt=nnx.Param)
    >>> grads = nnx.grad(lambda layer: layer(jnp.ones((2, 3))).sum())(layer)
    >>> _ = optimizer.update(layer, grads)
    """

    def __init__(self, layer_instance: nnx.Module, axes: Axes | str = "traced"):
        """Normalizes a module.

        Args:
          layer_instance: the module: a layer, or a whole network. It becomes part of this one.
          axes: which of its Params are weights, in any form that `wnjax.weight_norm` takes, with
            paths inside the module; `"traced"` finds them by `wnjax.infer_axes` at the first call.

        Raises:
          ValueError: if no Param is a weight, or if the axes do not fit; see `weight_norm`. If
            axes are given for Params that are nodes already, or one of these is a `LogWeightNorm`.
          TypeError: if `layer_instance` is no instance of an NNX module.
        """
        check_module("wnjax.nnx.WeightNorm", layer_instance, nnx.Module)
        self.layer_instance = layer_instance
        self.g: Any = nnx.Dict()
        self.fan_in_axes: tuple[tuple[str, tuple[int, ...]], ...] = ()
        self.needs_check = isinstance(axes, str) and axes == "traced"
        params = nnx.state(layer_instance, nnx.Param)
        if any(unbox_node(box) is not None for _, box in flatten(params)[0]):
            self._take_given(params)
            return
        chosen: Any = None if self.needs_check else axes
        decided = decide(params, chosen, is_provisional=self.needs_check)
        decisions = {path: what for path, _, what in decided}
        if not self.needs_check or any(isinstance(what, Weight) for what in decisions.values()):
            self._take(weight_norm(params, decisions))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module, or one of its methods.

        Args:
          *args: go to the module.
          **kwargs: go to the module, but for `method`: the name of one of its methods, or a
            function whose first argument it is, to be called instead of `__call__`.

        Returns:
          What the module returns.

        Raises:
          ValueError: if this is the first call, in `jit` or another transformation, and tracing
            finds other axes than the naming rules did; or if no Param is a weight.
        """
        if self.needs_check:
            self._check(args, kwargs)
        layer = self.folded()
        result = _call(layer, args, kwargs)
        nnx.update(self.layer_instance, _changed(layer, self.layer_instance))
        return result

    def folded(self) -> Any:
        """The module with plain weights w = g·v/‖v‖: a copy, which is what one serves."""
        graph, _, rest = _split(self.layer_instance)
        return nnx.merge(graph, fold(self.nodes()), rest, copy=True)

    def nodes(self) -> Any:
        """The Params of the module, an `nnx.State`, with nodes in the place of its weights.

        It is what `norms`, `summary` and `wnjax.pytorch.to_state_dict` take. The way back is
        `nnx.update` of a plain module with it, and `WeightNorm` of that.
        """
        gains = dict(flatten(nnx.state(self.g, nnx.Param))[0])
        boxes, treedef = flatten(nnx.state(self.layer_instance, nnx.Param))
        nodes = {path: Node(unbox(gains[path]), unbox(box)) for path, box in boxes if path in gains}
        self._check_shapes(nodes)
        for path, (g, v) in nodes.items():
            check_split(path, None, v, g)
        return treedef.unflatten(
            box_node(box, nodes[path], gain_axes(nodes[path])) if path in nodes else box
            for path, box in boxes
        )

    def _check_shapes(self, nodes: dict[str, Node]) -> None:
        """Finds an optimizer whose state, of other shapes, has broadcast the gains."""
        for path, fan_in in self.fan_in_axes:
            g, v = nodes[path]
            if any(g.shape[axis] != 1 for axis in fan_in):  # from the end: g may be stacked
                raise ValueError(
                    f"WeightNorm: the gain of {path} has shape {g.shape} beside v of shape "
                    f"{v.shape}, but the fan-in axes are {fan_in}. An optimizer that was made "
                    "before the first call has stretched it: make the optimizer after that"
                )

    def _take(self, tree: Any) -> None:
        """Takes g and v from the nodes of a state of the module's Params."""
        gains: dict[str, Any] = {}
        vs, fan_in = [], []
        boxes, treedef = flatten(tree)
        for path, box in boxes:
            if (node := unbox_node(box)) is None:
                vs.append(box)
                continue
            outer_g, outer_v = (box.g, box.v) if isinstance(box, Node) else (box, box)
            *modules, name = path.split("/")
            place = gains
            for module in modules:
                place = place.setdefault(module, {})
            place[name] = as_apart(rebox(outer_g, node[0]))
            vs.append(rebox(outer_v, node.v))
            fan_in.append((path, tuple(axis - node.v.ndim for axis in fan_in_axes(node))))
        nnx.update(self.layer_instance, treedef.unflatten(vs))
        self.g, self.fan_in_axes = _dicts(gains), tuple(fan_in)

    def _take_given(self, params: Any) -> None:
        """Takes the nodes that the Params hold already, and no others."""
        nodes = {path: unbox_node(box) for path, box in flatten(params)[0]}
        if not self.needs_check:
            raise ValueError(
                "WeightNorm: these Params are nodes already, which say their axes: leave axes out"
                + listing(path for path, node in nodes.items() if node is not None)
            )
        if others := [path for path, node in nodes.items() if isinstance(node, LogWeightNorm)]:
            raise ValueError(f"WeightNorm: g is learned as it is, not as log_g:{listing(others)}")
        self._take(params)
        self.needs_check = False

    def _check(self, args: Any, kwargs: Any) -> None:
        """Compares the gains with what tracing finds, and takes them anew if they differ."""
        layer = self.folded()
        params, found = _traced(layer, args, kwargs)
        features = {
            path: canonical_axes(path, leaf, what.feature_axes)
            for path, leaf, what in decide(params, found)
            if isinstance(what, Weight)
        }
        weights = {path: unbox(box) for path, box in flatten(params)[0]}
        wanted = {
            path: tuple(n if i in axes else 1 for i, n in enumerate(weights[path].shape))
            for path, axes in features.items()
        }
        shapes = {path: unbox(g).shape for path, g in flatten(nnx.state(self.g, nnx.Param))[0]}
        values = jax.tree.leaves((nnx.state(self.layer_instance), args, kwargs))
        is_transformed = any(isinstance(value, jax.core.Tracer) for value in values)
        if wanted != shapes and is_transformed:
            differing = [path for path in wanted | shapes if wanted.get(path) != shapes.get(path)]
            raise ValueError(
                "WeightNorm: tracing finds other feature axes than Flax's naming rules for these "
                f"Params:{listing(differing)}\nCall the module once outside of jit, grad and other "
                "transformations, before an optimizer is made, or pass axes to WeightNorm"
            )
        if wanted != shapes or not features:
            self._take(weight_norm(params, found))
        if not is_transformed:  # in jit, a change of what is static would compile the next call
            self.needs_check = False


def _traced(layer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The Params of a plain module, and what tracing a call finds them to be."""
    graph, params, rest = _split(layer)

    def fn(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        merged = nnx.merge(graph, params, rest, copy=True)
        result = _call(merged, args, kwargs)
        return result, nnx.state(merged, nnx.Not(nnx.Param))

    return params, infer_axes(fn)(params, rest, args, kwargs)


def _changed(layer: Any, before: Any) -> Any:
    """What a call changed in the state of a module, its Params aside."""
    state = nnx.to_flat_state(nnx.state(layer, nnx.Not(nnx.Param)))
    old = dict(nnx.to_flat_state(nnx.state(before, nnx.Not(nnx.Param))))

    def is_new(path: Any, variable: Any) -> bool:
        return path not in old or old[path].get_value() is not variable.get_value()

    return nnx.from_flat_state([(path, x) for path, x in state if is_new(path, x)])


def _split(layer: Any) -> Any:
    """What is static of a module, its Params, and the rest of its state."""
    return nnx.split(layer, nnx.Param, ...)


def _call(layer: Any, args: Any, kwargs: Any) -> Any:
    kwargs = dict(kwargs)
    method = kwargs.pop("method", None)
    if callable(method):
        return method(layer, *args, **kwargs)
    return getattr(layer, method or "__call__")(*args, **kwargs)


def _dicts(tree: Any) -> Any:
    return nnx.Dict({k: _dicts(x) for k, x in tree.items()}) if isinstance(tree, dict) else tree


class MeanOnlyBatchNorm(nnx.Module):
    """Batch normalization that takes the mean away, and leaves the variance to weight norm.

        y = x − μ[x] + b

    with μ over all axes but the feature axis, of the minibatch or, with running averages, of
    past ones. The gradient is centered likewise. The layer before it needs no bias.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, section 4.

    Arguments are those of `flax.nnx.BatchNorm` that apply; `model.eval()` and `model.train()`
    choose between running averages and the minibatch.

    Attributes:
      mean: the running mean, an `nnx.BatchStat` of shape (num_features,), float32.
      bias: b, an `nnx.Param` of shape (num_features,), or None.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import wnjax
    >>> layer = wnjax.nnx.MeanOnlyBatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0], [3.0]]))
    Array([[-1.],
           [ 1.]], dtype=float32)
    >>> layer.mean[...].round(3)
    Array([0.2], dtype=float32)
    """

    def __init__(  # noqa: PLR0913 - the arguments of nnx.BatchNorm
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        bias_init: Callable[..., Any] = jax.nn.initializers.zeros,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        """Takes the size of the feature axis, and the arguments of `flax.nnx.BatchNorm`."""
        self.mean = nnx.BatchStat(jnp.zeros(num_features, jnp.float32))
        self.bias: Any = nnx.data(None)
        if use_bias:
            bias = bias_init(rngs.params(), (num_features,), param_dtype)
            self.bias = nnx.Param(bias, **bias_metadata)
        self.num_features, self.axis, self.momentum = num_features, axis, momentum
        self.use_running_average, self.dtype = use_running_average, dtype
        self.axis_name, self.axis_index_groups = axis_name, axis_index_groups

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Centers x.

        Args:
          x: the activations, of any shape that has the feature axis.
          use_running_average: whether to take the running mean; the module's choice unless given.
          mask: booleans that broadcast to x: what the mean is taken over.

        Returns:
          An array of x's shape, of the dtype that Flax's BatchNorm would give it: `dtype`, or that
          of x and the bias together; float32 where both are missing or of integers.

        Raises:
          ValueError: if neither the call nor the module says which mean to take.
        """
        chosen = self.use_running_average if use_running_average is None else use_running_average
        if chosen is None:
            raise ValueError(
                "MeanOnlyBatchNorm: pass use_running_average=True or False, to the module or to "
                "the call, or call model.train() or model.eval()"
            )
        features = canonical(self.axis, x.ndim)
        mean = self.mean[...]
        if not chosen:
            mean = batch_mean(x, features, mask, self.axis_name, self.axis_index_groups)
            self.mean[...] = running(self.mean[...], jax.lax.stop_gradient(mean), self.momentum)
        bias = None if self.bias is None else self.bias[...]
        return centered(x, mean, bias, features, self.dtype)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Used by `nnx.view`.

        Args:
          use_running_average: whether to take the running mean.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
