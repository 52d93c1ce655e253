"""Flax's scales as gains."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from wnjax._leaves.gv import WeightNorm
from wnjax._leaves.trees import unbox
from wnjax._transforms.weight_norm import check_floating, split

Key = tuple[Any, ...]  # of a leaf in nested dicts
Parts = tuple[str, ...]  # of a slash path


def gv_of(
    path: str, box: Any, scale: Any, feature_axes: Any, epsilon: float
) -> tuple[WeightNorm, tuple[int, ...]]:
    """The (g, v) leaf of a weight v of Flax's, and its feature axes."""
    v, scale = unbox(box), unbox(scale)
    check_floating(path, v)
    features = features_of(path, v, scale, feature_axes)
    norm, direction = split(path, jnp.asarray(v), features)
    return WeightNorm(gain_of(scale, norm, epsilon), direction), features


def features_of(path: str, v: Any, scale: Any, feature_axes: Any) -> tuple[int, ...]:
    """The feature axes in v of a scale that Flax has made for `feature_axes`, or of none."""
    given = () if feature_axes is None else feature_axes
    axes = tuple(given) if isinstance(given, tuple | list) else (given,)
    stacked = 0 if scale is None else scale.ndim - len(axes)
    features = sorted(
        {*range(stacked), *(axis + (v.ndim if axis < 0 else max(stacked, 0)) for axis in axes)}
    )
    is_in_range = all(0 <= axis < v.ndim for axis in features)
    shape = tuple(v.shape[axis] for axis in features) if is_in_range else None
    if shape is None or (scale is not None and scale.shape != shape):
        raise ValueError(
            f"{path} of shape {v.shape}: feature axes {feature_axes!r} do not fit "
            f"{'it' if scale is None else f'its scale of shape {scale.shape}'}. Give the "
            "feature_axes that flax's WeightNorm had"
        )
    return tuple(features)


def gain_of(scale: Any, norm: jax.Array, epsilon: float) -> jax.Array:
    """s‖v‖/√(‖v‖² + ε), of the norms' shape and dtype."""
    wide = jnp.asarray(scale).astype(norm.dtype).reshape(norm.shape)
    return wide / jnp.sqrt(1 + epsilon / (norm * norm))


def as_path(key: Key) -> str:
    return "/".join(map(str, key))


def parts_of(key: Key) -> Parts:
    """A key split at the slashes in it too."""
    return tuple(as_path(key).split("/"))
