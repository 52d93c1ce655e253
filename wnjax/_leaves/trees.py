"""Leaves as users see them: their slash paths, and the Flax boxes around them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from wnjax._leaves.gv import GV_LEAVES, GVLeaf, fan_in_axes, is_weight_norm, weight
from wnjax._leaves.states import is_state, refuse_state

NNXMeta = nnx.bridge.NNXMeta
APART = "gain_of_weight_norm"  # in the metadata of a gain that is apart from its v


def is_box(x: Any) -> bool:
    """Whether `x` is a Flax container of one array: axis metadata or an NNX variable."""
    return isinstance(x, nn.meta.AxisMetadata | nnx.Variable)


def unbox(x: Any) -> Any:
    """The content of a box; anything else as it is."""
    if isinstance(x, nnx.Variable):
        return x.get_value()
    if isinstance(x, nn.Partitioned):
        return x.unbox(apply_constraint=False)  # no sharding constraint of our own
    return x.unbox() if is_box(x) else x


def rebox(box: Any, value: Any) -> Any:
    """A new box like `box` around `value`; `value` itself if `box` is no box."""
    if isinstance(box, nnx.Variable):
        return box.replace(value)
    return box.replace_boxed(value) if is_box(box) else value


def _axis_names(box: Any) -> Any:
    """The names or sharding that a box gives to its axes, or None."""
    if isinstance(box, nn.Partitioned):
        return box.names
    if isinstance(box, nnx.Variable):
        return box.get_metadata().get("out_sharding")
    return box.metadata.get("out_sharding") if isinstance(box, NNXMeta) else None


def _with_axis_names(box: Any, names: Any) -> Any:
    if isinstance(box, nn.Partitioned):
        return box.replace(names=names)
    if isinstance(box, nnx.Variable):
        return box.replace(box.get_value(), out_sharding=names)
    return box.replace(metadata=box.metadata | {"out_sharding": names})


def names_on(names: Any, axes: Collection[int]) -> Any:
    """`names` (a tuple, PartitionSpec or NamedSharding) with None on all but `axes`."""
    if isinstance(names, NamedSharding):
        spec = names_on(names.spec, axes)
        return NamedSharding(names.mesh, spec, memory_kind=names.memory_kind)
    kept = tuple(name if axis in axes else None for axis, name in enumerate(names))
    return PartitionSpec(*kept) if isinstance(names, PartitionSpec) else kept


def box_gv(box: Any, gv: GVLeaf, feature_axes: Collection[int]) -> Any:
    """Puts `gv` where the weight was that `box` held.

    A box that names axes goes around the gain and around v, since its names on
    fan-in axes fit v only. Any other box stays around the (g, v) leaf.
    """
    names = _axis_names(box)
    if not names:
        return rebox(box, gv)
    gain_box = _with_axis_names(box, names_on(names, feature_axes))
    return type(gv)(rebox(gain_box, gv[0]), rebox(box, gv.v))


def box_arrays(box: Any, gv: GVLeaf, feature_axes: Collection[int]) -> Any:
    """As `box_gv_leaf`, but in two boxes where `nnx.Optimizer` expects arrays in them."""
    boxed = box_gv(box, gv, feature_axes)
    is_variable = isinstance(boxed, nnx.Variable)
    return type(gv)(*(rebox(box, array) for array in gv)) if is_variable else boxed


def flatten(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The (slash path, leaf) pairs of `tree`, and its treedef. Boxes and (g, v) leaves are leaves.

    Raises:
      ValueError: if the tree holds the state of an optimizer, or a container that would hide (g, v)
        leaves.
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: is_box(x) or is_weight_norm(x) or is_state(x)
    )
    if any(GV_LEAVES & _types(kept) for _, kept in _flattened(treedef)):
        check_holds_gv_leaves(treedef)
    pairs = [(jax.tree_util.keystr(p, simple=True, separator="/"), x) for p, x in keyed]
    for path, leaf in pairs:
        if is_state(leaf):
            refuse_state(path, leaf)
    return pairs, treedef


def check_holds_gv_leaves(treedef: Any) -> None:
    """Raises ValueError if a container in a tree would hide (g, v) leaves in it."""
    for container, _ in _flattened(treedef):
        raise ValueError(
            f"a {container.__name__} keeps its content flattened, so that (g, v) leaves in it "
            "are not found again. Use a dict in its place; Haiku has "
            "haiku.data_structures.to_mutable_dict(params)"
        )


def _flattened(treedef: Any) -> list[tuple[type, Any]]:
    """The containers that keep a flattened structure, each with that structure."""
    container, kept = treedef.node_data() or (object, None)
    own = [(container, kept)] if isinstance(kept, jax.tree_util.PyTreeDef) else []
    return [*own, *itertools.chain(*map(_flattened, treedef.children()))]


def _types(treedef: Any) -> set[type]:
    """The types of all containers, those in a flattened structure included."""
    container, kept = treedef.node_data() or (object, None)
    inside = [kept] if isinstance(kept, jax.tree_util.PyTreeDef) else []
    return set[type]().union({container}, *map(_types, [*treedef.children(), *inside]))


def map_leaves(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """`tree` with `fn(slash path, leaf)` for every leaf. Boxes and (g, v) leaves are leaves."""
    pairs, treedef = flatten(tree)
    return treedef.unflatten(fn(path, leaf) for path, leaf in pairs)


def as_apart(box: Any) -> Any:
    """A gain whose v is elsewhere: marked so, if it is an NNX variable."""
    is_variable = isinstance(box, nnx.Variable)
    return box.replace(box.get_value(), **{APART: True}) if is_variable else box


def check_not_apart(leaves: Iterable[tuple[str, Any]]) -> None:
    """Raises ValueError if the leaves are the state of a `wnjax.nnx.WeightNorm`."""
    if gains := _apart_gains(leaves):
        raise ValueError(
            "in the state of a wnjax.nnx.WeightNorm, g and v are Params of their own: take its "
            "normalized(), and train these, or let an optimizer train some of its Params by wrt=, "
            "such as nnx.All(nnx.Param, nnx.Not(nnx.PathContains('g'))). These are "
            f"gains:{listing(gains)}"
        )


def _apart_gains(leaves: Iterable[tuple[str, Any]]) -> list[str]:
    return [
        path
        for path, box in leaves
        if isinstance(box, nnx.Variable) and box.get_metadata().get(APART)
    ]


def unbox_gv(leaf: Any) -> Any:
    """The (g, v) leaf that a leaf is or holds, without boxes; None where there is none."""
    gv = unbox(leaf)
    return type(gv)(*map(unbox, gv)) if is_weight_norm(gv) else None


def is_normalized(tree: Any) -> bool:
    """Whether a tree holds (g, v) leaves, or the gains of a `wnjax.nnx.WeightNorm`."""
    leaves = flatten(tree)[0]
    return bool(_apart_gains(leaves)) or any(unbox_gv(leaf) for _, leaf in leaves)


def outer_box(leaf: Any) -> Any:
    """The box in which a leaf is; that of v where a (g, v) leaf has its boxes inside."""
    return leaf.v if is_weight_norm(leaf) else leaf


def fold_leaf(path: str, leaf: Any, mesh_axes: tuple[str, ...] = ()) -> Any:
    """`fold` of one leaf; errors name its path."""
    gv = unbox_gv(leaf)
    if gv is None:
        return rebox(leaf, unbox(leaf))
    try:
        if isinstance(gv.v, jax.ShapeDtypeStruct):
            fan_in_axes(gv)  # checks that the shapes fit each other
            return rebox(outer_box(leaf), gv.v)
        if isinstance(gv[0], jax.ShapeDtypeStruct):
            raise TypeError(f"{path or 'the gv'}: v is an array, but {gv._fields[0]} a shape")
        return rebox(outer_box(leaf), weight(gv, mesh_axes))
    except ValueError as error:
        raise ValueError(f"{path or 'the gv'}: {error}") from error


def is_array(x: Any) -> bool:
    """Whether a leaf is an array, or stands for one; Python's numbers are not."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def listing(paths: Iterable[str], most: int = 8) -> str:
    """Paths as lines of an error message, cut after `most`."""
    paths = list(paths)
    more = [f"... and {len(paths) - most} more"] if len(paths) > most else []
    return "".join(f"\n  {path}" for path in paths[:most] + more)
