"""The arithmetic of mean-only batch normalization, for Linen and NNX alike."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wnjax._leaves.gv import norm_dtype


def canonical(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Feature axes as sorted non-negative integers."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    return tuple(sorted(one % ndim for one in axes))


def batch_mean(
    x: jax.Array,
    feature_axes: tuple[int, ...],
    mask: jax.Array | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
) -> jax.Array:
    """μ[x] over all but the feature axes, in float32 or wider.

    Where a mask leaves nothing of a feature, 0. Devices count by what their masks leave.
    """
    axes = tuple(axis for axis in range(x.ndim) if axis not in feature_axes)
    wide = x.astype(norm_dtype(x.dtype))
    if mask is None:
        mean: jax.Array = jnp.mean(wide, axes)
        if axis_name is not None:
            mean = jax.lax.pmean(mean, axis_name, axis_index_groups=axis_index_groups)
        return mean
    counts = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
    both = jnp.sum(jnp.where(counts, wide, 0), axes), jnp.sum(counts, axes, dtype=wide.dtype)
    if axis_name is not None:
        both = jax.lax.psum(both, axis_name, axis_index_groups=axis_index_groups)
    return both[0] / jnp.maximum(both[1], 1)


def running(old: jax.Array, mean: jax.Array, momentum: float) -> jax.Array:
    """The running mean after a batch: momentum·old + (1 − momentum)·μ."""
    return (momentum * old + (1 - momentum) * mean).astype(old.dtype)


def centered(
    x: jax.Array,
    mean: jax.Array,
    bias: jax.Array | None,
    feature_axes: tuple[int, ...],
    dtype: Any = None,
) -> jax.Array:
    """The sum x − μ + b in float32 or wider, cast to `dtype`, or to that of x and b."""
    shape = [size if axis in feature_axes else 1 for axis, size in enumerate(x.shape)]
    wide = norm_dtype(x.dtype)
    y = x.astype(wide) - mean.astype(wide).reshape(shape)
    dtypes = [x.dtype] if jnp.issubdtype(x.dtype, jnp.inexact) else []
    if bias is not None:
        y = y + bias.astype(wide).reshape(shape)
        dtypes.append(bias.dtype)
    if dtype is None:
        dtype = functools.reduce(jnp.promote_types, dtypes or [wide])
    return y.astype(dtype)
