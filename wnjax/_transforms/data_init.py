"""`data_init`: gains and biases from a minibatch, so that every neuron starts out standardized."""

from __future__ import annotations

import collections
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, overload

import jax
import jax.core
import jax.numpy as jnp

from wnjax._analysis.functions import Analysis, Analyzer
from wnjax._analysis.sizes import is_less
from wnjax._analysis.views import Use
from wnjax._axes.axis_name import check_split
from wnjax._axes.decisions import NotWeight, first_patterns
from wnjax._leaves.gv import (
    GVLeaf,
    LogWeightNorm,
    WeightNorm,
    gain,
    gain_axes,
    root,
    scale,
    squared_norm_of,
    weight,
)
from wnjax._leaves.trees import (
    check_not_apart,
    flatten,
    fold_leaf,
    listing,
    outer_box,
    rebox,
    unbox,
    unbox_gv,
)
from wnjax._transforms.arguments import params_of_call
from wnjax._transforms.infer_axes import decide_all
from wnjax._transforms.moments import AxisName, Minibatch
from wnjax._transforms.report import Initialized, known_count
from wnjax._transforms.standardize import Found, Standardization
from wnjax._transforms.weight_norm import split

T = TypeVar("T", bound=Any)  # not object, which pyright takes the params of a lambda for
P = ParamSpec("P")

FEW_SAMPLES = 100  # with fewer, moments of one minibatch say little of the next one's


@overload
def data_init(
    fn: Callable[Concatenate[T, P], Any],
    *,
    std: float | Mapping[str, float] = 1.0,
    mask: Any = None,
    axis_name: AxisName = None,
    report: Literal[False] = False,
) -> Callable[Concatenate[T, P], T]: ...
@overload
def data_init(
    fn: Callable[Concatenate[T, P], Any],
    *,
    std: float | Mapping[str, float] = 1.0,
    mask: Any = None,
    axis_name: AxisName = None,
    report: Literal[True],
) -> Callable[Concatenate[T, P], tuple[T, Any]]: ...
@overload
def data_init(
    fn: Callable[..., Any],
    *,
    std: float | Mapping[str, float] = 1.0,
    mask: Any = None,
    axis_name: AxisName = None,
    report: bool = False,
) -> Callable[..., Any]: ...
def data_init(
    fn: Callable[..., Any],
    *,
    std: float | Mapping[str, float] = 1.0,
    mask: Any = None,
    axis_name: AxisName = None,
    report: bool = False,
) -> Callable[..., Any]:
    """Makes a function that standardizes the pre-activations of `fn` on one minibatch.

    It takes the arguments of `fn`, the minibatch among them, and sets gains and biases.

    For every neuron, in the order of computation, with moments over all examples and positions:

        t = v·x/‖v‖,   g ← 1/σ[t],   b ← −μ[t]/σ[t]

    so that w·x + b = (t − μ[t])/σ[t] has mean 0 and standard deviation 1, and it is this that goes
    on to the next layer. Without a bias the mean stays. A bias that is added later than the
    sum is set to minus the mean that arrives there. A neuron that is constant on the minibatch, to
    rounding, keeps its gain, and gets its bias. A neuron whose mean or standard deviation is not
    finite keeps both. The report counts these neurons, and outside `jit` a warning names their
    weights. Moments are float32 or wider, for float16 models too. Directions v are not changed.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equations 5 and 6.

    Weights that the steps of a loop share (recurrent ones), that are used several times, or in a
    branch alone, are left alone; a warning and the report say why. Layers under `nn.scan` that have
    weights of their own are initialized each.

    It works inside `jit`, with weights sharded in any way; there, the moments of a sharded batch
    are those of all of it. Inside `shard_map`, keep the fan-in axes whole: `axis_name` is
    that of the batch here, and the sum that a row-parallel layer takes over devices comes after
    the moments. (Initialize such a network under `jit`, before.) Give dropout the
    key, and batch norm the mode, that training begins with: moments are of what `fn` computes.

    Args:
      fn: the forward function or the loss, of plain weights, as for `infer_axes`.
      std: what standard deviation to arrive at; or a dict to it from regular expressions, matched
        against the slash paths of weights, and 1 where none matches. With 1/√n for the last layers
        of n residual branches, or 0, the sum of the branches does not grow with n.
      mask: booleans for what counts, which padding does not: an array with the leading axes that
        the outputs of all layers share, (examples,) or (examples, positions).
      axis_name: under `pmap`, `shard_map` or `vmap`, the axis over which the minibatch is split, so
        that all devices get the moments of the whole.
      report: whether to return what was done, too.

    Returns:
      A function of the arguments of `fn`. `params`, the first, is plain, and all weights that
      `infer_axes` finds are initialized; or it is a tree with (g, v) leaves, and the (g, v) leaves
      are. The minibatch has 100 examples or more. The function returns `params` with other gains
      and biases: the same structure, shapes and dtypes. With `report` it returns a pair: that, and
      a tree with an `Initialized` for every leaf, which `summary` prints.

    Raises:
      ValueError: when that is called: if there is nothing to initialize; if a pattern matches no
        leaf; if a mask does not fit an output; if a standard deviation is negative; and as
        `infer_axes`.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> import wnjax
    >>> model, x = nn.Dense(4), jax.random.normal(jax.random.key(0), (500, 3))
    >>> def fn(params, x):
    ...     return model.apply({"params": params}, 3 * x + 1)
    >>> params = model.init(jax.random.key(1), x)["params"]
    >>> params, report = wnjax.data_init(fn, report=True)(params, x)
    >>> print(wnjax.summary(report))
    leaf    data_init
    bias    bias of kernel
    kernel  initialized with bias, 500 samples a neuron
    1 of 2 leaves are initialized weights
    >>> y = fn(params, x)
    >>> bool((abs(y.mean(0)) < 1e-5).all() and (abs(y.std(0) - 1) < 1e-5).all())
    True
    """
    analyze = Analyzer(fn)

    def initialized(*args: Any, **kwargs: Any) -> Any:
        params, args, kwargs = params_of_call(fn, args, kwargs)
        analysis = analyze(params, *args, **kwargs)
        given, treedef = flatten(params)
        check_not_apart(given)
        plan = _Plan(analysis, [unbox_gv(leaf) for _, leaf in given], std)
        gv_leaves = {i: plan.gv(i, *given[i]) for i in plan.stds}
        computed = {i: plan.in_range(i, gv) for i, gv in gv_leaves.items()}
        values = treedef.unflatten(
            rebox(outer_box(leaf), computed[i].v) if i in computed else fold_leaf(path, leaf)
            for i, (path, leaf) in enumerate(given)
        )
        minibatch = Minibatch(None if mask is None else jnp.asarray(mask), axis_name)
        standardization = Standardization(analysis, plan.stds, plan.biases, minibatch)
        inputs = analysis.inputs(values, *args, **kwargs)
        found = standardization.found(inputs, {i: scale(gv) for i, gv in computed.items()})
        plan.warn(standardization.samples)
        plan.warn_of_kept(found)
        result = treedef.unflatten(
            leaf
            if i not in found
            else _with_gains(leaf, gv_leaves[i], _gains(computed[i], found[i]))
            if i in gv_leaves
            else _with_bias(leaf, found[i])
            for i, (_, leaf) in enumerate(given)
        )
        if not report:
            return result
        return result, treedef.unflatten(
            plan.report(i, found, standardization.samples) for i in range(len(given))
        )

    return initialized


class _Plan:
    """What to initialize, and why the rest is left alone.

    Attributes:
      stds: by leaf: the standard deviations to arrive at.
      biases: from the leaves of weights to those of their biases.
      reasons: by leaf: why it is skipped.
    """

    def __init__(
        self,
        analysis: Analysis,
        gv_leaves: Sequence[GVLeaf | None],
        std: float | Mapping[str, float],
    ):
        """Takes the (g, v) leaves among the leaves.

        Raises:
          ValueError: if nothing is left, or a standard deviation is negative.
        """
        self.paths, self.gv_leaves = analysis.paths, gv_leaves
        self.decisions = decide_all(analysis)
        self.uses, self.notes = collections.defaultdict(list), collections.defaultdict(list)
        for use in analysis.records.uses:
            self.uses[use.leaf].append(use)
        for note in analysis.records.notes:
            self.notes[note.leaf].append(note)
        self.in_reach = {record.bias for record in analysis.records.biases if record.is_in_reach}
        self.shapes = analysis.records.shapes
        found = {leaf: self._obstacle(leaf) for leaf in range(len(gv_leaves))}
        self.reasons = {leaf: reason for leaf, reason in found.items() if reason is not None}
        stds = _stds(std, self.paths)
        self.stds = {leaf: stds[leaf] for leaf in found if leaf not in self.reasons}
        if not self.stds:
            reasons = [f"{self.paths[leaf]}: {reason}" for leaf, reason in self.reasons.items()]
            raise ValueError(f"data_init: there is nothing to initialize:{listing(reasons)}")
        pairs = {leaf: self._bias(leaf) for leaf in self.stds}
        self.biases = {leaf: bias for leaf, bias in pairs.items() if bias is not None}

    def _obstacle(self, leaf: int) -> str | None:
        """Why a leaf cannot be initialized; None if it can."""
        decision, uses, gv = self.decisions[leaf], self.uses[leaf], self.gv_leaves[leaf]
        if isinstance(decision, NotWeight):
            return decision.reason
        if gv is None and any(self.gv_leaves):
            return "not normalized"
        if len(uses) > 1:
            return f"used {len(uses)} times"
        if self.notes[leaf]:
            return f"used otherwise, too: {self.notes[leaf][0].kind}"
        return self._obstacle_at(uses[0], gv)

    def _obstacle_at(self, use: Use, gv: GVLeaf | None) -> str | None:
        """Why a leaf cannot be initialized at its only use."""
        shape, gains = self.shapes[use.leaf], use.features if gv is None else gain_axes(gv)
        scanned = {axis for axis, _ in use.scanned}
        shared, long = use.fan_in & gains, {axis for axis in scanned if shape[axis] > 1}
        reasons = {
            "shared by the steps of a loop": use.site.trips
            != math.prod(shape[axis] for axis in scanned),
            "used in a branch alone": not use.site.is_certain,
            "used inside a loop or derivatives that are not seen through": not use.site.is_direct,
            "it has no elements": 0 in shape,
            "its output has no elements: the minibatch has no examples": use.output_size == 0,
            "no operation computes its neurons alone": not use.is_scalable,
            f"its norm does not run over axes {(*sorted(shared),)}, which are summed": shared,
            "its layers share a gain": long - gains,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _bias(self, leaf: int) -> int | None:
        """The bias of a weight, if it is one and nothing else."""
        decision = self.decisions[leaf]
        if isinstance(decision, NotWeight) or decision.bias is None:
            return None
        bias = self.paths.index(decision.bias)
        is_alone = len(self.notes[bias]) == 1 and not self.uses[bias]
        is_alone = is_alone and bias in self.in_reach
        return bias if is_alone and self.gv_leaves[bias] is None else None

    def gv(self, leaf: int, path: str, given: Any) -> GVLeaf:
        """The (g, v) leaf of a weight; of a plain one as `weight_norm` makes it."""
        gv = self.gv_leaves[leaf]
        if gv is not None:
            check_split(path, None, gv.v, gv[0])
            return type(gv)(*map(jnp.asarray, gv))
        return split(path, jnp.asarray(unbox(given)), tuple(self.uses[leaf][0].features))

    def in_range(self, leaf: int, gv: GVLeaf) -> GVLeaf:
        """The (g, v) leaf with which to compute: of length 1 where float16 may not hold v·x."""
        if not self.uses[leaf][0].is_narrow:
            return gv
        unit = weight(WeightNorm(jnp.ones_like(gain(gv)), gv.v))
        return WeightNorm(gain(gv), unit)

    def warn(self, samples: Mapping[int, int]) -> None:
        """Of weights that were left alone, and of moments that mean little."""
        alone = [leaf for leaf in self.reasons if self._is_wanted(leaf)]
        if alone:
            lines = listing(f"{self.paths[leaf]}: {self.reasons[leaf]}" for leaf in alone)
            warnings.warn(f"data_init leaves these weights alone:{lines}", stacklevel=3)
        few = [leaf for leaf in self.stds if is_less(samples.get(leaf, FEW_SAMPLES), FEW_SAMPLES)]
        if few:
            lines = listing(f"{self.paths[leaf]}: {samples[leaf]}" for leaf in few)
            warnings.warn(
                f"data_init: fewer than {FEW_SAMPLES} samples stand behind each moment, and those "
                f"of another minibatch will be far off. Give it more examples:{lines}",
                stacklevel=3,
            )

    def warn_of_kept(self, found: Mapping[int, Found]) -> None:
        """Of neurons of which the minibatch says nothing, where their numbers are known."""
        causes = {
            "the mean or the standard deviation of these neurons is not finite, so that they keep "
            "their gains and biases. Look for NaN and infinite values in the minibatch": {
                leaf: ~one.is_finite for leaf, one in found.items()
            },
            "these neurons are constant on the minibatch, so that they keep their gains. Look "
            "for a layer before them that passes nothing on": {
                leaf: one.is_constant for leaf, one in found.items()
            },
        }
        for cause, masks in causes.items():
            counts = {leaf: known_count(mask.sum()) for leaf, mask in masks.items()}
            lines = [
                f"{self.paths[leaf]}: {count:,} of {masks[leaf].size:,}"
                for leaf, count in counts.items()
                if count
            ]
            if lines:
                warnings.warn(f"data_init: {cause}:{listing(lines)}", stacklevel=3)

    def _is_wanted(self, leaf: int) -> bool:
        """Whether a leaf is one to initialize, if that can be done."""
        if any(self.gv_leaves):
            return self.gv_leaves[leaf] is not None
        return not isinstance(self.decisions[leaf], NotWeight)

    def report(
        self, leaf: int, found: Mapping[int, Found], samples: Mapping[int, int]
    ) -> Initialized:
        """What was done to a leaf."""
        weights = {bias: weight for weight, bias in self.biases.items()}
        if leaf in self.stds and leaf in found:
            has_bias = self.biases.get(leaf) in found
            action = "initialized" if has_bias else "scale only"
            detail = self.paths[self.biases[leaf]] if has_bias else ""
        elif leaf in found:
            action, detail = "bias", self.paths[weights[leaf]]
        else:
            return Initialized("skipped", self.reasons.get(leaf, "never computed"))
        constant, not_finite = found[leaf].is_constant.sum(), (~found[leaf].is_finite).sum()
        return Initialized(action, detail, samples[leaf], constant, not_finite)


def _stds(std: float | Mapping[str, float], paths: Sequence[str]) -> list[float]:
    """The standard deviation of every leaf."""
    given = std if isinstance(std, Mapping) else {}
    stds: list[float] = [
        float(std if not isinstance(std, Mapping) else 1 if pattern is None else std[pattern])
        for pattern in first_patterns(given, paths, "std")
    ]
    for path, one in zip(paths, stds, strict=True):
        if not one >= 0:
            raise ValueError(f"std: must be 0 or positive, got {one!r} for {path}")
    return stds


def _gains(gv: GVLeaf, found: Found) -> jax.Array:
    """The gains of a weight after the initialization, given the (g, v) leaf that computed it."""
    return jnp.where(found.is_kept, gain(gv), found.value * root(squared_norm_of(gv)))


def _with_gains(leaf: Any, gv: GVLeaf, gains: jax.Array) -> Any:
    """A weight, plain or a (g, v) leaf, with other gains."""
    given = unbox_gv(leaf)
    if given is None:
        return rebox(leaf, weight(WeightNorm(gains, gv.v)))
    if isinstance(given, LogWeightNorm):
        gains = jnp.log(jnp.maximum(gains, jnp.finfo(gains.dtype).tiny))
    boxed = unbox(leaf)
    gains = gains.astype(jnp.result_type(given[0]))
    return rebox(leaf, type(given)(rebox(boxed[0], gains), boxed.v))


def _with_bias(leaf: Any, found: Found) -> Any:
    bias = unbox(leaf)
    return rebox(leaf, jnp.where(found.is_kept, bias, found.value.astype(bias.dtype)))
