"""Rules of the primitives that sum over axes of a weight: its consumers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from wnjax._walk.layout import atoms_of, repeated
from wnjax._walk.rules import (
    Recorder,
    Rule,
    end,
    is_narrow,
    shapes,
    sources_of,
    unknown,
    without_ride,
)
from wnjax._walk.tracks import ACTIVATION, OWN_STATISTICS, Info, Track, Use, has_copies


def _dot_general(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    contracting, batch = eqn.params["dimension_numbers"]
    outs: list[list[int | None]] = []
    free = len(batch[0])
    for shape, summed, batched in zip(shapes(eqn), contracting, batch, strict=True):
        dims: list[int | None] = [None] * len(shape)
        for place, dim in enumerate(batched):
            dims[dim] = place
        for dim in range(len(shape)):
            if dim not in summed and dim not in batched:
                dims[dim], free = free, free + 1
        outs.append(dims)
    side = _weight_side(recorder, eqn, ins)
    if side is None:
        return [Info(sources=sources_of(ins))]
    return [_consume(recorder, eqn, ins[side], ins[1 - side], outs[side])]


def _conv(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    inputs, weight = ins
    end(recorder, eqn, "input of conv_general_dilated", inputs)
    numbers = eqn.params["dimension_numbers"]
    dims: list[int | None] = [None] * len(numbers.rhs_spec)
    dims[numbers.rhs_spec[0]] = numbers.out_spec[1]
    if eqn.params["batch_group_count"] > 1:  # only gradients have these
        return unknown(recorder, eqn, [weight])
    return [_consume(recorder, eqn, weight, inputs, dims)]


def _ragged_dot(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    inputs, weight, *_ = ins
    end(recorder, eqn, "input of ragged_dot_general", inputs)
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ((_, summed), _), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    if not groups:  # only gradients have ragged sums
        return unknown(recorder, eqn, [weight])
    # The groups have no axis in the output, so that no factor can be put there.
    weight = without_ride(weight)
    places = [None if dim in summed else 0 for dim in range(len(shapes(eqn)[1]))]
    out = _consume(recorder, eqn, weight, inputs, places)
    return [Info(sources=out.sources | sources_of(ins))]


def _weight_side(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> int | None:
    """Which operand of a product is the weight; None if neither is."""
    ranks = [_rank(info) for info in ins]
    if not ins[0].tracks and not ins[1].tracks:
        return None
    if ranks[0] == ranks[1]:
        if not all(track.is_indexed for info in ins for track in info.tracks):
            end(recorder, eqn, "product of two parameters", *ins)
        return None
    side = 0 if ranks[0] < ranks[1] else 1
    end(recorder, eqn, f"input of {eqn.primitive.name}", ins[1 - side])
    return side


def _rank(info: Info) -> int:
    """How unlike a weight a value is: of two operands, the lower is the weight."""
    tracks = info.tracks
    if not tracks:
        return 4
    if any(track.changed for track in tracks):
        return 3
    if any(track.is_indexed for track in tracks):
        return 2
    return 1 if any(map(has_copies, tracks)) else 0


def _consume(
    recorder: Recorder,
    eqn: Any,
    weight: Info,
    other: Info,
    places: Sequence[int | None],
) -> Info:
    """Writes down that a weight is summed over its dimensions without a place in the output."""
    refusal = None if other.sources else "the other operand is constant"
    sums, sources = [], weight.sources | other.sources
    for track in weight.tracks:
        summed = atoms_of(axis for axis, at in zip(track.layout, places, strict=True) if at is None)
        if track.is_indexed and any(atom.stride == 0 and atom.axis is not None for atom in summed):
            continue  # a sum over what was looked up
        use = _use(recorder, eqn, track, places, refusal)
        if not use.fan_in:
            recorder.note(track.leaf, "scale", eqn)
            continue
        alone = len(weight.tracks) == 1 and all(axis.is_whole for axis in track.layout)
        recorder.use(dataclasses.replace(use, rides=use.rides and alone))
        sources |= ACTIVATION
        if use.refusal is None:
            sums.append(_sum(eqn, track, places))
    return Info((), tuple(sums), sources)


def _use(
    recorder: Recorder, eqn: Any, track: Track, places: Sequence[int | None], refusal: str | None
) -> Use:
    pairs = list(zip(track.layout, places, strict=True))
    summed = atoms_of(axis for axis, place in pairs if place is None)
    kept = atoms_of(axis for axis, place in pairs if place is not None)
    shape = recorder.shape(track.leaf)
    fan_in = {atom.axis for atom in summed if atom.axis is not None}
    features = {atom.axis for atom in kept if atom.axis is not None}
    features |= {axis for axis in track.stacked if shape[axis] > 1}
    if track.changed:
        refusal = refusal or _refusal(track.changed)
    for axis in fan_in & features:
        is_kept = axis in track.stacked or any(a.axis == axis and a.size > 1 for a in kept)
        is_summed = any(a.axis == axis and a.size > 1 for a in summed)
        (fan_in if is_kept else features).remove(axis)
        if is_kept and is_summed:
            refusal = refusal or f"only part of axis {axis} is summed"
            fan_in.add(axis)
    site, size = recorder.site(eqn), math.prod(eqn.outvars[0].aval.shape)
    dtype = eqn.outvars[0].aval.dtype
    is_real = jnp.issubdtype(dtype, jnp.floating)
    rides = track.is_intact and is_real and refusal is None and site.is_direct
    narrow = track.is_narrow or is_narrow(dtype)
    scanned = frozenset(axis for axis, _ in track.scanned)
    axes = frozenset(fan_in), frozenset(features)
    return Use(track.leaf, *axes, refusal, site, size, rides, narrow, scanned)


def _refusal(changed: str) -> str:
    if changed == OWN_STATISTICS:
        return "already normalized by its own statistics"
    return f"function of the parameter ({changed})"


def _sum(eqn: Any, track: Track, places: Sequence[int | None]) -> Track:
    """Where the neurons of a weight lie in the output of their layer."""
    layout = [repeated(size) for size in eqn.outvars[0].aval.shape]
    for axis, place in zip(track.layout, places, strict=True):
        if place is not None:
            layout[place] = axis
    return Track(track.leaf, tuple(layout), track.stacked, track.scanned)


RULES: dict[str, Rule] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
}
