"""One plain weight seen as g and v: there by the chain rule, and back without cancellation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wnjax._nodes import FanIn, WeightNorm, in_range, inverse_root, total


class View(NamedTuple):
    """A weight as g and v, in the dtype of the norms. All but w have g's shape.

    Attributes:
      w: the weight.
      g: sign(length)·‖w‖.
      length: sign(g)·‖v‖.
      per_w: v/w.
      is_zero: where w has no direction. There v is 0, and its gradient is that of w.
      fan_in: what the norm runs over.
    """

    w: jax.Array
    g: jax.Array
    length: jax.Array
    per_w: jax.Array
    is_zero: jax.Array
    fan_in: FanIn

    @property
    def node(self) -> WeightNorm:
        """G and v."""
        return WeightNorm(self.g, self.w * self.per_w)


class Step(NamedTuple):
    """A step of g and v, as one of the weight.

    Attributes:
      change: w' − w, exactly zero where g and v stay.
      weight: w'; not as w + change where most of w is taken away.
      length: sign(g')·‖v'‖.
    """

    change: jax.Array
    weight: jax.Array
    length: jax.Array


def chain_rule(
    w: jax.Array, grad: jax.Array, length: jax.Array, fan_in: FanIn
) -> tuple[View, WeightNorm]:
    """A weight as g and v, and its gradient as theirs.

    dL/dg = ⟨dL/dw, v⟩/‖v‖,   dL/dv = (g/‖v‖)(dL/dw − ⟨dL/dw, v⟩/‖v‖²·v)
    """
    squared_norm = total(w * w, fan_in)
    is_zero = (squared_norm < 1) & ~in_range(squared_norm)
    inverse = inverse_root(squared_norm)
    g = jnp.where(is_zero, 0, jnp.sign(length) * jnp.sqrt(squared_norm))
    view = View(w, g, length, length * inverse, is_zero, fan_in)
    along = total(grad * w, fan_in) * inverse  # ⟨dL/dw, v⟩/‖v‖, but for its sign
    ratio = jnp.where(is_zero, 1, g / jnp.abs(length))
    return view, WeightNorm(jnp.sign(length) * along, ratio * (grad - (along * inverse) * w))


def step_back(view: View, change: WeightNorm) -> Step:
    """What a step of g and v does to the weight.

        w' − w = v·(Δg‖v‖ − g·Δ‖v‖)/(‖v‖‖v'‖) + (g'/‖v'‖)·Δv,   Δ‖v‖ = ⟨2v + Δv, Δv⟩/(‖v‖ + ‖v'‖)

    Where w is zero it is Δv.
    """
    w, g, length, per_w, is_zero, fan_in = view
    norm = jnp.abs(length)
    # In one sum and of w, not v: so XLA stores no other array than Δv for it.
    more = total(((2 * per_w) * w + change.v) * change.v, fan_in)
    squared = jnp.where(is_zero, more, norm * norm + more)
    new_norm = jnp.where(in_range(squared), jnp.sqrt(squared), norm)
    new_g = jnp.where(is_zero, new_norm, g + change.g)
    longer = more / (norm + new_norm)
    turned = per_w * (change.g * norm - g * longer) / (norm * new_norm)
    scale = new_g / new_norm
    sign = jnp.sign(jnp.where(new_g == 0, length, new_g))
    step = w * turned + scale * change.v
    weight = jnp.where(jnp.abs(new_g) < jnp.abs(g) / 2, scale * (w * per_w + change.v), w + step)
    return Step(step, weight, sign * new_norm)
