"""The transform and its inverse: plain weights to (g, v) nodes and back."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from wnjax._axes import Axes, Neuron, NotNeuron, canonical_axes, decide
from wnjax._leaves import (
    box_node,
    flatten,
    listing,
    map_leaves,
    names_on,
    outer_box,
    rebox,
    unbox,
    unbox_node,
)
from wnjax._nodes import (
    LogWeightNorm,
    Node,
    WeightNorm,
    fan_in_axes,
    in_range,
    norm_dtype,
    root,
    sum_of_squares,
    weight,
)


def weight_norm(
    params: chex.ArrayTree, axes: Axes = None, *, log_scale: bool = False
) -> chex.ArrayTree:
    """Replaces every neuron weight of `params` by a node with g = ‖w‖ and v = w.

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
    v is w divided by its largest element, and g still ‖w‖.

    Shards stay where they are: g has v's sharding on the feature axes, and is replicated over the
    fan-in axes. Inside `shard_map` keep the fan-in axes whole.

    Args:
      params: any pytree of arrays, or of their `jax.ShapeDtypeStruct`s: dict, FrozenDict,
        `nnx.State`, Equinox module, with or without Flax boxes. Containers, boxes and all
        other leaves are kept. A box that names axes (`nn.Partitioned`, NNX `out_sharding`)
        is put around g and around v, with None for the names of the fan-in axes around g;
        NNX's filters then see no `Param` there, so filter before.
      axes: which leaves are weights, and their feature axes (all axes but those that
        the layer sums over). One of

        * None: Flax's naming rules: leaves named `kernel` with two or more axes, the last
          of them the feature axis; the last two in a three-axis kernel under `query`,
          `key` or `value`. No rule of this kind can know layers under `nn.scan` or `nn.vmap`,
          einsum layers, or `ConvTranspose(transpose_kernel=True)`: give their axes.
        * a dict from regular expressions, matched against the whole slash path, to feature
          axes, or to None for a leaf to be kept; the first match wins.
        * a callable `(path, leaf) -> feature axes or None`.
        * a tree shaped like `params` with `Neuron` and `NotNeuron` as leaves.

        Feature axes are an int or a tuple of ints; `()` gives the whole leaf one norm.
      log_scale: make `LogWeightNorm` nodes, g = exp(log_g).

    Returns:
      `params` with a node in the place of every weight. g has v's rank, size 1 on the
      fan-in axes, and is float32 or wider; v has the weight's shape and dtype. Where nothing
      had to be changed, v and other leaves are the very arrays of `params`: donating one
      to `jit` uses up the other.

    Raises:
      ValueError: if a pattern matches no leaf or never applies, if nothing is normalized at
        all, if axes do not fit a leaf, if `params` already has nodes, or if `log_scale` meets
        neurons of zeros, which it cannot express. (Inside `jit` and other transformations
        values are not known; they get the smallest gain of their dtype and hardly train.)
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
    if normalized := [path for path, leaf in boxes if unbox_node(leaf) is not None]:
        raise ValueError(
            f"these leaves are weight-norm nodes already; fold(params) first:{listing(normalized)}"
        )
    decisions = decide(params, axes)
    kept = [f"{path}: {what.reason}" for path, _, what in decisions if isinstance(what, NotNeuron)]
    if len(kept) == len(decisions):
        raise ValueError(f"no leaf is a weight; pass axes to choose them:{listing(kept)}")
    return treedef.unflatten(
        _normalize(path, box, leaf, decision.feature_axes, log_scale)
        if isinstance(decision, Neuron)
        else rebox(box, leaf)
        for (_, box), (path, leaf, decision) in zip(boxes, decisions, strict=True)
    )


def fold(tree: chex.ArrayTree) -> chex.ArrayTree:
    """The inverse of `weight_norm`: every node becomes its weight w = v·(g/‖v‖).

    Norms accumulate in float32 for bfloat16 and float16. Where v is zero, or ‖v‖²
    under- or overflows (in float32: ‖v‖ below 3.2e-16 or above 1.8e19), w and all its
    derivatives are 0, never NaN.

    Inside `shard_map`, keep the fan-in axes whole: the norm of a shard is not the norm.
    Under `jit` with sharded arrays every axis may be sharded.

    Args:
      tree: any pytree, with or without nodes, of arrays or of their `jax.ShapeDtypeStruct`s;
        what is no node is returned as it is. That includes the dicts `{"g": ..., "v": ...}`
        of a checkpoint restored without a target.

    Returns:
      `tree` with a weight of v's shape, dtype and box in the place of every node.

    Raises:
      ValueError: if the shapes of a node's g and v do not fit each other.
      TypeError: if v is an array and g only a shape.

    >>> import jax.numpy as jnp
    >>> import wnjax
    >>> tree = {"kernel": wnjax.WeightNorm(g=jnp.array([[10.0]]), v=jnp.array([[3.0], [4.0]]))}
    >>> wnjax.fold(tree)
    {'kernel': Array([[6.],
           [8.]], dtype=float32)}
    """
    return map_leaves(fold_leaf, tree)


def fold_leaf(path: str, leaf: Any) -> Any:
    """`fold` of one leaf; errors name its path."""
    node = unbox_node(leaf)
    if node is None:
        return rebox(leaf, unbox(leaf))
    try:
        if isinstance(node.v, jax.ShapeDtypeStruct):
            fan_in_axes(node)  # checks that the shapes fit each other
            return rebox(outer_box(leaf), node.v)
        if isinstance(node[0], jax.ShapeDtypeStruct):
            raise TypeError(f"{path or 'the node'}: v is an array, but {node._fields[0]} a shape")
        return rebox(outer_box(leaf), weight(node))
    except ValueError as error:
        raise ValueError(f"{path or 'the node'}: {error}") from error


def _normalize(path: str, box: Any, leaf: Any, feature_axes: Any, log_scale: bool) -> Any:
    check_floating(path, leaf)
    features = canonical_axes(path, leaf, feature_axes)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return box_node(box, _abstract(leaf, features, log_scale), features)
    # A copy of a numpy array, which its owner may write to.
    g, v = split(path, leaf if isinstance(leaf, jax.Array) else jnp.array(leaf), features)
    if not log_scale:
        return box_node(box, WeightNorm(g, v), features)
    _check_no_zeros(path, g)
    log_g = jnp.log(jnp.maximum(g, jnp.finfo(g.dtype).tiny))  # weight decay makes NaN of -inf
    return box_node(box, LogWeightNorm(log_g, v), features)


def _abstract(w: jax.ShapeDtypeStruct, features: Collection[int], log_scale: bool) -> Node:
    """The node of a weight of which only shape, dtype and sharding are known."""
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


def split(path: str, w: jax.Array, feature_axes: tuple[int, ...]) -> WeightNorm:
    """The node of one weight, computing the same function for zero and extreme neurons too."""
    fan_in = tuple(axis for axis in range(w.ndim) if axis not in feature_axes)
    squared_norm = sum_of_squares(w, fan_in)
    is_ordinary = in_range(squared_norm)
    if _is_known(is_ordinary) and is_ordinary.all():
        # The rest would change nothing, and takes seconds to compile, op by op and shape by shape.
        return WeightNorm(root(squared_norm), w)
    largest = jnp.max(jnp.abs(w), axis=fan_in, keepdims=True, initial=0)
    largest = largest.astype(squared_norm.dtype)
    unit = w.astype(largest.dtype) / jnp.where(largest == 0, 1, largest)
    v = jnp.where(largest == 0, _pseudo_random(path, unit, fan_in), unit)
    return WeightNorm(
        g=jnp.where(is_ordinary, root(squared_norm), largest * root(sum_of_squares(unit, fan_in))),
        v=jnp.where(is_ordinary, w, v.astype(w.dtype)),
    )


def _pseudo_random(path: str, like: jax.Array, fan_in: tuple[int, ...]) -> jax.Array:
    """Directions of length about 1, the same whenever path and shape are the same."""
    key = jax.random.key(zlib.crc32(path.encode()))
    inputs = math.prod(like.shape[axis] for axis in fan_in)
    return jax.random.normal(key, like.shape, like.dtype) / math.sqrt(max(inputs, 1))
