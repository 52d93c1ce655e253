"""`wrap`: a function for normalized parameters, which builds w only where that is cheaper."""

from __future__ import annotations

import collections
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Set
from typing import Any, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp

from wnjax._analysis.functions import Analysis, Analyzer
from wnjax._analysis.layout import Layout
from wnjax._analysis.rules import is_narrow
from wnjax._analysis.sizes import is_at_most
from wnjax._analysis.views import Use
from wnjax._axes.axis_name import AxisName, split_over
from wnjax._leaves.gv import GVLeaf, gain_axes, scale, weight
from wnjax._leaves.trees import (
    flatten,
    is_array,
    is_normalized,
    outer_box,
    rebox,
    unbox,
    unbox_gv,
)
from wnjax._rewriting.rewrite import Edit, Key, Rewritten, rewrite
from wnjax._rewriting.scaling import lay_out, times
from wnjax._rewriting.xla import as_contraction, in_order
from wnjax._transforms.arguments import params_of_call
from wnjax._transforms.weight_norm import warn_of_rounded_gains

P = ParamSpec("P")
R = TypeVar("R")

# Traced once for all leaves of a shape, and one equation for each leaf.
_scale = jax.jit(scale, static_argnames="mesh_axes")
_weight = jax.jit(weight, static_argnames="mesh_axes")


@overload
def wrap(fn: Callable[P, R], *, axis_name: AxisName = None) -> Callable[P, R]: ...
@overload  # for mypy, which cannot infer the lambda in jax.jit(wrap(lambda params, x: ...))
def wrap(  # type: ignore[overload-cannot-match]
    fn: Callable[..., R], *, axis_name: AxisName = None
) -> Callable[..., R]: ...
def wrap(fn: Callable[..., Any], *, axis_name: AxisName = None) -> Callable[..., Any]:
    """Returns `fn` for normalized parameters.

    The result is that of `fn(fold(params), ...)`, to rounding, and so are its derivatives of any
    order, but it costs less. Where the output of a layer is no larger than its weight, w is never
    built. The scale g/‖v‖ multiplies the output instead:

        w·x = (g/‖v‖)·(v·x)

    Sizes alone decide; under `vmap` those of one example. A size that `jax.export` leaves open
    counts as large. `fn` is traced once for all arguments of the same shapes, and every operation
    of it stays as it is, but for the multiplications. Call the result inside `jit`, as one does
    with a loss. Where a weight is used in a way that tracing does not understand, or in float16,
    whose range v·x may leave, `fn` gets the folded weight. In wider dtypes v·x leaves the range
    only for ‖v‖ beyond what `fold` takes for finite. Inside `shard_map`, where fan-in axes may be
    split, what `fold` says of derivatives holds.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Args:
      fn: the forward function, or a loss: `fn(params, *args, **kwargs)`. `params` is any pytree of
        plain weights. `fn` is pure, as for `jit`.
      axis_name: over which mesh axes the fan-in axes are split, as for `weight_norm`. Sums over
        them, as in y = psum(x @ w), remain those of `fn`.

    Returns:
      A function of the arguments of `fn`. Any leaf of `params` may be a (g, v) leaf. A tree without
      (g, v) leaves goes to `fn` as it is, and a warning says so once: call `fn` itself on folded
      parameters.

    Raises:
      ValueError: when called: if `fn` needs values of the data, or uses axis names that
        nothing binds; if the shapes of a (g, v) leaf's g and v do not fit each other; and as
        `fold`.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> import wnjax
    >>> model, x = nn.Dense(4), jnp.ones((2, 3))
    >>> def fn(params, x):
    ...     return model.apply({"params": params}, x)
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> normalized = wnjax.weight_norm(params, axes=wnjax.infer_axes(fn)(params, x))
    >>> y = jax.jit(wnjax.wrap(fn))(normalized, x)
    >>> bool(jnp.allclose(y, fn(params, x), rtol=1e-6))
    True
    """
    analyze = Analyzer(fn)
    warn_once = functools.cache(_warn_of_plain)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        params, args, kwargs = params_of_call(fn, args, kwargs)
        boxes, treedef = flatten(params)
        gv_leaves = {i: gv for i, (_, box) in enumerate(boxes) if (gv := unbox_gv(box))}
        if not gv_leaves:
            if _may_hold_weights(params) and not is_normalized(params):
                warn_once()
            return fn(params, *args, **kwargs)
        paths = [path for path, _ in boxes]
        warn_of_rounded_gains(paths, gv_leaves)
        mesh_axes = split_over(axis_name, paths, gv_leaves)
        analysis = analyze(params, *args, **kwargs)
        leaves = _scaled_behind(analysis, gv_leaves)
        values = treedef.unflatten(
            _value(box, gv_leaves[i], i in leaves, mesh_axes[i])
            if i in gv_leaves
            else rebox(box, unbox(box))
            for i, (_, box) in enumerate(boxes)
        )
        scales = {Key("scale", leaf): _scale(gv_leaves[leaf], mesh_axes[leaf]) for leaf in leaves}
        program = _program(analysis, leaves, {key: jax.typeof(x) for key, x in scales.items()})
        outputs, _ = program(analysis.inputs(values, *args, **kwargs), scales)
        return analysis.traced.rebuild(outputs)

    return wrapped


def _may_hold_weights(params: Any) -> bool:
    return any(
        jnp.ndim(x) > 1 and jnp.issubdtype(x.dtype, jnp.floating)
        for x in jax.tree.leaves(params)
        if is_array(x)
    )


def _warn_of_plain() -> None:
    warnings.warn(
        "wrap: no leaf of the parameters is a (g, v) leaf, and the function runs without weight "
        "normalization. Pass what weight_norm(params, axes) returns. Call the function itself, "
        "without wrap, on parameters that are plain on purpose, such as folded ones",
        stacklevel=3,
    )


def _program(analysis: Analysis, leaves: Set[int], avals: Mapping[Key, Any]) -> Rewritten:
    """The function of v instead of w for some leaves, with their scales behind contractions."""
    memo, key = analysis.traced.memo, tuple(avals.items())
    if key not in memo:
        edits = {
            use.site.path: Edit(
                takes=(Key("scale", use.leaf, use.scanned),),
                behind=_scaling(use.layout),
                before=in_order,
                operand=1 - use.operand,
                stand_in=functools.partial(as_contraction, weight=use.operand),
            )
            for use in analysis.records.uses
            if use.leaf in leaves
        }
        memo[key] = rewrite(analysis.traced.jaxpr, edits, avals)
    program: Rewritten = memo[key]
    return program


@functools.cache  # JAX traces the same function once
def _scaling(layout: Layout) -> Callable[..., list[jax.Array]]:
    def behind(*values: jax.Array) -> list[jax.Array]:
        *_, output, scale = values
        return [times(output, lay_out(scale, layout))]

    return behind


def scales_output(weight_size: Any, output_size: Any) -> bool:
    """Whether the scale goes on the output of a layer rather than on its weight.

    With W and A the sizes of the weight and of the output, XLA's training step with Adam reads
    and writes, beyond the plain one's: 5 W with the scale on the weight; W + 4 A with it on the
    output, or 3 W + 4 A where it copies v (see `in_order`), which it does on several devices. The
    devices share the output, so that each has a part of A. Where both cost the same, the scale goes
    on the output, since that takes less memory.

    Args:
      weight_size: the number of elements of the weight.
      output_size: the number of elements of all outputs that it makes in one call.
    """
    return is_at_most(output_size, weight_size)


def _scaled_behind(analysis: Analysis, gv_leaves: Mapping[int, GVLeaf]) -> set[int]:
    """The leaves whose scale goes on the outputs: all that happens to them must allow it."""
    records = analysis.records
    uses: dict[int, list[Use]] = collections.defaultdict(list)
    for use in records.uses:
        uses[use.leaf].append(use)
    others = {note.leaf for note in records.notes} | records.needed
    return {
        leaf
        for leaf, gv in gv_leaves.items()
        if uses[leaf] and leaf not in others and gv.v.size
        if all(use.is_scalable and use.fan_in.isdisjoint(gain_axes(gv)) for use in uses[leaf])
        if not any(use.is_narrow for use in uses[leaf])  # v·x may overflow where w·x does not
        if not is_narrow(gv.v.dtype)
        if str(jax.typeof(gv.v)) == str(analysis.type_of(leaf))  # sharded as w is, say
        if scales_output(
            math.prod(gv.v.shape), sum(use.output_size * use.site.trips for use in uses[leaf])
        )
    }


def _value(box: Any, gv: GVLeaf, is_scaled_behind: bool, mesh_axes: tuple[str, ...]) -> Any:
    """The program's input for a (g, v) leaf: v where the scale goes on outputs, else the weight."""
    value = jnp.asarray(gv.v) if is_scaled_behind else _weight(gv, mesh_axes)
    return rebox(outer_box(box), value)
