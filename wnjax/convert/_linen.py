"""`from_linen`: the parameters of `flax.linen.WeightNorm`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, unflatten_dict

from wnjax._axes.decisions import FeatureAxes, first_patterns
from wnjax._leaves.trees import box_gv, listing
from wnjax.convert._scales import Key, Parts, as_path, gv_of, parts_of


def from_linen(
    params: Any,
    feature_axes: FeatureAxes | Mapping[str, FeatureAxes | None] | None = -1,
    epsilon: float = 1e-12,
) -> Any:
    """The params of a model with `flax.linen.WeightNorm`, as those of the model without it.

    Flax keeps the scales s apart from the layers, in the wrapper's own scope, and computes

        w = s·v/√(‖v‖² + ε)

    A (g, v) leaf takes the place of every v; the wrapper's scope goes. So the result fits the model
    in which `nn.WeightNorm(layer)` has become `layer` (use it with `wrap` or `fold`) or
    `wnjax.linen.WeightNorm(layer)`, if the layers keep their names: `Dense_0` for a layer made
    in a compact call, the attribute's name for one made in `setup`. What the wrapper called
    `layer_instance`, a layer without a name of its own, takes the wrapper's place.

    v stays as it is, and g = s‖v‖/√(‖v‖² + ε), which is s to the last bit for ‖v‖ above 0.005 in
    float32. So w is Flax's to rounding, and so are the gradients. A v of zeros, from which
    Flax makes a weight of zeros, gets g = 0 and a pseudo-random v, as in `weight_norm`.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Args:
      params: nested dicts, or a FrozenDict, with boxes or without; of the collection `params`, or
        of all variables. Keys may be Flax's own (`Dense_0/kernel/scale`, of boxed weights
        `Dense_0/kernel/value/scale`), or these flattened or nested at their slashes, or what a
        checkpoint without a target gives (`{"value": ...}` for a box).
      feature_axes: the wrapper's: an int, a tuple of ints, or None for one norm of the whole
        weight. If wrappers differ, a dict from regular expressions, matched against the whole
        slash path of the weight, to these; what none matches has -1. The shapes must fit, but
        of a square kernel they cannot tell the one axis from the other. A scale with more
        axes than this has been stacked by `nn.scan` or `nn.vmap`, on leading axes.
      epsilon: the wrapper's ε.

    Returns:
      New nested dicts, or a FrozenDict. g has v's rank, size 1 on the fan-in axes, and is float32
      or wider; v has its shape, dtype and box. Flax computes with the wider dtype of s and v,
      which the result rounds to v's: in bfloat16, w differs by an ulp.

    Raises:
      ValueError: if no scale is found, as for `use_scale=False`, which stores none; if one has no
        weight, or does not fit it; if a weight has two.
      TypeError: if `params` is no dict, or a weight no floating-point array.

    >>> import jax.numpy as jnp
    >>> import wnjax
    >>> params = {
    ...     "Dense_0": {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.zeros(1)},
    ...     "WeightNorm_0": {"Dense_0/kernel/scale": jnp.array([10.0])},
    ... }
    >>> wnjax.fold(wnjax.convert.from_linen(params))
    {'Dense_0': {'bias': Array([0.], dtype=float32), 'kernel': Array([[6.],
           [8.]], dtype=float32)}}
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be nested dicts, got a {type(params).__name__}")
    leaves = flatten_dict(params, keep_empty_nodes=True)
    scales = _linen_scales({parts_of(key): key for key in leaves})
    if not scales:
        raise ValueError(
            "found no scale of flax.linen.WeightNorm. use_scale=False stores none: take "
            "weight_norm(params, axes) then, set every g to 1, and do not train it. "
            f"The leaves are{listing(as_path(key) for key in leaves)}"
        )
    axes = _axes_of(scales, feature_axes)
    for key, scale in scales.items():
        box = leaves[key]
        gv, features = gv_of(as_path(key), box, leaves.pop(scale), axes[key], epsilon)
        leaves[key] = box_gv(box, gv, features)
    tree = unflatten_dict(_without_wrappers(leaves, scales))
    return freeze(tree) if isinstance(params, FrozenDict) else tree


def _linen_scales(keys: Mapping[Parts, Key]) -> dict[Key, Key]:
    """The scale of every weight that has one: both keys."""
    found: dict[Key, Key] = {}
    for parts, key in keys.items():
        if parts[-1:] != ("scale",):
            continue
        weight = next((keys[option] for option in _weights(parts) if option in keys), None)
        if weight is None:
            if parts[-2:-1] == ("kernel",) or ("/" in key[-1] and len(key) > 1):
                raise ValueError(f"{'/'.join(parts)}: found no weight that this is the scale of")
            continue  # of a LayerNorm, say
        if weight in found or parts_of(weight)[-1:] == ("scale",):
            raise ValueError(
                f"{as_path(weight)} is normalized twice, by {'/'.join(parts)} too: it has one g"
            )
        found[weight] = key
    return found


def _without_wrappers(leaves: Mapping[Key, Any], scales: Mapping[Key, Key]) -> dict[Key, Any]:
    """`leaves` without the level `layer_instance` of every wrapper that has a scale inside."""
    levels = set()
    for weight, scale in scales.items():
        parts = parts_of(weight)
        if parts == parts_of(scale)[: len(parts)] and "layer_instance" in parts:
            levels.add(parts[: parts.index("layer_instance") + 1])
    return {_without_level(key, levels): leaf for key, leaf in leaves.items()}


def _without_level(key: Key, levels: Set[Parts]) -> Key:
    """A key without the last part of the level that it is in: in any collection of variables."""
    parts = parts_of(key)
    for level in levels:
        start = 1 if level[0] == "params" else 0
        if parts[start : len(level)] == level[start:]:
            names = iter((*parts[: len(level) - 1], None, *parts[len(level) :]))
            split = [[next(names) for _ in str(name).split("/")] for name in key]
            return tuple("/".join(filter(None, name)) for name in split if any(name))
    return key


def _weights(parts: Parts) -> Iterator[Parts]:
    """Where the weight of a scale may be: its path without the wrapper, nearest first.

    The layer is in the wrapper, beside it, or in a module further out that has lent it.
    """
    *inside, _ = parts
    names = [inside, inside[:-1]] if inside[-1:] == ["value"] else [inside]  # of a boxed weight
    for removed in range(len(parts) - 2):
        for name in names:
            for start in reversed(range(len(name) - removed - 1)):
                yield (*name[:start], *name[start + removed :])


def _axes_of(keys: Mapping[Key, Any], feature_axes: Any) -> dict[Key, Any]:
    """The feature axes of every weight: the same for all, or by patterns on the paths."""
    if not isinstance(feature_axes, Mapping):
        return dict.fromkeys(keys, feature_axes)
    firsts = first_patterns(feature_axes, list(map(as_path, keys)), "feature_axes")
    return {
        key: -1 if first is None else feature_axes[first]
        for key, first in zip(keys, firsts, strict=True)
    }
