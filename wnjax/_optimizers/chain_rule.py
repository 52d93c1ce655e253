"""One plain weight seen as g and v: there by the chain rule, and back without cancellation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wnjax._leaves.gv import FanIn, WeightNorm, in_range, inverse_root, root, total, weight


class View(NamedTuple):
    """A weight as g and v, in the dtype of the norms. All but w have g's shape.

    Attributes:
      w: the weight.
      length: sign(g)·‖v‖.
      norm: ‖w‖, and 1 where `is_plain`.
      inverse: 1/‖w‖, and 0 where `is_plain`.
      is_plain: where squares do not represent ‖w‖, as in a neuron of zeros. There g is 0, v is w,
        and so is the gradient of v that of w.
      fan_in: what the norm runs over.
    """

    w: jax.Array
    length: jax.Array
    norm: jax.Array
    inverse: jax.Array
    is_plain: jax.Array
    fan_in: FanIn

    @property
    def g(self) -> jax.Array:
        """sign(length)·‖w‖."""
        return jnp.where(self.is_plain, 0, jnp.sign(self.length) * self.norm)

    @property
    def per_w(self) -> jax.Array:
        """v/w, but 0 where `is_plain`."""
        return self.length * self.inverse

    @property
    def gv(self) -> WeightNorm:
        """G and v."""
        return WeightNorm(self.g, self.w * jnp.where(self.is_plain, 1, self.per_w))

    def weight(self, gv: WeightNorm) -> jax.Array:
        """The weight of the (g, v) leaf after a step from this one."""
        return jnp.where(self.is_plain, gv.v, weight(gv, self.fan_in.mesh_axes))


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


def view(w: jax.Array, length: jax.Array, fan_in: FanIn) -> View:
    """A weight as g and v."""
    squared_norm = total(w * w, fan_in)
    is_plain = ~in_range(squared_norm)
    return View(w, length, root(squared_norm), inverse_root(squared_norm), is_plain, fan_in)


def chain_rule(view: View, grad: jax.Array) -> WeightNorm:
    """The gradient of a weight as that of g and v.

    dL/dg = ⟨dL/dw, v⟩/‖v‖,   dL/dv = (g/‖v‖)(dL/dw − ⟨dL/dw, v⟩/‖v‖²·v)
    """
    w, length, inverse = view.w, view.length, view.inverse
    along = total(grad * w, view.fan_in) * inverse  # ⟨dL/dw, v⟩/‖v‖, but for its sign
    ratio = jnp.where(view.is_plain, 1, view.g / jnp.abs(length))
    return WeightNorm(jnp.sign(length) * along, ratio * (grad - (along * inverse) * w))


def weight_grad(view: View, change: WeightNorm, grad: WeightNorm) -> jax.Array:
    """The gradient of the weight after a step, from those of g and v there.

    dL/dw = dL/dg·v/‖v‖ + (‖v‖/g)·dL/dv

    Where g is 0, dL/dv is 0 whatever dL/dw is, and the first term remains: the chain rule makes
    of it what was given.
    """
    (g, v), (dg, dv) = view.gv, change
    g, v = g + dg, v + dv
    squared_norm = total(v * v, view.fan_in)
    is_zero = view.is_plain | (g == 0)
    ratio = jnp.where(is_zero, 0, root(squared_norm) / jnp.where(is_zero, 1, g))
    whole = v * (grad.g * inverse_root(squared_norm)) + ratio * grad.v
    return jnp.where(view.is_plain, grad.v, whole)


def step_back(view: View, change: WeightNorm) -> Step:
    """What a step of g and v does to the weight.

        w' − w = v·(Δg‖v‖ − g·Δ‖v‖)/(‖v‖‖v'‖) + (g'/‖v'‖)·Δv,   Δ‖v‖ = ⟨2v + Δv, Δv⟩/(‖v‖ + ‖v'‖)

    Where `is_plain`, it is Δv.
    """
    w, length, is_plain = view.w, view.length, view.is_plain
    g, per_w, norm = view.g, view.per_w, jnp.abs(length)
    # In one sum and of w, not v: so XLA stores no other array than Δv for it.
    more = total(((2 * per_w) * w + change.v) * change.v, view.fan_in)
    squared = jnp.where(is_plain, more, norm * norm + more)
    new_norm = jnp.where(in_range(squared), root(squared), norm)
    new_g = jnp.where(is_plain, new_norm, g + change.g)
    longer = more / (norm + new_norm)
    turned = per_w * (change.g * norm - g * longer) / (norm * new_norm)
    scale = jnp.where(is_plain, 1, new_g / new_norm)
    sign = jnp.sign(jnp.where(new_g == 0, length, new_g))
    step = w * turned + scale * change.v
    weight = jnp.where(jnp.abs(new_g) < jnp.abs(g) / 2, scale * (w * per_w + change.v), w + step)
    return Step(step, weight, sign * new_norm)
