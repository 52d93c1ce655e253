"""`from_equinox`: models with `equinox.nn.WeightNorm`."""

from __future__ import annotations

import sys
from typing import Any

import jax

from wnjax._leaves.gv import WeightNorm
from wnjax.convert._replace import checked, replaced


def from_equinox(tree: Any) -> Any:
    """A model with `equinox.nn.WeightNorm` layers, as the same model without them.

    In the place of `WeightNorm(layer)` is the layer, with a (g, v) leaf in the place of its weight:
    the very g and v, and so the same function, w = g·v/‖v‖, and the same gradients, to rounding.
    Call it by `wrap` or after `fold`.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Args:
      tree: any pytree with such layers, of arrays or of their shapes; stacked ones, too.

    Returns:
      A tree of the same kind. g has v's rank, and size 1 on all axes but `axis`, as in Equinox.

    Raises:
      ValueError: if there is no such layer, or one is inside another, or has no arrays, as
        after `equinox.partition`.

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> import wnjax
    >>> old = eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=jax.random.key(0)))
    >>> new = wnjax.convert.from_equinox(old)
    >>> new.weight.g.shape
    (4, 1)
    >>> bool(jnp.allclose(wnjax.fold(new)(jnp.ones(3)), old(jnp.ones(3))))
    True
    """
    # A tree can have such layers only where Equinox has been imported.
    equinox = sys.modules.get("equinox")

    def is_layer(x: Any) -> bool:
        return equinox is not None and isinstance(x, equinox.nn.WeightNorm)

    def converted(path: str, old: Any) -> Any:
        if any(map(is_layer, jax.tree.leaves(old.layer, is_leaf=is_layer))):
            raise ValueError(f"{path}: a WeightNorm inside another; a (g, v) leaf has one g")
        gv = checked(path, WeightNorm(old.g, getattr(old.layer, old.weight_name)))

        def put(leaf_path: Any, leaf: Any) -> Any:
            is_weight = jax.tree_util.keystr(leaf_path, simple=True) == old.weight_name
            return gv if is_weight else leaf

        return jax.tree_util.tree_map_with_path(put, old.layer)

    return replaced(tree, is_layer, converted, "equinox.nn.WeightNorm")
