"""(g, v) leaves in the place of what is found in a tree."""

from __future__ import annotations

from typing import Any

import jax

from wnjax._leaves.gv import fan_in_axes
from wnjax._leaves.trees import listing


def replaced(tree: Any, is_one: Any, converted: Any, what: str) -> Any:
    """`tree` with `converted(path, x)` in the place of every x of which `is_one` holds."""
    pairs: list[tuple[Any, Any]]
    treedef: Any
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_one)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    if not any(is_one(leaf) for _, leaf in pairs):
        raise ValueError(f"found no {what} in the tree. Its leaves are{listing(paths)}")
    return treedef.unflatten(
        converted(path or "the tree", leaf) if is_one(leaf) else leaf
        for path, (_, leaf) in zip(paths, pairs, strict=True)
    )


def checked(path: str, gv: Any) -> Any:
    """A (g, v) leaf, if it is of arrays whose shapes fit each other."""
    for name, x in zip(gv._fields, gv, strict=True):
        if not is_array(x):
            raise ValueError(f"{path}: {name} should be an array, but is a {type(x).__name__}")
    try:
        fan_in_axes(gv)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return gv


def is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")
