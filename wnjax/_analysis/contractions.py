"""Rules of the primitives that sum over axes of a weight: its consumers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from wnjax._analysis.arithmetic import product
from wnjax._analysis.layout import Axis, Layout, atoms_of, leaf_axes, long_axes, repeated, whole
from wnjax._analysis.rules import (
    Recorder,
    Rule,
    end,
    is_narrow,
    move,
    shapes,
    sources_of,
    unknown,
    unscalable,
)
from wnjax._analysis.sizes import is_long
from wnjax._analysis.views import (
    ACTIVATION,
    CAPTURED,
    OWN_STATISTICS,
    Info,
    LeafView,
    PartialSum,
    Use,
    has_copies,
    united,
)

Places: TypeAlias = Sequence[int | None]  # of an operand's dimensions in the output; None: summed


class Operand(NamedTuple):
    """An operand of a product.

    Attributes:
      number: which one.
      info: what is known of it.
      places: of its dimensions in the output.
      matrices: the dimensions along which separate matrices lie.
    """

    number: int
    info: Info
    places: Places
    matrices: Sequence[int] = ()


SEVERAL_WEIGHTS = (
    "several weights in one einsum, whose sizes decide in which order they are summed over: "
    "write it as einsums of two operands, with subscripts in a string"
)
CONSTANT = "the other operand is constant"
CONSTANT_AND_DATA = (
    "multiplied by a constant array as well as by data: if that array is data, make it an argument "
    "of fn"
)


def dot_general(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    contracting, batch = eqn.params["dimension_numbers"]
    places: list[Places] = []
    free = len(batch[0])
    for shape, summed, batched in zip(shapes(eqn), contracting, batch, strict=True):
        dims: list[int | None] = [None] * len(shape)
        for place, dim in enumerate(batched):
            dims[dim] = place
        for dim in range(len(shape)):
            if dim not in summed and dim not in batched:
                dims[dim], free = free, free + 1
        places.append(dims)
    if not contracting[0]:
        a, b = (_broadcast(recorder, eqn, *pair) for pair in zip(ins, places, strict=True))
        return product(recorder, eqn, a, b)
    partial = _continued(recorder, eqn, ins, places)
    side = _weight_side(recorder, eqn, ins)
    if side is None:
        return [Info(sources=sources_of(ins), partial=partial)]
    out = _consume(
        recorder, eqn, Operand(side, ins[side], places[side], batch[side]), ins[1 - side]
    )
    return [dataclasses.replace(out, partial=united((*out.partial, *partial)))]


def _broadcast(recorder: Recorder, eqn: Any, info: Info, places: Places) -> Info:
    """An operand of a product that sums over nothing, with the shape of the result."""
    varying = {at for i, at in enumerate(places) if i not in info.constant}
    constant = frozenset(range(len(eqn.outvars[0].aval.shape))) - varying
    return move(recorder, eqn, info, lambda x: _lay_out(eqn, x, places), constant)


def _conv(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    inputs, weight = ins
    end(recorder, eqn, "input of conv_general_dilated", inputs)
    numbers = eqn.params["dimension_numbers"]
    dims: list[int | None] = [None] * len(numbers.rhs_spec)
    dims[numbers.rhs_spec[0]] = numbers.out_spec[1]
    if eqn.params["batch_group_count"] > 1:  # only gradients have these
        return unknown(recorder, eqn, [weight])
    # Windows mix the positions of the inputs.
    partial = _continued(recorder, eqn, ins, [None, dims])
    matrices = [] if eqn.params["feature_group_count"] == 1 else [numbers.rhs_spec[0]]
    out = _consume(recorder, eqn, Operand(1, weight, dims, matrices), inputs)
    return [dataclasses.replace(out, partial=united((*out.partial, *partial)))]


def _continued(
    recorder: Recorder, eqn: Any, ins: Sequence[Info], places: Sequence[Places | None]
) -> tuple[PartialSum, ...]:
    """The partial sums in two operands, as they are in their product."""
    pairs = [
        (partial, ins[1 - side], places[side])
        for side, info in enumerate(ins[:2])
        for partial in info.partial
    ]
    after = [_continue(recorder, eqn, *pair) for pair in pairs]
    return united(partial for partial in after if partial.call or partial.is_constant)


def _continue(
    recorder: Recorder, eqn: Any, partial: PartialSum, other: Info, places: Places | None
) -> PartialSum:
    """A partial sum in a product with another value, over the dimensions without a place."""
    layout, summed, kept = None, frozenset[int](), frozenset[int]()
    if partial.layout is not None and places is not None:
        summed = long_axes(x for x, at in zip(partial.layout, places, strict=True) if at is None)
        layout = _lay_out(eqn, partial.layout, places)
        kept = long_axes(layout)
    call = recorder.einsum_call(eqn)
    is_same_call = call is not None and call.place == partial.call
    is_looped = bool(summed) and other.depends_on(partial.use.leaf)
    refusal, goes_on = None, is_same_call
    if is_same_call and _takes_part(other, partial.call):
        refusal = SEVERAL_WEIGHTS
    elif is_same_call and (partial.is_constant or other.is_constant):
        refusal = CONSTANT_AND_DATA
    elif partial.is_constant and (is_looped or other.is_data or other.is_constant):
        refusal = CONSTANT_AND_DATA if layout is None or summed else None
        goes_on = True
    use = _extended(partial.use, summed, kept, refusal) if goes_on else partial.use
    if goes_on:
        recorder.revise(use)
    elif summed:
        layout = None
    place = partial.call if call is not None and is_same_call and not call.is_over else None
    is_constant = partial.is_constant and not other.is_data and use.refusal is None
    return PartialSum(use, layout, place, is_constant)


def _takes_part(info: Info, call: Hashable) -> bool:
    """Whether a value holds a weight, or what the same call of `einsum` has made of one."""
    return bool(info.views) or any(partial.call == call for partial in info.partial)


def _extended(use: Use, summed: frozenset[int], kept: frozenset[int], refusal: str | None) -> Use:
    """A sum that goes on over further axes of its weight. No single operation has all of it."""
    if refusal is None and (partly := sorted(summed & kept)):
        refusal = f"only part of axis {partly[0]} is summed"
    fan_in, features = use.fan_in | summed, use.features - (summed - kept)
    return dataclasses.replace(
        use, fan_in=fan_in, features=features, refusal=refusal, is_scalable=False
    )


def _ragged_dot(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    inputs, weight, *_ = ins
    end(recorder, eqn, "input of ragged_dot_general", inputs)
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ((_, summed), _), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    if not groups:  # only gradients have ragged sums
        return unknown(recorder, eqn, [weight])
    # The groups have no axis in the output, so that no factor can be put there.
    weight = unscalable(weight)
    places = [None if dim in summed else 0 for dim in range(len(shapes(eqn)[1]))]
    partial = _continued(recorder, eqn, ins, [None, None])
    out = _consume(recorder, eqn, Operand(1, weight, places, groups), inputs)
    return [Info(sources=out.sources | sources_of(ins), partial=partial)]


def _weight_side(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> int | None:
    """Which operand of a product is the weight; None if neither is."""
    ranks = [_rank(info) for info in ins]
    if not ins[0].views and not ins[1].views:
        return None
    if ranks[0] == ranks[1]:
        if not all(view.is_indexed for info in ins for view in info.views):
            is_einsum = recorder.einsum_call(eqn) is not None
            kind = SEVERAL_WEIGHTS if is_einsum else "product of two parameters"
            end(recorder, eqn, kind, *ins)
        return None
    side = 0 if ranks[0] < ranks[1] else 1
    end(recorder, eqn, f"input of {eqn.primitive.name}", ins[1 - side])
    return side


def _rank(info: Info) -> int:
    """How unlike a weight a value is: of two operands, the lower is the weight."""
    views = info.views
    if not views:
        return 4
    if any(view.changed for view in views):
        return 3
    if any(view.is_indexed for view in views):
        return 2
    return 1 if any(map(has_copies, views)) else 0


def _consume(recorder: Recorder, eqn: Any, weight: Operand, other: Info) -> Info:
    """Writes down that a weight is summed over its dimensions without a place in the output."""
    info, places = weight.info, weight.places
    call = recorder.einsum_call(eqn)
    place = None if call is None or call.is_over else call.place
    refusal = None if other.sources else CONSTANT
    if call is not None and _takes_part(other, call.place):
        refusal = SEVERAL_WEIGHTS
    partial, sums, sources = [], [], info.sources | other.sources
    for view in info.views:
        summed = atoms_of(axis for axis, at in zip(view.layout, places, strict=True) if at is None)
        if view.is_indexed and any(atom.stride == 0 and atom.axis is not None for atom in summed):
            continue  # a sum over what was looked up
        use = _use(recorder, eqn, weight, view, refusal)
        if not use.fan_in:
            recorder.note(view.leaf, "scale", eqn)
            continue
        alone = len(info.views) == 1 and all(axis.is_whole for axis in view.layout)
        use = dataclasses.replace(use, is_scalable=use.is_scalable and alone)
        recorder.use(use)
        sources |= ACTIVATION
        if use.refusal is not None:
            continue
        sums.append(LeafView(view.leaf, use.layout, view.stacked, view.scanned))
        if place is not None or _is_captured(other):
            partial.append(PartialSum(use, use.layout, place, _is_captured(other)))
    return Info((), tuple(sums), sources, partial=tuple(partial))


def _is_captured(info: Info) -> bool:
    """Whether a value comes from arrays that the function closes over, and no layer was between."""
    return info.sources == CAPTURED or any(p.is_constant for p in info.partial)


def _use(recorder: Recorder, eqn: Any, weight: Operand, view: LeafView, refusal: str | None) -> Use:
    number, _, places, matrices = weight
    pairs = list(zip(view.layout, places, strict=True))
    summed = atoms_of(axis for axis, place in pairs if place is None)
    kept = atoms_of(axis for axis, place in pairs if place is not None)
    shape = recorder.shape(view.leaf)
    fan_in = {atom.axis for atom in summed if atom.axis is not None}
    features = {atom.axis for atom in kept if atom.axis is not None}
    features |= {axis for axis in view.stacked if shape[axis] > 1}
    if view.changed:
        refusal = refusal or _refusal(view.changed)
    for axis in fan_in & features:
        is_kept = axis in view.stacked or any(a.axis == axis and is_long(a.size) for a in kept)
        is_summed = any(a.axis == axis and is_long(a.size) for a in summed)
        (fan_in if is_kept else features).remove(axis)
        if is_kept and is_summed:
            refusal = refusal or f"only part of axis {axis} is summed"
            fan_in.add(axis)
    site, size = recorder.site(eqn), math.prod(eqn.outvars[0].aval.shape)
    dtype = eqn.outvars[0].aval.dtype
    is_real = jnp.issubdtype(dtype, jnp.floating)
    is_scalable = view.is_intact and is_real and refusal is None and site.is_direct
    narrow = view.is_narrow or is_narrow(dtype)
    apart = leaf_axes(_outermost(eqn, view.layout[dim]) for dim in matrices) | view.stacked
    return Use(
        view.leaf,
        frozenset(fan_in),
        frozenset(features),
        frozenset(apart & features - fan_in),
        refusal,
        site,
        number,
        _lay_out(eqn, view.layout, places),
        size,
        is_scalable,
        narrow,
        view.scanned,
        is_masked=not view.masked.isdisjoint(fan_in),
    )


def _outermost(eqn: Any, axis: Axis) -> Axis:
    """The part of a dimension along which separate matrices lie: the groups of a convolution."""
    groups, atoms = eqn.params.get("feature_group_count", axis.size), []
    for atom in axis.atoms:
        if not is_long(groups) or groups % atom.size:
            break
        groups //= atom.size
        atoms.append(atom)
    return whole(*atoms)


def _refusal(changed: str) -> str:
    if changed == OWN_STATISTICS:
        return "already normalized by its own statistics"
    return f"function of the parameter ({changed})"


def _lay_out(eqn: Any, layout: Layout, places: Places) -> Layout:
    """The layout of the output of a product: dimensions of an operand at their places there."""
    result = [repeated(size) for size in eqn.outvars[0].aval.shape]
    for axis, place in zip(layout, places, strict=True):
        if place is not None:
            result[place] = axis
    return tuple(result)


RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
}
