"""Mean and standard deviation of what the neurons of a layer compute from a minibatch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wnjax._analysis.layout import Atom, Layout, atoms_of
from wnjax._leaves.gv import norm_dtype

AxisName = Any  # as of jax.lax.pmean: a name, or several


class Minibatch(NamedTuple):
    """What the moments are of.

    Attributes:
      mask: what counts, with the leading axes of every output; None if all does.
      axis_name: of the devices that have a part of it each; None if there is but one.
    """

    mask: jax.Array | None = None
    axis_name: AxisName = None


class Moments(NamedTuple):
    """Of each neuron, laid out as its gain is.

    Attributes:
      mean: float32 or wider.
      std: likewise; the root of the mean squared deviation, without Bessel's correction.
    """

    mean: jax.Array
    std: jax.Array


def count(layout: Layout, shape: Sequence[int], axis_name: AxisName) -> int:
    """How many numbers there are of each neuron on all devices, masked ones included."""
    atoms = atoms_of(layout)
    number = math.prod(atoms[i].size for i in _summed(atoms, shape))
    return number if axis_name is None else number * int(jax.lax.axis_size(axis_name))


def _summed(atoms: Sequence[Atom], shape: Sequence[int]) -> tuple[int, ...]:
    """Those of the atoms along which no neurons lie."""
    return tuple(
        i for i, a in enumerate(atoms) if not (a.axis is not None and a.size > 1 < shape[a.axis])
    )


def moments(
    value: jax.Array,
    layout: Layout,
    shape: Sequence[int],
    minibatch: Minibatch,
) -> Moments:
    """The moments over everything but the neurons.

    As the authors' code does it, first the mean, and then the deviations from it.

    Args:
      value: the output of a layer.
      layout: where the axes of its weight, or bias, lie in it.
      shape: of the weight or bias, with size 1 on the axes that its neurons do not lie along.
      minibatch: what counts of it, and where the rest of it is.
    """
    mask, axis_name = minibatch
    atoms = atoms_of(layout)
    sizes = [atom.size for atom in atoms]
    summed = _summed(atoms, shape)
    kept = [i for i in range(len(atoms)) if i not in summed]
    wide = value.astype(norm_dtype(value.dtype)).reshape(sizes)
    counted = None if mask is None else _fitting(mask, value).reshape(sizes)

    def mean(x: jax.Array) -> jax.Array:
        if counted is None:
            average = jnp.mean(x, summed, keepdims=True)
            return average if axis_name is None else jax.lax.pmean(average, axis_name)
        total = jnp.sum(jnp.where(counted, x, 0), summed, keepdims=True)
        number = jnp.sum(counted, summed, keepdims=True, dtype=x.dtype)
        if axis_name is not None:
            total, number = jax.lax.psum((total, number), axis_name)
        return total / jnp.maximum(number, 1)

    center = mean(wide)
    std = jnp.sqrt(mean(jnp.square(wide - center)))
    order = sorted(range(len(kept)), key=lambda i: (atoms[kept[i]].axis, -atoms[kept[i]].stride))

    def as_leaf(x: jax.Array) -> jax.Array:
        return x.squeeze(summed).transpose(order).reshape(shape)

    return Moments(as_leaf(center), as_leaf(std))


def _fitting(mask: jax.Array, value: jax.Array) -> jax.Array:
    """The mask in the shape of `value`, whose first axes may be the mask's, flattened."""
    if value.shape[: mask.ndim] != mask.shape and value.shape[:1] == (mask.size,):
        mask = mask.reshape(-1)
    if value.shape[: mask.ndim] != mask.shape:
        raise ValueError(
            f"mask of shape {mask.shape} does not fit an output of shape {value.shape}: it must "
            "have the leading axes of the output of every layer, such as (examples,)"
        )
    mask = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
    return jnp.broadcast_to(mask, value.shape)
