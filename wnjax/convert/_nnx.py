"""`from_nnx`: modules and states of `flax.nnx.WeightNorm`."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from wnjax._axes.decisions import FeatureAxes
from wnjax._leaves.trees import box_gv, listing, unbox
from wnjax.convert._scales import Key, as_path, features_of, gain_of, gv_of, parts_of
from wnjax.nnx import WeightNorm as NNXWeightNorm
from wnjax.nnx import as_pair


def from_nnx(tree: Any, feature_axes: FeatureAxes | None = -1, epsilon: float = 1e-12) -> Any:
    """A model with `flax.nnx.WeightNorm`, or its state, with `wnjax.nnx.WeightNorm` instead.

    Flax computes w = s·v/√(‖v‖² + ε), and writes it where v was. The new layer has what is there
    now as v, and g = s‖v‖/√(‖v‖² + ε), which is s to the last bit for ‖v‖ above 0.005 in float32.
    w is Flax's to rounding. A v of zeros gets g = 0 and a pseudo-random v, as in `weight_norm`.

    g is an `nnx.Param` and trains, as the scales of Flax 0.12.8 do not: make a new optimizer.
    To leave it as it is, train `nnx.All(nnx.Param, nnx.Not(nnx.PathContains("g")))`.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Args:
      tree: a module; or an `nnx.State`, or the nested dicts of one, as a checkpoint gives them
        back with or without a target: then g and v take the place of the weight, and `scales` goes.
      feature_axes: of a state, the wrapper's: an int, a tuple of ints, or None for one norm of
        the whole weight. Modules know their own. A scale with more axes than this has been
        stacked by `nnx.vmap`, on leading axes.
      epsilon: of a state, the wrapper's ε; modules know their own.

    Returns:
      A copy of the module in which all layers are replaced; one that is in several places stays
      one. A layer without scales gets gains of 1. Or the state of such a copy, of the type of
      `tree`; what a checkpoint made of variables, `{"value": ...}`, stays so.

    Raises:
      ValueError: if there is no such layer; if a scale has no weight, or does not fit it; if a
        layer normalizes nothing, or a bias, which has no fan-in axis.
      TypeError: if `tree` is neither a module, nor a state, nor a dict.

    >>> from flax import nnx
    >>> import wnjax
    >>> old = nnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    >>> new = wnjax.convert.from_nnx(old)
    >>> type(new) is wnjax.nnx.WeightNorm, new.kernel.g.shape
    (True, (1, 4))
    """
    if isinstance(tree, nnx.Module):
        return _nnx_module(tree)
    if isinstance(tree, nnx.State):
        flat = dict(nnx.to_flat_state(tree))
        return nnx.from_flat_state(_nnx_state(flat, feature_axes, epsilon))
    if isinstance(tree, Mapping):
        flat = flatten_dict(tree, keep_empty_nodes=True)
        return unflatten_dict(_nnx_state(flat, feature_axes, epsilon))
    raise TypeError(f"from_nnx takes a module, a state or a dict, got a {type(tree).__name__}")


def _nnx_module(module: nnx.Module) -> Any:
    found = []

    def replaced(path: Key, module: Any) -> Any:
        if not isinstance(module, nnx.WeightNorm):
            return module
        found.append(path)
        try:
            return _nnx_layer(module)
        except ValueError as error:
            raise ValueError(f"{as_path(path) or 'the module'}: {error}") from error

    result = nnx.recursive_map(replaced, nnx.clone(module))
    if not found:
        raise ValueError("found no flax.nnx.WeightNorm in the module")
    return result


def _nnx_layer(old: Any) -> NNXWeightNorm:
    """One layer, which it uses up."""
    params = dict(nnx.to_flat_state(nnx.state(old.layer_instance, nnx.Param)))
    scales = {
        path: unbox(old.scales[path]) if old.use_scale else None
        for path, param in params.items()
        if old.variable_filter(path, param)
    }
    features = {
        as_path(path): features_of(as_path(path), unbox(params[path]), scale, old.feature_axes)
        for path, scale in scales.items()
    }
    new = NNXWeightNorm(old.layer_instance, axes=lambda path, _: features.get(path))
    state = dict(nnx.to_flat_state(nnx.state(new.layer_instance, nnx.Param)))
    for path, scale in scales.items():
        place = state[*path, "g"]
        g = place.get_value()
        place.set_value(gain_of(jnp.ones_like(g) if scale is None else scale, g, old.epsilon))
    return new


def _nnx_state(flat: dict[Key, Any], feature_axes: Any, epsilon: float) -> dict[Key, Any]:
    keys = {parts_of(key): key for key in flat}
    result = dict(flat)
    for key in flat:
        if (found := _scale_place(key)) is None:
            continue
        outer, inner = found
        place = (*outer, "layer_instance", *inner)
        options = [((*place, *end), end) for end in ((), ("value",))]
        weight, end = next(
            ((keys[parts_of(x)], end) for x, end in options if parts_of(x) in keys), (None, ())
        )
        if weight is None:
            raise ValueError(f"{as_path(key)}: found no weight that this is the scale of")
        box = result.pop(weight)
        gv, features = gv_of(as_path(weight), box, result.pop(key), feature_axes, epsilon)
        if len(features) == gv.v.ndim:
            raise ValueError(f"{as_path(weight)} has no fan-in axis, over which to take a norm")
        inside = weight[: len(weight) - len(end)]
        for name, x in as_pair(box_gv(box, gv, features))._asdict().items():
            result[*inside, name, *end] = x
    if result.keys() == flat.keys():
        raise ValueError(
            "found no scale of flax.nnx.WeightNorm. use_scale=False stores none: convert the "
            f"module then. The leaves are{listing(map(as_path, flat))}"
        )
    return result


def _scale_place(key: Key) -> tuple[Key, Key] | None:
    """The path of the wrapper of a scale, and that of its weight inside; None for other keys.

    The latter is one key, a tuple, of which a file makes a string.
    """
    for i, (name, inner) in enumerate(itertools.pairwise(key)):
        if name == "scales" and str(inner).startswith("("):
            return key[:i], ast.literal_eval(inner) if isinstance(inner, str) else inner
    return None
