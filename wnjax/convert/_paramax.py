"""`from_paramax`: models with `paramax.WeightNormalization`."""

from __future__ import annotations

import sys
from typing import Any

import jax

from wnjax._leaves.gv import WeightNorm
from wnjax.convert._replace import checked, replaced


def from_paramax(tree: Any) -> Any:
    """A model with `paramax.WeightNormalization`, as the same model with (g, v) leaves instead.

    g is the scale itself, which paramax keeps as softplus⁻¹(g): w = g·v/‖v‖ is the same, to
    rounding. So is the gradient of v, but a step changes g directly, and may make it negative.
    The norm runs over the last axis, whatever the layer sums over.

    Other wrappers stay where they are, around a (g, v) leaf too: use `paramax.unwrap` of what
    `fold` or `wrap` gives, as `wrap(lambda model, x: paramax.unwrap(model)(x))`.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Args:
      tree: any pytree with such wrappers; stacked ones, too.

    Returns:
      A tree of the same kind. g has v's shape, with size 1 on the last axis.

    Raises:
      ValueError: if there is no such wrapper; if one has another inside, around its weight
        (a mask, say, that a (g, v) leaf would lose) or in its scale; or if it has no arrays.

    >>> import jax, jax.numpy as jnp, paramax
    >>> import wnjax
    >>> old = {"w": paramax.WeightNormalization(jnp.array([[3.0, 4.0]]))}
    >>> wnjax.convert.from_paramax(old)["w"].g.round(3)
    Array([[0.2]], dtype=float32)
    """
    paramax = sys.modules.get("paramax")

    def is_wrapper(x: Any) -> bool:
        return paramax is not None and isinstance(x, paramax.WeightNormalization)

    def is_any_wrapper(x: Any) -> bool:
        return paramax is not None and isinstance(x, paramax.AbstractUnwrappable)

    def converted(path: str, old: Any) -> Any:
        scale = old.scale
        is_function = paramax is not None and isinstance(scale, paramax.Parameterize)
        parts = (old.weight, (scale.args, scale.kwargs) if is_function else scale)
        if any(map(is_any_wrapper, jax.tree.leaves(parts, is_leaf=is_any_wrapper))):
            raise ValueError(
                f"{path}: a wrapper inside the WeightNormalization, around its weight or in its "
                "scale, cannot be in a (g, v) leaf. Unwrap it first, or keep the weight as it is"
            )
        return checked(path, WeightNorm(scale.unwrap() if is_function else scale, old.weight))

    return replaced(tree, is_wrapper, converted, "paramax.WeightNormalization")
