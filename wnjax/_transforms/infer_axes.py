"""`infer_axes`: what every leaf of the parameters is, read off the computation."""

from __future__ import annotations

import collections
import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from wnjax._analysis.functions import Analysis, Analyzer
from wnjax._analysis.jaxprs import JaxprAnalyzer
from wnjax._analysis.lines import is_transposed
from wnjax._analysis.views import Note, Site, Use
from wnjax._axes.decisions import (
    Decision,
    FeatureAxes,
    NotWeight,
    Weight,
    beside_parameters,
    by_patterns,
    canonical_axes,
)
from wnjax._leaves.trees import flatten, is_array, listing, outer_box, rebox
from wnjax._transforms.arguments import params_of_call

# Of several things that happen to a leaf, the one that says best what it is.
_TELLING = ("lookup table", "bias", "product of two parameters", "scale", "added")
_UNDERSTOOD = ("lookup table", "bias", "scale", "added")


def infer_axes(
    fn: Callable[..., Any],
    *,
    overrides: Mapping[str, FeatureAxes | None] | None = None,
    strict: bool = False,
) -> Callable[..., Any]:
    """Makes a function that tells what every leaf of the parameters of `fn` is.

    It takes the arguments of `fn`, and traces `fn(params, *args, **kwargs)`. A weight of neurons is
    what a matrix product or a convolution sums over some axes of; these are its fan-in axes, all
    others its feature axes. They are read off the computation, through reshapes, transposes, casts,
    scans and the like, so that they are right for any layer: attention heads, scanned and vmapped
    stacks, experts, einsum, transposed convolutions, tied embeddings. What is not understood is
    not guessed, but reported. Nothing is computed: tracing needs shapes and dtypes alone.

    `params` may be the whole variables of a Linen module, or the state of an NNX one. Leaves in the
    collections `batch_stats`, `cache`, `intermediates` and `perturbations`, and the variables of
    these kinds, are no parameters, and are taken for data.

    One call of `einsum` or `multi_dot` is one sum, whatever the order of its products: in a
    bilinear layer, `einsum("bi,bj,ijo->bo", x, y, w)`, w has the fan-in axes 0 and 1. An array
    that `fn` closes over may be data, or a constant such as a basis. Where what follows does not
    tell, the weight is refused: pass data as arguments.

    A weight that is multiplied by a mask, a constant array that varies along the fan-in axes, has a
    norm that counts the masked entries too. A warning names it. Multiply such a weight by its
    mask once, before `weight_norm`, and leave the mask in `fn`: masked entries then stay 0.

    Args:
      fn: the forward function, of plain weights, such as
        `lambda params, x: model.apply({"params": params}, x)`. Not a gradient or train step.
      overrides: from regular expressions, matched against the whole slash path, to feature
        axes, or to None for "not this one"; the first match wins, over what was traced.
      strict: whether to refuse a tree with a leaf of two or more axes that was not understood, and
        of which no override speaks. Biases, scales and lookup tables are understood.

    Returns:
      A function of the arguments of `fn`. `params`, the first, is any pytree of arrays, or of their
      `jax.ShapeDtypeStruct`s, with or without Flax boxes; with (g, v) leaves, `fn` gets their
      weights. The others are arrays or `jax.ShapeDtypeStruct`s, with a batch of two or more where
      there is one; anything else, such as `train=True`, is static. It returns a tree shaped like
      `params` with a `Weight` or a `NotWeight` for every leaf. `weight_norm` takes the tree as
      `axes`, and `summary` prints it.

    Raises:
      ValueError: when that is called: if `fn` returns gradients or new parameters, if it needs
        values of the data, if it uses axis names that nothing binds, if an override matches no leaf
        or does not fit it, if `params` hold the state of an optimizer, or if `strict` and leaves
        were refused; the message lists all of them.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> import wnjax
    >>> model = nn.MultiHeadDotProductAttention(num_heads=2)
    >>> x = jnp.ones((2, 3, 8))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> axes = wnjax.infer_axes(lambda p, x: model.apply({"params": p}, x))(params, x)
    >>> axes["query"]["kernel"]  # (8, 2, 4): inputs, heads, features of a head
    Weight(feature_axes=(1, 2), stack_axes=(), bias='query/bias', operation='dot_general')
    >>> axes["out"]["kernel"].feature_axes  # (2, 4, 8): heads, features of a head, outputs
    (2,)
    >>> axes["out"]["bias"].reason
    'bias of out/kernel'
    """
    analyze = Analyzer(fn)

    def inferred(*args: Any, **kwargs: Any) -> Any:
        params, args, kwargs = params_of_call(fn, args, kwargs)
        leaves, treedef = flatten(params)
        analysis = analyze(params, *args, **kwargs)
        _refuse_gradients(analysis)
        paths, arrays = analysis.paths, analysis.arrays
        traced = decide_all(analysis)
        decisions = _overridden(traced, overrides, paths, arrays)
        kept = (i for i, decision in enumerate(decisions) if decision is traced[i])
        _warn_of_masks(analysis, [i for i in kept if isinstance(decisions[i], Weight)])
        if strict:
            _refuse_refusals(decisions, paths)
        return treedef.unflatten(
            rebox(outer_box(box), decision)
            for (_, box), decision in zip(leaves, decisions, strict=True)
        )

    return inferred


def decide_all(analysis: Analysis) -> list[Decision]:
    """What every leaf is."""
    decisions = _Verdicts(analysis.records, analysis.paths, analysis.arrays).decisions()
    others = beside_parameters(flatten(analysis.plain)[0])
    return [others.get(i, decision) for i, decision in enumerate(decisions)]


def _warn_of_masks(analysis: Analysis, leaves: Sequence[int]) -> None:
    """Warns of weights whose norm counts more than the neuron sums over, of some leaves."""
    lines = {use.leaf: use.site.line for use in analysis.records.uses if use.is_masked}
    if masked := [f"{analysis.paths[leaf]}: at {lines[leaf]}" for leaf in leaves if leaf in lines]:
        warnings.warn(
            "infer_axes: a constant array that varies along their fan-in axes, such as a mask, "
            "multiplies these weights, and their norms count the masked entries too. Multiply the "
            "weights by the mask once, before weight_norm, and leave it in fn: masked entries then "
            "stay 0. Once that is done, name the leaves in overrides, with their feature axes:"
            + listing(masked),
            stacklevel=3,
        )


class _Verdicts:
    """What the analysis' records mean for every leaf."""

    def __init__(self, records: JaxprAnalyzer, paths: Sequence[str], arrays: Sequence[Any]):
        self.paths, self.arrays = paths, arrays
        self.uses: dict[int, list[Use]] = collections.defaultdict(list)
        self.notes: dict[int, list[Note]] = collections.defaultdict(list)
        for use in records.uses:
            self.uses[use.leaf].append(use)
        for leaf, uses in self.uses.items():  # a derivative inside of fn uses a weight again
            forward = [use for use in uses if not use.site.is_backward]
            self.uses[leaf] = forward or uses
        for note in records.notes:
            self.notes[note.leaf].append(note)
        self.biases: dict[int, set[int]] = collections.defaultdict(set)
        self.weights: dict[int, set[int]] = collections.defaultdict(set)
        for record in records.biases:
            self.biases[record.weight].add(record.bias)
            self.weights[record.bias].add(record.weight)

    def decisions(self) -> list[Decision]:
        """One for every leaf."""
        return [self._decide(leaf) for leaf in range(len(self.paths))]

    def _decide(self, leaf: int) -> Decision:
        uses, array = self.uses[leaf], self.arrays[leaf]
        if not is_array(array):
            return NotWeight("not an array")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return self._refuse(leaf, f"not floating-point but {array.dtype}", [])
        if not uses:
            return self._without_uses(leaf)
        if refused := [use for use in uses if use.refusal is not None]:
            features = self._features(refused[0])
            return self._refuse(leaf, str(refused[0].refusal), [refused[0].site], features)
        roles: dict[tuple[int, ...], Use] = {}
        for use in uses:
            roles.setdefault(self._features(use), use)
        if len(roles) > 1:
            (a, first), (b, second), *_ = roles.items()
            reason = f"used in two roles, with feature axes {a} and {b}"
            return self._refuse(leaf, reason, [first.site, second.site], a)
        stack = tuple(sorted(frozenset[int]().union(*(use.stack for use in uses))))
        bias = self._only_bias(leaf)
        operations = dict.fromkeys(use.site.operation for use in uses)
        mask = ["masked"] if any(use.is_masked for use in uses) else []
        return Weight(next(iter(roles)), stack, bias, ", ".join([*operations, *mask]))

    def _features(self, use: Use) -> tuple[int, ...]:
        return tuple(sorted(use.features - use.fan_in))

    def _only_bias(self, leaf: int) -> str | None:
        biases = [bias for bias in self.biases[leaf] if len(self.weights[bias]) == 1]
        return self.paths[biases[0]] if len(self.biases[leaf]) == len(biases) == 1 else None

    def _without_uses(self, leaf: int) -> NotWeight:
        notes = self.notes[leaf]
        if not notes:
            return self._refuse(leaf, "unused by the output", [])

        def rank(note: Note) -> int:
            hits = [i for i, kind in enumerate(_TELLING) if note.kind.startswith(kind)]
            return hits[0] if hits else len(_TELLING)

        note = min(notes, key=rank)
        reason = note.kind
        if reason == "bias":
            weights = sorted(self.paths[weight] for weight in self.weights[leaf])
            what = "bias of" if len(weights) == 1 else "added to the sums of"
            reason = f"{what} {', '.join(weights)}"
        refusal = self._refuse(leaf, reason, [note.site])
        return dataclasses.replace(refusal, is_understood=note.kind.startswith(_UNDERSTOOD))

    def _refuse(
        self, leaf: int, reason: str, sites: list[Site], features: tuple[int, ...] | None = None
    ) -> NotWeight:
        shape = tuple(self.arrays[leaf].shape)
        override = None
        if len(shape) > 1:
            axes = features if features and len(features) < len(shape) else "feature_axes"
            override = f"overrides={{{re.escape(self.paths[leaf])!r}: {axes}}}"
        lines = tuple(dict.fromkeys(site.line for site in sites))
        return NotWeight(reason, shape, lines, override)


def _overridden(
    decisions: Sequence[Decision],
    overrides: Mapping[str, FeatureAxes | None] | None,
    paths: Sequence[str],
    arrays: Sequence[Any],
) -> list[Decision]:
    if not overrides:
        return list(decisions)
    result = []
    chosen = by_patterns(overrides, paths, "overrides")
    for path, array, traced, override in zip(paths, arrays, decisions, chosen, strict=True):
        if override is None:
            result.append(traced)
        elif isinstance(override, Weight):
            features = canonical_axes(path, array, override.feature_axes)
            known = traced if isinstance(traced, Weight) else Weight(features)
            stack = tuple(axis for axis in known.stack_axes if axis in features)
            result.append(dataclasses.replace(known, feature_axes=features, stack_axes=stack))
        else:
            result.append(override)
    return result


def _refuse_refusals(decisions: Sequence[Decision], paths: Sequence[str]) -> None:
    refused = [
        f"{path}: {decision.describe()}"
        for path, decision in zip(paths, decisions, strict=True)
        if isinstance(decision, NotWeight) and decision.override and not decision.is_understood
    ]
    if refused:
        raise ValueError(
            f"strict: {len(refused)} leaves with two or more axes were not understood. Give their "
            "feature axes, or None to keep them plain, by overrides:"
            + listing(refused, most=len(refused))
        )


def _refuse_gradients(analysis: Analysis) -> None:
    """Refuses functions that differentiate, and return something shaped like the parameters."""
    traced = analysis.traced
    structure: Any = jax.tree.structure(analysis.plain)
    if jax.tree_util.treedef_is_leaf(structure) or not _differentiates(traced.jaxpr):
        return

    def is_like_params(x: Any) -> bool:
        return bool(jax.tree.structure(x) == structure)

    output = traced.rebuild(traced.jaxpr.outvars)
    if any(map(is_like_params, jax.tree.leaves(output, is_leaf=is_like_params))):
        raise ValueError(
            "fn returns gradients or new parameters: it is a gradient or a train step. Pass the "
            'forward function instead, such as lambda params, x: model.apply({"params": params}, x)'
        )


def _differentiates(jaxpr: Any) -> bool:
    return any(is_transposed(eqn.source_info) for eqn in jaxpr.eqns) or any(
        map(_differentiates, core.subjaxprs(jaxpr))
    )
