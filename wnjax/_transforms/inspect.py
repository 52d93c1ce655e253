"""Views of a tree with (g, v) leaves: which leaf is what, and how long the vectors are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wnjax._axes.axis_name import AxisName, split_over
from wnjax._axes.decisions import Decision, Weight
from wnjax._leaves.gv import (
    GVLeaf,
    LogWeightNorm,
    fan_in_axes,
    gain,
    in_range,
    is_weight_norm,
    over_root,
    root,
    squared_norm_of,
)
from wnjax._leaves.trees import check_not_apart, flatten, is_array, unbox, unbox_gv
from wnjax._transforms.report import Initialized


def summary(tree: Any) -> str:
    """What is normalized in `tree` and what is not and why, as a table with a line per leaf.

    Args:
      tree: any tree of arrays and (g, v) leaves; or a tree of `Weight` and `NotWeight`, for which
        the table gives the feature axes, the biases and the reasons; or the report of `data_init`.

    Returns:
      The table as a string of several lines.

    Raises:
      ValueError: if `tree` is the state of a `wnjax.nnx.WeightNorm`: take its `normalized()`; or if
        it holds the state of an optimizer.

    >>> import jax.numpy as jnp
    >>> import wnjax
    >>> params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
    >>> print(wnjax.summary(wnjax.weight_norm(params)))
    leaf          shape   dtype    normalized
    dense/bias    (4,)    float32  no: a single axis
    dense/kernel  (3, 4)  float32  4 neurons, norm over axes (0,)
    1 of 2 leaves normalized: 4 neurons, 12 of 16 numbers
    """
    if any(map(_is_initialized, jax.tree.leaves(tree, is_leaf=_is_initialized))):
        return _initialization_table(tree)
    boxes = flatten(tree)[0]
    check_not_apart(boxes)
    leaves = [(path, unbox_gv(leaf) or unbox(leaf)) for path, leaf in boxes]
    if any(isinstance(leaf, Decision) for _, leaf in leaves):
        return _decision_table(leaves)
    return _gv_leaf_table(leaves)


def _gv_leaf_table(leaves: list[tuple[str, Any]]) -> str:
    rows = [("leaf", "shape", "dtype", "normalized")]
    for path, leaf in leaves:
        array = leaf.v if is_weight_norm(leaf) else leaf
        shape, dtype = getattr(array, "shape", "-"), getattr(array, "dtype", "-")
        rows.append((path, str(shape), str(dtype), _describe(leaf)))
    gv_leaves = [leaf for _, leaf in leaves if is_weight_norm(leaf)]
    others = [leaf for _, leaf in leaves if not is_weight_norm(leaf)]
    neurons, numbers = sum(_size(gv[0]) for gv in gv_leaves), sum(_size(gv.v) for gv in gv_leaves)
    return (
        f"{_columns(rows)}\n{len(gv_leaves)} of {len(leaves)} leaves normalized: "
        f"{neurons:,} neurons, {numbers:,} of {numbers + sum(map(_size, others)):,} numbers"
    )


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape) if is_array(leaf) else 0


def _describe(leaf: Any) -> str:
    if is_weight_norm(leaf):
        logarithmic = ", log scale" if isinstance(leaf, LogWeightNorm) else ""
        return f"{_size(leaf[0]):,} neurons, norm over axes {fan_in_axes(leaf)}{logarithmic}"
    if not is_array(leaf):
        return "no: not an array"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return "no: not floating-point"
    return "no: a single axis" if len(leaf.shape) == 1 else "no: not chosen by the axes"


def _decision_table(leaves: list[tuple[str, Decision]]) -> str:
    rows = [("leaf", "neuron")]
    for path, decision in leaves:
        if isinstance(decision, Weight):
            bias = f", bias {decision.bias}" if decision.bias else ""
            operation = f", by {decision.operation}" if decision.operation else ""
            stack = f", stack axes {decision.stack_axes}" if decision.stack_axes else ""
            rows.append((path, f"feature axes {decision.feature_axes}{stack}{bias}{operation}"))
        else:
            rows.append((path, f"no: {decision.describe()}"))
    neurons = sum(isinstance(decision, Weight) for _, decision in leaves)
    return f"{_columns(rows)}\n{neurons} of {len(leaves)} leaves are weights of neurons"


def _is_initialized(x: Any) -> bool:
    return isinstance(x, Initialized)


def _initialization_table(tree: Any) -> str:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_initialized)
    leaves = [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in pairs]
    rows = [("leaf", "data_init"), *((path, leaf.describe()) for path, leaf in leaves)]
    weights = sum(leaf.action in ("initialized", "scale only") for _, leaf in leaves)
    return f"{_columns(rows)}\n{weights} of {len(leaves)} leaves are initialized weights"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def labels(tree: Any) -> Any:
    """Says of every array in `tree` what it is: `"g"`, `"v"` or `"other"`.

    For `optax.multi_transform`, weight-decay masks, or freezing the gains.

    Args:
      tree: any tree of arrays and (g, v) leaves; both g and log_g are labeled `"g"`.

    Returns:
      A tree of the same structure, (g, v) leaves and boxes included, with strings as leaves.

    Raises:
      ValueError: if `tree` is the state of a `wnjax.nnx.WeightNorm`: take its `normalized()`; or if
        it holds the state of an optimizer.

    >>> import jax.numpy as jnp, optax
    >>> import wnjax
    >>> params = wnjax.weight_norm({"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)})
    >>> wnjax.labels(params)
    {'bias': 'other', 'kernel': WeightNorm(g='g', v='v')}
    >>> freeze_g = optax.multi_transform(
    ...     {"g": optax.set_to_zero(), "v": optax.adam(1e-3), "other": optax.adam(1e-3)},
    ...     wnjax.labels,
    ... )
    >>> state = freeze_g.init(params)
    """
    check_not_apart(flatten(tree)[0])

    def label(x: Any) -> Any:
        if not is_weight_norm(x):
            return "other"
        relabel = [jax.tree.map(lambda _, name=name: name, x[i]) for i, name in enumerate("gv")]
        return type(x)(*relabel)

    return jax.tree.map(label, tree, is_leaf=is_weight_norm)


def norms(tree: Any, *, axis_name: AxisName = None) -> dict[str, dict[str, jax.Array]]:
    """‖v‖, g and g/‖v‖ of every (g, v) leaf, for logging. Works under `jit`.

    Args:
      tree: any tree of arrays and (g, v) leaves.
      axis_name: inside `shard_map`, over which mesh axes the fan-in axes are split, as for
        `weight_norm`.

    Returns:
      From the slash path of every (g, v) leaf to a dict with `"v"`, `"g"` and `"scale"`: arrays of
      g's shape, in float32 or wider. g is exp(log_g) for a `LogWeightNorm`. ‖v‖ is at most what
      the root of the largest number is, 1.8e19 in float32; there, and below 3.2e-16, its
      derivatives are 0.

    Raises:
      ValueError: as `fold`; or if `tree` is the state of a `wnjax.nnx.WeightNorm`: take
        `normalized()`.

    >>> import jax.numpy as jnp
    >>> import wnjax
    >>> gv = wnjax.WeightNorm(g=jnp.array([[10.0]]), v=jnp.array([[3.0], [4.0]]))
    >>> {name: float(x.squeeze()) for name, x in wnjax.norms({"kernel": gv})["kernel"].items()}
    {'g': 10.0, 'scale': 2.0, 'v': 5.0}
    """
    leaves = flatten(tree)[0]
    check_not_apart(leaves)
    gv_leaves = {i: gv for i, (_, leaf) in enumerate(leaves) if (gv := unbox_gv(leaf))}
    paths = [path for path, _ in leaves]
    mesh_axes = split_over(axis_name, paths, gv_leaves)
    return {paths[i]: _norms(gv, mesh_axes[i]) for i, gv in gv_leaves.items()}


def _norms(gv: GVLeaf, mesh_axes: tuple[str, ...]) -> dict[str, jax.Array]:
    g, squared_norm = gain(gv), squared_norm_of(gv, mesh_axes)
    largest = jnp.finfo(squared_norm.dtype).max
    out_of_range = jax.lax.stop_gradient(jnp.sqrt(jnp.minimum(squared_norm, largest)))
    length = jnp.where(in_range(squared_norm), root(squared_norm), out_of_range)
    return {"g": g, "scale": over_root(g, squared_norm), "v": length}
