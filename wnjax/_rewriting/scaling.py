"""A scale g/‖v‖ on the output of a layer: where it lies there."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wnjax._analysis.layout import Layout


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

    mine = [sizes(axis.atoms) for axis in layout]
    # An axis may hold atoms along which it does not vary, beside those along which it does.
    full = [
        [atom.size for atom in axis.atoms] if math.prod(parts) > 1 else parts
        for axis, parts in zip(layout, mine, strict=True)
    ]
    atoms = [a for axis in layout for a in axis.atoms if a.axis in varying and a.size > 1]
    in_leaf = sorted(range(len(atoms)), key=lambda i: (atoms[i].axis or 0, -atoms[i].stride))
    if in_leaf != list(range(len(atoms))):
        scale = scale.reshape([atoms[i].size for i in in_leaf]).transpose(np.argsort(in_leaf))
    if full != mine:
        scale = scale.reshape([size for parts in mine for size in parts])
        scale = jnp.broadcast_to(scale, [size for parts in full for size in parts])
    return scale.reshape([math.prod(parts) for parts in full])
