"""A scale g/‖v‖ on the output of a layer: where it lies there, and what its derivative costs."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from wnjax._walk.layout import Layout
from wnjax._walk.sizes import is_known


def times(value: jax.Array, factor: jax.Array) -> jax.Array:
    """Their product, in the dtype of `value`."""
    if jnp.iscomplexobj(value):
        return value * factor.astype(value.dtype)
    return (value.astype(factor.dtype) * factor).astype(value.dtype)


def lay_out(scale: jax.Array, layout: Layout) -> jax.Array:
    """A scale of its leaf's rank, in the layout of a value: size 1 where it does not vary."""
    varying = {axis for axis, size in enumerate(scale.shape) if size > 1}

    def sizes(axis_atoms: Any) -> list[int]:
        return [atom.size if atom.axis in varying else 1 for atom in axis_atoms]

    atoms = [a for axis in layout for a in axis.atoms if a.axis in varying and a.size > 1]
    in_leaf = sorted(range(len(atoms)), key=lambda i: (atoms[i].axis or 0, -atoms[i].stride))
    scale = scale.reshape([atoms[i].size for i in in_leaf]).transpose(np.argsort(in_leaf))
    mine = [sizes(axis.atoms) for axis in layout]
    is_mixed = [math.prod(parts) > 1 for parts in mine]  # an axis may hold other atoms beside
    full = [
        [atom.size for atom in axis.atoms] if mixed else parts
        for axis, parts, mixed in zip(layout, mine, is_mixed, strict=True)
    ]
    flat = scale.reshape([size for parts in mine for size in parts])
    flat = jnp.broadcast_to(flat, [size for parts in full for size in parts])
    return flat.reshape([math.prod(parts) for parts in full])


def is_alone() -> bool:
    """Whether nothing can be sharded, so that `after` sends nothing from device to device."""
    return jax.device_count() == 1


@functools.partial(jax.jit, inline=True)  # traced once for all layers of a shape
def after(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The identity, whose derivative finds that of `scale` only after that of `x`.

    `x` is the input of the layer that `scale` belongs to. Its gradient reads v; that of the
    scale goes into the update of v, in place where v is donated. Unless one depends on the other,
    XLA cannot know which comes first, and copies v: two of the three passes over v that weight
    norm then adds to a training step. (It drops `optimization_barrier`s before it decides.)
    Where `jax.export` leaves a size of `x` open, it keeps no order.
    """
    return _identity(x, scale)


@jax.custom_jvp
def _identity(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, scale


def _in_order(primals: Any, tangents: Any) -> Any:
    (x, scale), (dx, dscale) = primals, tangents
    if isinstance(dx, SymbolicZero) or isinstance(dscale, SymbolicZero):
        return (x, scale), (dx, dscale)
    if not is_known(*x.shape) or not x.size:
        return (x, scale), (dx, dscale)
    # Zero, but XLA cannot know: transposed, the gradient of the scale waits for one of x's numbers.
    nothing = jnp.sum(jnp.where(jnp.isnan(scale), dscale, 0)).astype(dx.dtype)
    rows = dx.reshape(-1, dx.shape[-1]) if dx.ndim else dx.reshape(1, 1)
    padding = [(0, size - 1, 0) for size in rows.shape]
    padded = jax.lax.pad(nothing.reshape(1, 1), jnp.zeros((), dx.dtype), padding)
    return (x, scale), ((rows + padded).reshape(dx.shape), dscale)


_identity.defjvp(_in_order, symbolic_zeros=True)
