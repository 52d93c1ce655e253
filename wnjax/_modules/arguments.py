"""The arguments of the modules: their own, and those of the Flax modules whose place they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen, nnx

from wnjax._axes.decisions import Decision, NotWeight, decide

# What to write instead of an argument of Flax's WeightNorm, or of its BatchNorm.
WEIGHT_NORM_INSTEAD = {
    "epsilon": "the norm needs none, since a neuron of zeros has a defined weight and gradient",
    "dtype": "give dtype to the layer",
    "param_dtype": "give param_dtype to the layer, whose dtype v has; g is float32 or wider",
    "use_scale": "every weight has a gain. Leave use_scale out, and train the directions alone: "
    'optax.partition({"g": optax.set_to_zero(), "v": tx, "other": tx}, wnjax.labels) for Linen, '
    'nnx.Optimizer(..., wrt=nnx.All(nnx.Param, nnx.Not(nnx.PathContains("g")))) for NNX',
    "scale_init": "g starts as the norm of the weight that the layer draws. Give kernel_init to "
    "the layer, or set g once it is there",
    "promote_dtype": "give promote_dtype to the layer",
}
_NO_SCALE = "the gain g of the weight norm before it is the scale"
_NO_VARIANCE = "the variance is not normalized; leave it out"
BATCH_NORM_INSTEAD = {
    "epsilon": _NO_VARIANCE,
    "use_scale": f"{_NO_SCALE}; leave use_scale out or say False",
    "scale_init": f"{_NO_SCALE}; wnjax.data_init sets it from data",
    "scale_metadata": _NO_SCALE,
    "use_fast_variance": _NO_VARIANCE,
    "force_float32_reductions": "the mean is taken in float32 or wider; leave it out or say True",
    "promote_dtype": "give dtype, the dtype of the result",
}


def check_module(owner: str, given: Any, kind: type) -> None:
    """Raises TypeError unless `given` is an instance of `kind`, Linen's or NNX's Module."""
    if isinstance(given, kind):
        return
    example = "nn.Dense(4)" if kind is linen.Module else "nnx.Linear(3, 4, rngs=nnx.Rngs(0))"
    if isinstance(given, type):
        got = f"the class {given.__name__}: make an instance of it first"
    elif isinstance(given, linen.Module):
        got = "a Linen module: wnjax.linen.WeightNorm takes those"
    elif isinstance(given, nnx.Module):
        got = "an NNX module: wnjax.nnx.WeightNorm takes those"
    else:
        got = f"a {type(given).__name__}: wnjax.weight_norm takes trees of arrays"
    raise TypeError(f"{owner} takes an instance of a module, such as {example}, but got {got}")


def refuse(owner: str, given: Mapping[str, Any], instead: Mapping[str, str]) -> None:
    """Raises TypeError for arguments that only Flax's module takes; None stands for not given."""
    for name, value in given.items():
        if name not in instead:
            raise TypeError(f"{owner} got an unexpected keyword argument {name!r}")
        if value is not None:
            raise TypeError(f"{owner} does not take {name}={value!r}: {instead[name]}")


def check_one_form(owner: str, axes: Any, feature_axes: Any, variable_filter: Any) -> None:
    """Raises ValueError if both `axes` and Flax's arguments for the same thing are given."""
    if axes is not None and (feature_axes is not ... or variable_filter is not ...):
        raise ValueError(
            f"{owner}: axes says which parameters are weights, and what their feature axes are. "
            "Give axes, or feature_axes and variable_filter, but not both"
        )


def decisions_of(
    params: Any,
    axes: Any,
    feature_axes: Any,
    is_selected: Callable[[str], bool],
    find: Callable[[Any], Any],
) -> dict[str, Decision]:
    """What every parameter of a module is, by its slash path.

    Args:
      params: the plain parameters.
      axes: the argument of the module. None where `feature_axes` says it, or nothing does.
      feature_axes: the argument of the module: Flax's, or `...` where it is not given.
      is_selected: Flax's `variable_filter`, as a function of the slash path.
      find: finds the axes of `params` where neither argument says them.
    """
    if axes is not None:
        return {path: what for path, _, what in decide(params, axes)}
    features = () if feature_axes is None else feature_axes
    found = decide(params, find(params) if features is ... else lambda *_: features)
    left_out = NotWeight("variable_filter leaves it out")
    return {path: what if is_selected(path) else left_out for path, _, what in found}
