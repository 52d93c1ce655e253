"""The transform and its inverse: plain weights to (g, v) leaves and back."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, overload

import jax
import jax.core
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.sharding import NamedSharding, PartitionSpec

from wnjax._axes.axis_name import AxisName, split_over
from wnjax._axes.decisions import Axes, NotWeight, Weight, canonical_axes, decide
from wnjax._leaves.gv import (
    FanIn,
    GVLeaf,
    LogWeightNorm,
    WeightNorm,
    in_range,
    norm_dtype,
    root,
    sum_of_squares,
)
from wnjax._leaves.trees import (
    box_gv,
    check_holds_gv_leaves,
    flatten,
    fold_leaf,
    listing,
    names_on,
    rebox,
    unbox,
    unbox_gv,
)

T = TypeVar("T")
K = TypeVar("K")


# A dict, a list or an array does not keep its type: there are (g, v) leaves where arrays were.
@overload
def weight_norm(
    params: FrozenDict[Any, Any] | list[Any] | jax.Array,
    axes: Axes = None,
    *,
    log_scale: bool = False,
    axis_name: AxisName = None,
) -> Any: ...
@overload
def weight_norm(
    params: dict[K, Any], axes: Axes = None, *, log_scale: bool = False, axis_name: AxisName = None
) -> dict[K, Any]: ...
@overload
def weight_norm(
    params: T, axes: Axes = None, *, log_scale: bool = False, axis_name: AxisName = None
) -> T: ...
def weight_norm(
    params: Any,
    axes: Axes = None,
    *,
    log_scale: bool = False,
    axis_name: AxisName = None,
) -> Any:
    """Replaces every neuron weight of `params` by a (g, v) leaf with g = ‖w‖ and v = w.

    The function computed is unchanged: `fold(weight_norm(params))` returns the weights.
    In float32 and float64 it does so bit for bit outside `jit`, and to 2 ulp inside it,
    where XLA may take another path to the same norm; in bfloat16 and float16 bit for bit
    in both, since norms are taken and gains are kept in float32. (Measured on a CPU. With
    `log_scale`, and for the extreme neurons below, to a few ulp.)

        w = g·v/‖v‖,   ∇g = ∇w·v/‖v‖,   ∇v = (g/‖v‖)∇w − (g∇g/‖v‖²)v

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equations 2 and 3.

    A neuron of zeros has no direction. It gets g = 0 and a pseudo-random v, drawn from
    its leaf's path, so that the function is unchanged and ∇g is not zero: it trains.
    Where ‖w‖² under- or overflows (in float32: ‖w‖ below 3.2e-16 or above 1.8e19),
    v is w divided by its largest element, which derivatives take for a constant, and g still ‖w‖.

    Shards stay where they are: g has v's sharding on the feature axes, and is replicated over the
    fan-in axes. That is automatic under `jit`. Inside `shard_map` an array is but a shard: name
    the mesh axes over which fan-in axes are split in `axis_name`. For a row-parallel layer
    y = psum(x @ w, "tensor") that is `axis_name={"down/kernel": "tensor"}`; a column-parallel one,
    whose neurons are split, needs nothing.

    Args:
      params: any pytree of arrays, or of their `jax.ShapeDtypeStruct`s: dict, FrozenDict,
        `nnx.State`, Equinox module, with or without Flax boxes. Containers, boxes and all
        other leaves are kept. A box that names axes (`nn.Partitioned`, NNX `out_sharding`)
        is put around g and around v, with None for the names of the fan-in axes around g;
        NNX's filters then see no `Param` there, so filter before.
      axes: which leaves are weights, and their feature axes (all axes but those that
        the layer sums over). One of

        * None: Flax's naming rules. Weights are the leaves named `kernel` with two or more axes.
          Their last axis is the feature axis; the last two are in a three-axis kernel under
          `query`, `key` or `value`. The bias beside a kernel is the witness, since it has the
          shape of the feature axes: it tells stacks under `nn.scan` or `nn.vmap`, and several
          outputs. A kernel is refused where its bias fits no layer, as that of
          `ConvTranspose(transpose_kernel=True)` does, or fits several. Where a kernel of three or
          more axes has neither a bias nor a name that tells (`Conv_0`, `query`, `key`, `value`,
          `out`), the last axis is a guess, and a warning names the kernel. Leaves in
          `batch_stats` and the like beside `params` are no weights.
        * a dict from regular expressions, matched against the whole slash path, to feature
          axes, or to None for a leaf to be kept; the first match wins.
        * a callable `(path, leaf) -> feature axes or None`.
        * a tree with `Weight` and `NotWeight` as leaves, shaped like `params`, or like a tree of
          which these are a part.

        Feature axes are an int or a tuple of ints; `()` gives the whole leaf one norm.
      log_scale: make `LogWeightNorm` (g, v) leaves, g = exp(log_g).
      axis_name: in `shard_map` or `pmap`, the mesh axes over which fan-in axes are split. One of

        * None: over none.
        * a name, or a tuple of names: those of all weights are split over these; with `()`, they
          are whole for certain.
        * a dict to one of these from regular expressions, matched as those of `axes` are.

        Outside, where nothing binds the names, arrays are whole, and it changes nothing.

    Returns:
      `params` with a (g, v) leaf in the place of every weight. g has v's rank, size 1 on the
      fan-in axes, and is float32 or wider; v has the weight's shape and dtype. Where nothing
      had to be changed, v and other leaves are the very arrays of `params`: donating one
      to `jit` uses up the other.

    Raises:
      ValueError: if a pattern matches no leaf or never applies, if the naming rules refuse a
        kernel, if nothing is normalized at all, if axes do not fit a leaf, if `params` already
        has (g, v) leaves or holds the state of an optimizer, as a `TrainState` does, or if
        `log_scale` meets neurons of zeros, which it cannot express. (Inside `jit` and other
        transformations values are not known; they get the smallest gain of their dtype and hardly
        train.) If a pattern of `axis_name` matches no leaf, or if `shard_map` knows a weight to be
        the same all along an axis named for it. (That its neurons are split over it cannot be known
        here.)
      TypeError: if a leaf to be normalized is not a floating-point array.

    >>> import jax.numpy as jnp
    >>> import wnjax
    >>> params = {"dense": {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.zeros(1)}}
    >>> normalized = wnjax.weight_norm(params)
    >>> normalized["dense"]["kernel"].g
    Array([[5.]], dtype=float32)
    >>> by_pattern = wnjax.weight_norm(params, axes={".*/kernel": 1, ".*/bias": None})
    >>> wnjax.fold(by_pattern)["dense"]["kernel"]
    Array([[3.],
           [4.]], dtype=float32)
    """
    boxes, treedef = flatten(params)
    check_holds_gv_leaves(treedef)
    if normalized := [path for path, leaf in boxes if unbox_gv(leaf) is not None]:
        raise ValueError(
            f"these are (g, v) leaves already; fold(params) first:{listing(normalized)}"
        )
    decisions = decide(params, axes)
    kept = [f"{path}: {what.reason}" for path, _, what in decisions if isinstance(what, NotWeight)]
    if len(kept) == len(decisions):
        raise ValueError(f"no leaf is a weight; pass axes to choose them:{listing(kept)}")
    weights = {i: (None, w) for i, (_, w, d) in enumerate(decisions) if isinstance(d, Weight)}
    mesh_axes = split_over(axis_name, [path for path, _ in boxes], weights)
    return treedef.unflatten(
        _normalize(path, box, decision.feature_axes, log_scale, mesh_axes[i])
        if isinstance(decision, Weight)
        else rebox(box, leaf)
        for i, ((_, box), (path, leaf, decision)) in enumerate(zip(boxes, decisions, strict=True))
    )


@overload
def fold(tree: GVLeaf, *, axis_name: AxisName = None) -> Any: ...
@overload
def fold(tree: T, *, axis_name: AxisName = None) -> T: ...
def fold(tree: Any, *, axis_name: AxisName = None) -> Any:
    """The inverse of `weight_norm`: every (g, v) leaf becomes its weight w = v·(g/‖v‖).

    Norms accumulate in float32 for bfloat16 and float16. Where v is zero, or ‖v‖²
    under- or overflows (in float32: ‖v‖ below 3.2e-16 or above 1.8e19), w and all its
    derivatives are 0, never NaN. Gains that were cast to bfloat16 or float16, as a cast of the
    whole tree does, have changed the lengths of their neurons, of which a warning tells. Cast what
    `fold` returns.

    Under `jit` with sharded arrays every axis may be sharded. Inside `shard_map` the norm of a
    shard is not the norm: name the mesh axes over which fan-in axes are split in `axis_name`. Then
    devices send each other one number per neuron for the norm, and one for its derivative.
    Derivatives are right where they are taken around `shard_map`, and where they are taken inside
    and it checks how values vary (`check_vma=True`, the default). Inside, without the check, and
    in `pmap`, where JAX transposes `psum` to `psum`, each device gets its own part of dL/dg: sum it
    over the named axes. dL/dv is right there if dL/dw is.

    Args:
      tree: any pytree, with or without (g, v) leaves, of arrays or of their
        `jax.ShapeDtypeStruct`s; what is no (g, v) leaf is returned as it is. That includes the
        dicts `{"g": ..., "v": ...}` of a checkpoint restored without a target: see
        `wnjax.convert.from_dicts`.
      axis_name: as for `weight_norm`.

    Returns:
      `tree` with a weight of v's shape, dtype and box in the place of every (g, v) leaf.

    Raises:
      ValueError: if the shapes of a (g, v) leaf's g and v do not fit each other; if `tree` holds
        the state of an optimizer; if a pattern matches no leaf; if `shard_map` knows that v does
        not vary along an axis named for it, or that g does; or, for None and where no pattern
        matches, that v varies along an axis, and g does not. Where shards have been gathered that
        is right: `()` says so.
      TypeError: if v is an array and g only a shape.

    >>> import jax.numpy as jnp
    >>> import wnjax
    >>> tree = {"kernel": wnjax.WeightNorm(g=jnp.array([[10.0]]), v=jnp.array([[3.0], [4.0]]))}
    >>> wnjax.fold(tree)
    {'kernel': Array([[6.],
           [8.]], dtype=float32)}

    And from shards, of which each device has one:

    >>> from functools import partial
    >>> import jax
    >>> mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> rows = jax.P("tensor", None)
    >>> fold = jax.shard_map(
    ...     partial(wnjax.fold, axis_name="tensor"),
    ...     mesh=mesh,
    ...     in_specs=({"kernel": wnjax.WeightNorm(g=jax.P(), v=rows)},),
    ...     out_specs={"kernel": rows},
    ... )
    >>> fold(tree)
    {'kernel': Array([[6.],
           [8.]], dtype=float32)}
    """
    leaves, treedef = flatten(tree)
    gv_leaves = {i: gv for i, (_, leaf) in enumerate(leaves) if (gv := unbox_gv(leaf))}
    paths = [path for path, _ in leaves]
    warn_of_rounded_gains(paths, gv_leaves)
    mesh_axes = split_over(axis_name, paths, gv_leaves)
    return treedef.unflatten(
        fold_leaf(path, leaf, mesh_axes.get(i, ())) for i, (path, leaf) in enumerate(leaves)
    )


def warn_of_rounded_gains(paths: Sequence[str], gv_leaves: Mapping[int, GVLeaf]) -> None:
    """Warns of gains that were cast to a dtype narrower than float32, with all others."""
    dtypes = {paths[i]: jnp.result_type(gv[0]) for i, gv in gv_leaves.items()}
    narrow = [
        f"{path or 'the gv'}: {dtype}"
        for path, dtype in dtypes.items()
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    ]
    if narrow:
        warnings.warn(
            "the gains of these weights are in a dtype narrower than float32, and rounding has "
            "changed the lengths of the neurons. Cast the folded weights instead, or cast inside "
            f"the function: wrap(lambda params, x: fn(cast(params), x)){listing(narrow)}",
            stacklevel=3,
        )


def _normalize(
    path: str, box: Any, feature_axes: Any, log_scale: bool, mesh_axes: tuple[str, ...]
) -> Any:
    leaf = unbox(box)
    check_floating(path, leaf)
    features = canonical_axes(path, leaf, feature_axes)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return box_gv(box, _abstract(leaf, features, log_scale), features)
    # A copy of a numpy array, which its owner may write to.
    w = leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)
    g, v = split(path, w, features, mesh_axes)
    if not log_scale:
        return box_gv(box, WeightNorm(g, v), features)
    _check_no_zeros(path, g)
    log_g = jnp.log(jnp.maximum(g, jnp.finfo(g.dtype).tiny))  # weight decay makes NaN of -inf
    return box_gv(box, LogWeightNorm(log_g, v), features)


def _abstract(w: jax.ShapeDtypeStruct, features: Collection[int], log_scale: bool) -> GVLeaf:
    """The (g, v) leaf of a weight of which only shape, dtype and sharding are known."""
    shape = tuple(size if axis in features else 1 for axis, size in enumerate(w.shape))
    sharding = w.sharding
    if isinstance(sharding, NamedSharding | PartitionSpec):
        sharding = names_on(sharding, features)
    g = jax.ShapeDtypeStruct(shape, norm_dtype(w.dtype), sharding=sharding)
    return LogWeightNorm(g, w) if log_scale else WeightNorm(g, w)


def check_floating(path: str, leaf: Any) -> None:
    """Raises TypeError for what cannot be normalized."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        kind = f"has dtype {dtype}" if dtype is not None else f"is a {type(leaf).__name__}"
        raise TypeError(
            f"{path or 'the leaf'} {kind}; only floating-point arrays can be normalized. "
            "Give axes that leave it out (None for its path)"
        )


def _check_no_zeros(path: str, g: jax.Array) -> None:
    if _is_known(g) and (zeros := int((g == 0).sum())):
        raise ValueError(
            f"{path or 'the leaf'}: {zeros} of {g.size} neurons are all zeros, and exp(log_g) "
            "is never 0. Use log_scale=False, or give axes that leave this leaf out"
        )


def _is_known(x: jax.Array) -> bool:
    """Whether `x` has a value now: not under `jit` and other transformations."""
    return not isinstance(x, jax.core.Tracer)


def split(
    path: str, w: jax.Array, feature_axes: tuple[int, ...], mesh_axes: tuple[str, ...] = ()
) -> WeightNorm:
    """The (g, v) leaf of one weight, with the same function for zero and extreme neurons too."""
    fan_in = FanIn(tuple(axis for axis in range(w.ndim) if axis not in feature_axes), mesh_axes)
    squared_norm = sum_of_squares(w, fan_in)
    is_ordinary = in_range(squared_norm)
    if _is_known(is_ordinary) and is_ordinary.all():
        # The rest would change nothing, and takes seconds to compile, op by op and shape by shape.
        return WeightNorm(root(squared_norm), w)
    largest = _largest(w, fan_in).astype(squared_norm.dtype)
    unit = w.astype(largest.dtype) / jnp.where(largest == 0, 1, largest)
    v = jnp.where(largest == 0, _pseudo_random(path, unit, fan_in), unit)
    return WeightNorm(
        g=jnp.where(is_ordinary, root(squared_norm), largest * root(sum_of_squares(unit, fan_in))),
        v=jnp.where(is_ordinary, w, v.astype(w.dtype)),
    )


def _largest(w: jax.Array, fan_in: FanIn) -> jax.Array:
    """The largest magnitude in each neuron: a unit, on which neither g nor the weight depends."""
    w = jax.lax.stop_gradient(w)  # pmax has no derivative
    largest = jnp.max(jnp.abs(w), axis=fan_in.axes, keepdims=True, initial=0)
    return jax.lax.pmax(largest, fan_in.mesh_axes) if fan_in.mesh_axes else largest


def _pseudo_random(path: str, like: jax.Array, fan_in: FanIn) -> jax.Array:
    """Directions of length about 1, the same whenever path, shape and shard are the same."""
    key = jax.random.key(zlib.crc32(path.encode()))
    inputs = math.prod(like.shape[axis] for axis in fan_in.axes)
    if fan_in.mesh_axes:
        key = jax.random.fold_in(key, jax.lax.axis_index(fan_in.mesh_axes))
        inputs *= jax.lax.axis_size(fan_in.mesh_axes)
    return jax.random.normal(key, like.shape, like.dtype) / math.sqrt(max(inputs, 1))
