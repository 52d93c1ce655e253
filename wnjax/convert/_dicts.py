"""`from_dicts`: (g, v) leaves that a file has made dicts of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from wnjax._leaves.gv import LogWeightNorm, WeightNorm
from wnjax.convert._replace import checked, is_array, replaced


def from_dicts(tree: Any) -> Any:
    """A tree of (g, v) leaves, from the dicts that files keep of them.

    Orbax and msgpack without a target, and safetensors once its names are nested, give
    `{"g": ..., "v": ...}` for a `WeightNorm`, and `{"log_g": ..., "v": ...}` for a `LogWeightNorm`.
    For every Flax box and NNX variable they give `{"value": ...}`: it is taken off g and v, and
    kept elsewhere.

    Args:
      tree: any pytree with such dicts.

    Returns:
      The tree with (g, v) leaves in their places, of the same arrays.

    Raises:
      ValueError: if there is no such dict; or if one has the keys of a (g, v) leaf but is none: its
        shapes do not fit, or leave no fan-in axis, v is not floating-point, or only one of the
        two is an array. (Such are the lengths in the state of `weight_normalized`: restore that
        with a target.)

    >>> import numpy as np
    >>> import wnjax
    >>> restored = {"kernel": {"g": np.array([[10.0]]), "v": np.array([[3.0], [4.0]])}}
    >>> wnjax.fold(wnjax.convert.from_dicts(restored))
    {'kernel': Array([[6.],
           [8.]], dtype=float32)}
    """
    kinds: dict[frozenset[str], Any] = {
        frozenset(kind._fields): kind for kind in (WeightNorm, LogWeightNorm)
    }

    def is_dict_of_gv_leaf(x: Any) -> bool:
        return (
            isinstance(x, Mapping)
            and frozenset(x) in kinds
            and any(is_array(_without_value(child)) for child in x.values())
        )

    def converted(path: str, x: Mapping[str, Any]) -> Any:
        kind = kinds[frozenset(x)]
        gv = checked(path, kind(**{name: _without_value(x[name]) for name in kind._fields}))
        if 1 not in gv[0].shape or not jnp.issubdtype(gv.v.dtype, jnp.floating):
            raise ValueError(
                f"{path} has the keys of a {kind.__name__}, but {kind._fields[0]} has no axis of "
                f"size 1, to be a fan-in axis, or v is not floating-point: {kind._fields[0]} has "
                f"shape {gv[0].shape}, v {gv.v.shape} and dtype {gv.v.dtype}. If this is no "
                "(g, v) leaf, convert the rest of the tree without it"
            )
        return gv

    return replaced(tree, is_dict_of_gv_leaf, converted, "dict of a (g, v) leaf")


def _without_value(x: Any) -> Any:
    return x["value"] if isinstance(x, Mapping) and set(x) == {"value"} else x
