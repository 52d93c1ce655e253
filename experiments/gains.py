"""A gradient transformation that lets gains grow as fast as the lengths of plain weights."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

import wnjax


def scale_gains_by_fan_in() -> optax.GradientTransformation:
    """Multiplies the update of every gain by the square root of its fan-in n.

        Δg ← √n · Δg

    A step of Adam or Adamax moves every parameter by about the learning rate. So it changes the
    length of a plain weight of n entries by up to √n times the learning rate, but a gain by the
    learning rate alone. This transformation takes that difference away. It belongs behind the
    optimizer: `optax.chain(optax.adam(1e-3), scale_gains_by_fan_in())`, for normalized
    parameters, or inside of `wnjax.weight_normalized`. Updates of directions and of all other
    parameters pass unchanged. log g changes the length by a factor, and passes unchanged too.
    """

    def scale(leaf: Any) -> Any:
        if not isinstance(leaf, wnjax.WeightNorm):
            return leaf
        return leaf._replace(g=leaf.g * math.sqrt(leaf.v.size // max(leaf.g.size, 1)))

    def update(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(scale, updates, is_leaf=wnjax.is_weight_norm)

    return optax.stateless(update)
