"""Weight normalization as NNX modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from functools import partial
from types import EllipsisType, MappingProxyType, MethodType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wnjax._axes.decisions import Axes, Decision, FeatureAxes, NotWeight, Weight
from wnjax._leaves.gv import LogWeightNorm, gain_axes, is_weight_norm
from wnjax._leaves.gv import WeightNorm as GVLeaf
from wnjax._leaves.trees import (
    as_apart,
    box_gv,
    flatten,
    is_box,
    listing,
    rebox,
    unbox,
    unbox_gv,
)
from wnjax._modules.arguments import (
    BATCH_NORM_INSTEAD,
    WEIGHT_NORM_INSTEAD,
    check_module,
    check_one_form,
    decisions_of,
    refuse,
)
from wnjax._modules.mean_only import batch_mean, canonical, centered, running
from wnjax._transforms.weight_norm import fold, weight_norm


class WeightNorm(nnx.Module):
    """A module whose weights are normalized: w = g·v/‖v‖.

    It takes the place of `flax.nnx.WeightNorm`, and computes what the module computed. g is among
    the `nnx.Param`s and trains, and a call never writes to v. Where the module's own attribute held
    a weight, as in `layer.kernel`, there is a `wnjax.WeightNorm` of two Params now, g and v. g has
    v's rank, and size 1 on the fan-in axes. The paths of a state end in `kernel/g` and `kernel/v`.
    A module that is used past this one meets that leaf, which is no array: it never computes with v
    alone.

    Attributes and methods of the module are attributes and methods of this one. Methods compute
    with the normalized weights, on a copy of the module, from which state such as running
    statistics comes back; so do `model(x)` and `model.encode(x)`.

    The layers of Flax tell which of their Params are weights, and over which axes their norms run,
    in stacks made by `nnx.vmap` along leading axes, too. Of other modules, pass `axes`. Params
    that hold `wnjax.WeightNorm` leaves already, as after
    `nnx.update(module, wnjax.pytorch.from_state_dict(...))`, keep their g and v. A checkpoint of
    the plain module goes into that: `nnx.update(layer, state)`, and then `WeightNorm(layer)`.
    Inside `shard_map`, keep the fan-in axes whole; `wrap` takes them split.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Attributes:
      layer_instance: the module, with g and v in the place of its weights.

    >>> import jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> import wnjax
    >>> layer = wnjax.nnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    >>> layer(jnp.ones((2, 3))).shape
    (2, 4)
    >>> layer.kernel.g.shape, layer.in_features
    ((1, 4), 3)
    >>> optimizer = nnx.Optimizer(layer, optax.adam(1e-3), wrt=nnx.Param)
    >>> grads = nnx.grad(lambda layer: layer(jnp.ones((2, 3))).sum())(layer)
    >>> _ = optimizer.update(layer, grads)
    """

    def __init__(  # noqa: PLR0913 - the arguments of nnx.WeightNorm
        self,
        layer_instance: nnx.Module,
        *,
        axes: Axes = None,
        feature_axes: FeatureAxes | EllipsisType | None = ...,
        variable_filter: Any = ...,
        use_scale: bool = True,
        rngs: nnx.Rngs | None = None,
        **refused: None,
    ):
        """Normalizes a module.

        Args:
          layer_instance: the module: a layer, or a whole network. It becomes part of this one.
          axes: which of its Params are weights, in any form that `wnjax.weight_norm` takes, with
            paths inside the module. It stands for `feature_axes` and `variable_filter`.
          feature_axes: Flax's: the feature axes of all weights that `variable_filter` chooses; None
            for one norm of the whole weight. The layers tell them unless given.
          variable_filter: Flax's: an NNX filter of the Params. Flax's own
            `nnx.PathContains("kernel")` where `feature_axes` is given, else all.
          use_scale: Flax's; False is refused.
          rngs: Flax's; nothing random is drawn.
          **refused: `epsilon`, `dtype`, `param_dtype`, `scale_init` and `promote_dtype` of Flax:
            refused with what to write instead.

        Raises:
          ValueError: if no Param is a weight, or if the axes do not fit; see `weight_norm`. If a
            Param of two axes or more is not of a layer of Flax, and no argument says what it is. If
            axes are given twice, or for Params that are (g, v) leaves already, or one of these is a
            `LogWeightNorm`. If a WeightNorm is inside the module.
          TypeError: if `layer_instance` is no instance of an NNX module, or if an argument of
            Flax's is given that has no meaning here.
        """
        owner = "wnjax.nnx.WeightNorm"
        check_module(owner, layer_instance, nnx.Module)
        given = {**refused, "use_scale": None if use_scale else False}
        refuse(owner, given, WEIGHT_NORM_INSTEAD)
        check_one_form(owner, axes, feature_axes, variable_filter)
        _check_not_inside(layer_instance)
        params = nnx.state(layer_instance, nnx.Param)
        normalized = params
        if gv_leaves := {path: gv for path, x in flatten(params)[0] if (gv := unbox_gv(x))}:
            _check_given(gv_leaves, axes is None and feature_axes is ... and variable_filter is ...)
        else:
            if feature_axes is not ... and variable_filter is ...:
                variable_filter = nnx.PathContains("kernel")
            chosen = nnx.filterlib.to_predicate(variable_filter)
            selected = {_slash(path) for path, x in nnx.to_flat_state(params) if chosen(path, x)}
            find = partial(_told_by_layers, layer_instance, selected)
            decisions = decisions_of(params, axes, feature_axes, selected.__contains__, find)
            normalized = weight_norm(params, decisions)
        old, new = (dict(flatten(tree)[0]) for tree in (params, normalized))
        pairs = {path: as_pair(leaf) for path, leaf in new.items() if unbox_gv(leaf)}
        _put(layer_instance, {id(old[path]): pair for path, pair in pairs.items()})
        self.layer_instance = layer_instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with the normalized weights.

        Args:
          *args: go to the module.
          **kwargs: go to the module.

        Returns:
          What the module returns.
        """
        return self._call("__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Finds the attributes and methods of the module."""
        layer = self.__dict__.get("layer_instance")
        if layer is None:  # while a copy is made
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if name in vars(layer) or not callable(getattr(type(layer), name, None)):
            return getattr(layer, name)

        def method(self: WeightNorm, *args: Any, **kwargs: Any) -> Any:
            return self._call(name, args, kwargs)

        return MethodType(method, self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets the attributes of the module that it has."""
        layer = self.__dict__.get("layer_instance")
        is_own = layer is None or name in self.__dict__ or not hasattr(layer, name)
        super().__setattr__(name, value) if is_own else setattr(layer, name, value)

    def _call(self, name: str, args: Any, kwargs: Any) -> Any:
        layer, originals = self.folded(), dict(nnx.iter_graph(self.layer_instance))
        pairs = [(x, originals[path]) for path, x in nnx.iter_graph(layer) if path in originals]
        result = getattr(layer, name)(*args, **kwargs)
        _bring_back(pairs)
        return self if result is layer else result

    def folded(self) -> Any:
        """The module with plain weights w = g·v/‖v‖: a copy, which is what one serves."""
        layer = nnx.clone(self.layer_instance)
        gv_leaves = {_slash(path): x for path, x in nnx.iter_graph(layer) if is_weight_norm(x)}
        weights = fold(gv_leaves)
        _put(layer, {id(gv.v): weights[path] for path, gv in gv_leaves.items()})
        return layer

    def normalized(self) -> Any:
        """The Params of the module, an `nnx.State`, with (g, v) leaves in the place of its weights.

        It is what `norms`, `summary` and `wnjax.pytorch.to_state_dict` take. The way back is
        `nnx.update` of a plain module with it, and `WeightNorm` of that.
        """
        flat = dict(nnx.to_flat_state(nnx.state(self.layer_instance, nnx.Param)))
        for path, x in nnx.iter_graph(self.layer_instance):
            if is_weight_norm(x) and flat.pop((*path, "g"), None):  # once, if it is shared
                gv = GVLeaf(*map(unbox, x))
                flat[path] = box_gv(flat.pop((*path, "v")), gv, gain_axes(gv))
        return nnx.from_flat_state(flat)


def _slash(path: Any) -> str:
    return "/".join(map(str, path))


def _check_not_inside(module: nnx.Module) -> None:
    kinds = (WeightNorm, nnx.WeightNorm)
    if inside := [_slash(path) for path, x in nnx.iter_graph(module) if isinstance(x, kinds)]:
        raise ValueError(
            "WeightNorm: the module has WeightNorms inside, and no weight may be normalized twice. "
            f"(wnjax.convert.from_nnx takes the place of Flax's.){listing(inside)}"
        )


def _check_given(gv_leaves: Mapping[str, Any], is_alone: bool) -> None:
    """Checks Params that are (g, v) leaves already."""
    if not is_alone:
        raise ValueError(
            "WeightNorm: these Params are (g, v) leaves already, which say their axes: leave axes "
            f"out{listing(gv_leaves)}"
        )
    if others := [path for path, gv in gv_leaves.items() if isinstance(gv, LogWeightNorm)]:
        raise ValueError(f"WeightNorm: g is learned as it is, not as log_g:{listing(others)}")


def as_pair(leaf: Any) -> GVLeaf:
    """A (g, v) leaf of two boxes, of one in a box, or of boxes; of arrays if there is no box."""
    gv = leaf if is_weight_norm(leaf) else unbox(leaf)
    if not is_box(gv.v):
        boxed = box_gv(leaf, gv, gain_axes(gv))
        gv = boxed if is_weight_norm(boxed) else GVLeaf(*(rebox(leaf, x) for x in gv))
    return GVLeaf(as_apart(gv[0]), gv.v)


def _put(module: nnx.Module, new: Mapping[int, Any]) -> None:
    """Sets attributes of a module, and of those in it, anew: weights, by the ids of v."""
    left = set(new)
    for _, part in list(nnx.iter_graph(module)):
        for name, x in list(vars(part).items()) if isinstance(part, nnx.Pytree) else ():
            key = id(x.v if is_weight_norm(x) else x)
            if key in new:
                setattr(part, name, new[key])
                left.discard(key)
    if left:
        raise ValueError(
            f"WeightNorm: {len(left)} weights are not attributes of a module. Hold them in an "
            "nnx.List or nnx.Dict instead of a list or dict"
        )


def _bring_back(pairs: list[tuple[Any, Any]]) -> None:
    """Changes the parts of a module as a call has changed the parts of its copy.

    A Param stays as it is.
    """
    originals = {id(copy): original for copy, original in pairs}
    for copy, original in pairs:
        is_state = isinstance(copy, nnx.Variable) and not isinstance(copy, nnx.Param)
        if is_state and copy.get_value() is not original.get_value():
            original.set_value(copy.get_value())
        for name, x in vars(copy).items() if isinstance(copy, nnx.Pytree) else ():
            new, is_own = originals.get(id(x), x), not name.startswith("_pytree__")
            if is_own and not isinstance(x, nnx.Param) and vars(original).get(name) is not new:
                setattr(original, name, new)


class MeanOnlyBatchNorm(nnx.Module):
    """Batch normalization that takes the mean away, and leaves the variance to weight norm.

        y = x − μ[x] + b

    with μ over all axes but the feature axis, of the minibatch or, with running averages, of
    past ones. The gradient is centered likewise. The layer before it needs no bias.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, section 4.

    Arguments are those of `flax.nnx.BatchNorm`; those about the variance and the scale are refused
    with what to write instead. `model.eval()` and `model.train()` choose between running averages
    and the minibatch.

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
        use_scale: bool = False,
        bias_init: Callable[..., Any] = jax.nn.initializers.zeros,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        **refused: None,
    ):
        """Takes the size of the feature axis, and the arguments of `flax.nnx.BatchNorm`.

        Raises:
          TypeError: if `use_scale` is True, or if `epsilon`, `scale_init`, `scale_metadata`,
            `use_fast_variance` or `promote_dtype` is given.
        """
        given = refused | {"use_scale": use_scale or None}
        refuse("wnjax.nnx.MeanOnlyBatchNorm", given, BATCH_NORM_INSTEAD)
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


# The shape of a weight without stack axes, and its fan-in axes counted from the end.
_Kernels = dict[str, tuple[tuple[int, ...], Collection[int]]]


def _linear(layer: Any) -> _Kernels:
    return {"kernel": ((layer.in_features, layer.out_features), (-2,))}


def _linear_general(layer: Any) -> _Kernels:
    shape = (*layer.in_features, *layer.out_features)
    return {"kernel": (shape, range(-len(shape), -len(layer.out_features)))}


def _einsum(layer: Any) -> _Kernels:
    operands, output = layer.einsum_str.split("->")
    labels = operands.split(",")[1].replace("...", "")
    fan_in = [i for i in range(-len(labels), 0) if labels[i] not in output]
    return {"kernel": (layer.kernel_shape, fan_in)}


def _conv(layer: Any) -> _Kernels:
    output = -2 if getattr(layer, "transpose_kernel", False) else -1
    fan_in = [i for i in range(-len(layer.kernel_shape), 0) if i != output]
    return {"kernel": (layer.kernel_shape if layer.mask is None else (), fan_in)}


def _lora(layer: Any) -> _Kernels:
    rank = layer.lora_a.shape[-1]
    shapes = {"lora_a": (layer.in_features, rank), "lora_b": (rank, layer.out_features)}
    return {name: (shape, (-2,)) for name, shape in shapes.items()}


_LAYERS: dict[Any, Callable[[Any], _Kernels]] = {
    nnx.Linear: _linear,
    nnx.LoRALinear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
    nnx.Conv: _conv,
    nnx.ConvTranspose: _conv,
    nnx.LoRA: _lora,
} | dict.fromkeys(
    (
        nnx.Embed,
        nnx.PReLU,
        nnx.BatchNorm,
        nnx.LayerNorm,
        nnx.RMSNorm,
        nnx.GroupNorm,
        nnx.InstanceNorm,
        MeanOnlyBatchNorm,
    ),
    lambda _: {},
)


def _told_by_layers(layer: nnx.Module, selected: Set[str], params: Any) -> dict[str, Decision]:
    """What the layers of Flax in a module say of its Params.

    Raises:
      ValueError: if none says what a Param of two axes or more is, of those that are selected.
    """
    told: dict[int, Decision] = {}
    for _, module in nnx.iter_modules(layer):
        # A subclass that computes something else says nothing.
        kind = next((k for k in type(module).__mro__ if k in _LAYERS), None)
        if kind is None or type(module).__call__ is not kind.__call__:
            continue
        kernels = _LAYERS[kind](module)
        for name, leaf in vars(module).items():
            if name not in kernels:
                told[id(leaf)] = NotWeight(f"{name} of {kind.__name__}")
                continue
            shape, fan_in = kernels[name]
            if shape and leaf.shape[-len(shape) :] == shape:  # else it is stacked on other axes
                features = [i for i in range(-leaf.ndim, 0) if i not in fan_in]
                told[id(leaf)] = Weight(tuple(features))
    flat = flatten(params)[0]
    unknown = [path for path, x in flat if path in selected and x.ndim > 1 and id(x) not in told]
    if unknown:
        raise ValueError(
            "WeightNorm: no layer of Flax tells what these Params are, or along which axes they "
            f"are stacked:{listing(unknown)}\nPass axes. They are found from a call:\n"
            "  graph, params, rest = nnx.split(layer, nnx.Param, ...)\n"
            "  fn = lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)\n"
            "  layer = wnjax.nnx.WeightNorm(layer, axes=wnjax.infer_axes(fn)(params, x))"
        )
    return {path: told.get(id(x), NotWeight("fewer than two axes")) for path, x in flat}
