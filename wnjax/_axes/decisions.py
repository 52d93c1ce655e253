"""Which leaves are weights, and over which axes their norms run.

Every form of the `axes` argument comes down to one decision for each leaf: a
`Weight` or a `NotWeight`.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import optax
from flax import nnx

from wnjax._axes.names import Named, named
from wnjax._leaves.trees import check_not_apart, flatten, listing, unbox

FeatureAxes: TypeAlias = int | tuple[int, ...]
Axes: TypeAlias = (
    Mapping[str, FeatureAxes | None]
    | Callable[[str, Any], FeatureAxes | None]
    | Any  # a tree of Weight and NotWeight, which may be of any containers
    | None
)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A leaf that is the weight of neurons.

    Attributes:
      feature_axes: the axes along which the neurons are laid out; negative ones count
        from the end. The layer sums over all the others, the fan-in axes. `()` makes
        the whole leaf one neuron.
      stack_axes: of the feature axes, those along which separate matrices lie, if known: scanned or
        vmapped layers, experts, groups of a convolution. The others are outputs of one matrix.
      bias: the slash path of the bias added to these neurons' sums, if known.
      operation: the primitive that sums over the fan-in axes, if known; with "masked" behind it
        where the weight is multiplied by a mask, whose entries the norm counts too.

    >>> import jax.numpy as jnp
    >>> import wnjax
    >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    >>> axes = {"w": wnjax.Weight(feature_axes=-1, bias="b"), "b": wnjax.NotWeight("bias")}
    >>> wnjax.weight_norm(params, axes)["w"].g
    Array([[1.7320508, 1.7320508, 1.7320508, 1.7320508]], dtype=float32)
    """

    feature_axes: FeatureAxes
    stack_axes: tuple[int, ...] = ()
    bias: str | None = None
    operation: str | None = None


@dataclasses.dataclass(frozen=True)
class NotWeight:
    """A leaf that stays as it is.

    Attributes:
      reason: why, in one line.
      shape: the leaf's, if known.
      lines: where the user's code does what the reason says: file, line and function.
      override: the argument of `infer_axes` that makes it a neuron's weight all the same.
      is_understood: whether the reason says what the leaf is: a bias, a scale, a lookup table, or
        something else that is added. Otherwise it may be a weight that was not recognized.

    >>> import wnjax
    >>> print(wnjax.summary({"b": wnjax.NotWeight("bias")}))
    leaf  neuron
    b     no: bias
    0 of 1 leaves are weights of neurons
    """

    reason: str
    shape: tuple[int, ...] | None = None
    lines: tuple[str, ...] = ()
    override: str | None = None
    is_understood: bool = False

    def describe(self) -> str:
        """All of it in one line."""
        shape = f"shape {self.shape}" if self.shape is not None else ""
        lines = f"at {' and '.join(self.lines)}" if self.lines else ""
        return "; ".join(filter(None, (self.reason, shape, lines, self.override)))


Decision = Weight | NotWeight


# What Flax keeps beside parameters: Linen by these names, NNX in variables of these types.
_COLLECTIONS = {
    "batch_stats": nnx.BatchStat,
    "cache": nnx.Cache,
    "intermediates": nnx.Intermediate,
    "perturbations": nnx.Perturbation,
}


def beside_parameters(leaves: Sequence[tuple[str, Any]]) -> dict[int, NotWeight]:
    """The leaves that are no parameters, by their place in the order of `flatten`.

    A collection of Linen is recognized by `params` beside it: a module may have its name.
    """
    groups = {
        before
        for path, _ in leaves
        for before, name, _ in [f"/{path}".partition("/params/")]
        if name
    }
    found = {}
    for i, (path, box) in enumerate(leaves):
        for name, kind in _COLLECTIONS.items():
            before, is_named, _ = f"/{path}".partition(f"/{name}/")
            if isinstance(box, kind) or (is_named and before in groups):
                reason = f"not a parameter: in the collection {name}"
                shape = getattr(unbox(box), "shape", None)
                found[i] = NotWeight(reason, shape, is_understood=True)
    return found


def decide(
    params: Any,
    axes: Axes = None,
    *,
    is_part: bool = False,
) -> list[tuple[str, Any, Decision]]:
    """What `axes` says of every leaf of `params`, in the order of `flatten`.

    With `is_part`, patterns may speak of leaves that `params` lacks. A tree always may: one that
    was found for the whole model serves for a part of it.

    Returns:
      A list of (slash path, leaf without its box, decision).

    Raises:
      ValueError: if a pattern matches no leaf or is no regular expression, or if a tree
        of decisions lacks a leaf; if Flax's naming rules refuse a kernel; if `params` are
        the state of an NNX WeightNorm.
      TypeError: if `axes` is none of the forms.
    """
    boxes = flatten(params)[0]
    check_not_apart(boxes)
    leaves = [(path, unbox(leaf)) for path, leaf in boxes]
    paths = [path for path, _ in leaves]
    if axes is None:
        others = beside_parameters(boxes)
        parameters = [leaf for i, leaf in enumerate(leaves) if i not in others]
        by_names = iter(_by_flax_names(parameters))
        decisions = [others[i] if i in others else next(by_names) for i in range(len(leaves))]
    elif _holds_decisions(axes):
        decisions = _by_tree(axes, paths)  # before callables: an Equinox module is both
    elif callable(axes):
        decisions = [_by_callable(axes, path, leaf) for path, leaf in leaves]
    elif isinstance(axes, Mapping):
        chosen = by_patterns(axes, paths, "axes", is_part=is_part)
        decisions = [decision or NotWeight("no pattern matches") for decision in chosen]
    else:
        raise TypeError(
            "axes must be None, a dict from regular expressions to feature axes, a callable "
            f"(path, leaf) -> feature axes, or a tree of Weight and NotWeight; got {axes!r}"
        )
    return [(*leaf, decision) for leaf, decision in zip(leaves, decisions, strict=True)]


def weights_of(params: Any, axes: Axes) -> dict[int, tuple[int, ...]]:
    """The feature axes of every leaf that is a weight, by its place in the order of `flatten`.

    Of leaves that `optax.masked` or `optax.multi_transform` masks, `axes` may speak.

    Raises:
      ValueError: if no leaf is a weight, and none is masked; and as `decide` and `canonical_axes`.
    """
    is_part = is_part_of_tree(params)
    decided = list(enumerate(decide(params, axes, is_part=is_part)))
    weights = {
        i: canonical_axes(path, leaf, decision.feature_axes)
        for i, (path, leaf, decision) in decided
        if isinstance(decision, Weight)
    }
    if not weights and not is_part:
        kept = [f"{path}: {d.reason}" for _, (path, _, d) in decided if isinstance(d, NotWeight)]
        raise ValueError(f"no leaf is a weight; pass axes to choose them:{listing(kept)}")
    return weights


def is_part_of_tree(params: Any) -> bool:
    """Whether `optax.masked` or `optax.multi_transform` has left something out."""
    given = jax.tree.leaves(params, is_leaf=_is_masked)
    return not given or any(map(_is_masked, given))  # none in optax.tree_map_params


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _holds_decisions(axes: Any) -> bool:
    children = axes.values() if isinstance(axes, Mapping) else [axes]  # keys need not sort
    return any(
        isinstance(unbox(leaf), Decision) for child in children for _, leaf in flatten(child)[0]
    )


def _by_flax_names(leaves: Sequence[tuple[str, Any]]) -> list[Decision]:
    """What leaves are by Flax's naming rules: weights are those named `kernel`.

    Raises:
      ValueError: if the rules refuse a kernel.
    """
    shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves}
    kernels: dict[str, Named] = {}
    decisions: list[Decision] = []
    for path, _ in leaves:
        *modules, name = path.split("/")
        shape = shapes[path]
        if name != "kernel":
            decisions.append(NotWeight("not named kernel"))
        elif len(shape) < 2:
            decisions.append(NotWeight(f"has {len(shape)} axes, fewer than two"))
        else:
            kernels[path] = named(modules, shape, shapes.get(_beside(path)))
            decisions.append(Weight(kernels[path].feature_axes))
    _check_named(kernels, shapes)
    return decisions


def _beside(path: str) -> str:
    """The path of the bias in the module of a kernel."""
    return "/".join([*path.split("/")[:-1], "bias"])


def _check_named(kernels: Mapping[str, Named], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError for kernels that the rules refuse, and warns of those that they guess."""
    ask = (
        "Let the computation tell them: axes=wnjax.infer_axes(fn)(params, *args). Or give patterns "
        "for all weights"
    )
    refused = [
        f"{path} of shape {shapes[path]} beside a bias of shape {shapes[_beside(path)]}: "
        + " or ".join(_line(path, axes) for axes in kernel.possible or ["feature_axes"])
        for path, kernel in kernels.items()
        if kernel.is_refused
    ]
    if refused:
        raise ValueError(
            "Flax's naming rules do not tell the feature axes of these kernels: the shape of the "
            f"bias fits no layer that they know, or several. {ask}, with such a line for each of "
            f"these:{listing(refused)}"
        )
    guessed = [
        f"{path} of shape {shapes[path]}: {_line(path, kernel.feature_axes)}"
        for path, kernel in kernels.items()
        if kernel.is_guess
    ]
    if guessed:
        warnings.warn(
            "Flax's naming rules guess the feature axes of these kernels. Neither a name nor a "
            "bias tells whether a kernel is a stack of layers, as under nn.scan or nn.vmap, or has "
            f"the outputs before the inputs, as with transpose_kernel=True. {ask}. The guess "
            f"is:{listing(guessed)}",
            stacklevel=5,
        )


def _line(path: str, axes: Any) -> str:
    return f"axes={{{re.escape(path)!r}: {axes}, ...}}"


def _by_callable(axes: Callable[[str, Any], Any], path: str, leaf: Any) -> Decision:
    feature_axes = axes(path, leaf)
    if feature_axes is None:
        return NotWeight("the axes function returned None")
    return Weight(feature_axes)


def by_patterns(
    patterns: Mapping[str, Any], paths: Sequence[str], argument: str, *, is_part: bool = False
) -> list[Decision | None]:
    """What the first pattern that matches a path says of it; None where none does."""
    firsts = first_patterns(patterns, paths, argument, is_part=is_part)
    return [_by_pattern(patterns, first) for first in firsts]


def first_patterns(
    patterns: Mapping[str, Any],
    paths: Sequence[str],
    argument: str,
    *,
    is_part: bool = False,
    what: tuple[str, str] = ("leaf", "slash path"),
) -> list[str | None]:
    """The first pattern that matches each path; None where none does.

    `what` says in messages what is matched, and what of it.

    Raises:
      ValueError: if a pattern matches no path, never applies or is no regular expression.
    """
    compiled = {pattern: _compile(pattern, argument) for pattern in patterns}
    matches = {
        path: [pattern for pattern, regex in compiled.items() if regex.fullmatch(path)]
        for path in paths
    }
    for pattern in () if is_part else compiled:
        if not any(pattern in matching for matching in matches.values()):
            raise ValueError(
                f"{argument}: the pattern {pattern!r} matches no {what[0]} (it must match the "
                f"whole {what[1]}). Near {what[1].split()[-1]}s:{listing(_nearest(pattern, paths))}"
            )
        is_first = any(matching[:1] == [pattern] for matching in matches.values())
        if not is_first and patterns[pattern] is not None:
            raise ValueError(
                f"{argument}: the pattern {pattern!r} never applies, since the first match wins "
                "and patterns before it match all its leaves. Put it before them"
            )
    return [next(iter(matches[path]), None) for path in paths]


def _by_pattern(patterns: Mapping[str, Any], pattern: str | None) -> Decision | None:
    if pattern is None:
        return None
    if patterns[pattern] is None:
        return NotWeight(f"the pattern {pattern!r} says None")
    return Weight(patterns[pattern])


def _compile(pattern: Any, argument: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise ValueError(
            f"{argument}: {pattern!r} is not a regular expression: give it as a string"
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}") from error


def _nearest(pattern: str, paths: Iterable[str]) -> list[str]:
    words = re.sub(r"[^\w/]", "", pattern)
    return difflib.get_close_matches(words, paths, n=5, cutoff=0.0)


def _by_tree(axes: Any, paths: list[str]) -> list[Decision]:
    decisions = {path: unbox(leaf) for path, leaf in flatten(axes)[0]}
    if missing := [path for path in paths if path not in decisions]:
        raise ValueError(f"axes: the tree says nothing of these leaves:{listing(missing)}")
    for path, decision in decisions.items():
        if not isinstance(decision, Decision):
            raise TypeError(f"axes: {path} must be a Weight or a NotWeight, got {decision!r}")
    return [decisions[path] for path in paths]


def canonical_axes(path: str, leaf: Any, feature_axes: Any) -> tuple[int, ...]:
    """`feature_axes` of a leaf as sorted non-negative integers.

    Raises:
      ValueError: if an axis is out of range or named twice, or if no fan-in axis is left.
      TypeError: if an axis is no integer.
    """
    where = f"{path or 'the leaf'} of shape {leaf.shape}"
    try:
        axes = [_as_int(axis) for axis in _as_tuple(feature_axes)]
    except TypeError:
        raise TypeError(
            f"{where}: feature axes must be an int or a tuple of ints, got {feature_axes!r}"
        ) from None
    for axis in axes:
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(f"{where}: feature axis {axis} is out of range for {leaf.ndim} axes")
    positive = sorted({axis % leaf.ndim for axis in axes})
    if len(positive) < len(axes):
        raise ValueError(f"{where}: feature axes {feature_axes!r} name an axis twice")
    if len(positive) == leaf.ndim:
        raise ValueError(
            f"{where}: feature axes {feature_axes!r} leave no fan-in axis to take a norm over. "
            "Leave out the axes that the layer sums over, or give None to keep this leaf plain"
        )
    return tuple(positive)


def _as_tuple(feature_axes: Any) -> tuple[Any, ...]:
    return tuple(feature_axes) if isinstance(feature_axes, tuple | list) else (feature_axes,)


def _as_int(axis: Any) -> int:
    if isinstance(axis, bool):
        raise TypeError("a bool is no axis")
    return operator.index(axis)
