"""Rules of the primitives that rearrange a value, or pick a part of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from wnjax._analysis.layout import (
    Axis,
    Layout,
    NoLayout,
    cut,
    flip,
    gather,
    long_axes,
    pick,
    picked,
    repeated,
    reshape,
    tile,
)
from wnjax._analysis.rules import (
    Recorder,
    Rule,
    displaced,
    end,
    move,
    narrowed,
    shapes,
    sources_of,
    unknown,
    unscalable,
)
from wnjax._analysis.sizes import is_known, is_less
from wnjax._analysis.views import ACTIVATION, DATA, Info, LeafView, PartialSum, is_repeated


def _neg(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    views = tuple(dataclasses.replace(view, is_multiple=True) for view in ins[0].views)
    return [dataclasses.replace(ins[0], views=views, sums=())]


def _reduce_precision(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    """With a narrow range, v·x may leave it where w·x does not. Of v other digits would be lost."""
    keeps = eqn.params["mantissa_bits"] >= jnp.finfo(eqn.invars[0].aval.dtype).nmant
    info = ins[0] if keeps else unscalable(ins[0])
    return [info if eqn.params["exponent_bits"] >= 8 else narrowed(info)]


def same(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    return list(ins)


def _stop_gradient(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    """Not intact: a factor on the output would let the gradient through."""
    return [unscalable(ins[0])]


def _transpose(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    order = eqn.params["permutation"]
    constant = frozenset(i for i, axis in enumerate(order) if axis in ins[0].constant)
    return [move(recorder, eqn, ins[0], lambda x: tuple(x[i] for i in order), constant)]


def _reshape(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    order, sizes = eqn.params["dimensions"], eqn.params["new_sizes"]
    info, ndim = ins[0], len(shapes(eqn)[0])
    repeats = info.constant == frozenset(range(ndim))
    constant = frozenset(range(len(sizes))) if repeats else frozenset()

    def to(layout: Layout) -> Layout:
        return reshape(tuple(layout[i] for i in order) if order else layout, sizes)

    return [move(recorder, eqn, info, to, constant)]


def _broadcast_in_dim(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    before = shapes(eqn)[0]

    def to(layout: Layout) -> Layout:
        axes = [repeated(size) for size in shape]
        for i, dim in enumerate(dims):
            if before[i] == shape[dim]:
                axes[dim] = layout[i]
        return tuple(axes)

    kept = {dim for i, dim in enumerate(dims) if before[i] == shape[dim] and before[i] != 1}
    kept -= {dims[i] for i in ins[0].constant}
    return [move(recorder, eqn, ins[0], to, frozenset(range(len(shape))) - kept)]


def _squeeze(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    kept = [i for i in range(len(shapes(eqn)[0])) if i not in eqn.params["dimensions"]]
    constant = frozenset(new for new, old in enumerate(kept) if old in ins[0].constant)
    return [move(recorder, eqn, ins[0], lambda x: tuple(x[i] for i in kept), constant)]


def _rev(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    dimensions = eqn.params["dimensions"]

    def to(layout: Layout) -> Layout:
        return tuple(flip(axis) if i in dimensions else axis for i, axis in enumerate(layout))

    return [move(recorder, eqn, ins[0], to, ins[0].constant, is_intact=False)]


def _slice(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or [1] * len(starts)
    return [move(recorder, eqn, ins[0], _cutter(starts, limits, strides), is_intact=False)]


def _cutter(
    starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
) -> Callable[[Layout], Layout | None]:
    def to(layout: Layout) -> Layout | None:
        axes = [cut(*axis) for axis in zip(layout, starts, limits, strides, strict=True)]
        return tuple(axis for axis in axes if axis) if all(axes) else None

    return to


def _split(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    (shape,), axis, start, outs = shapes(eqn), eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = start, start + size
        to = _cutter(starts, limits, [1] * len(shape))
        outs.append(move(recorder, eqn, ins[0], to, is_intact=False))
        start += size
    return outs


def _dynamic_slice(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    sizes = eqn.params["slice_sizes"]
    out = move(recorder, eqn, ins[0], lambda x: tuple(map(pick, x, sizes)), is_intact=False)
    return [_looked_up(recorder, eqn, out, ins[1:])]


def _looked_up(recorder: Recorder, eqn: Any, out: Info, indices: Sequence[Info]) -> Info:
    """The outcome of indexing; if the indices are data, it is no plain part of the leaf."""
    sources = out.sources | sources_of(indices)
    if not sources_of(indices):
        return Info(out.views, (), sources, partial=out.partial)
    for view in out.views:
        recorder.note(view.leaf, "lookup table", eqn)
    views = tuple(t.moved(t.layout, is_indexed=True) for t in out.views)
    return Info(views, (), sources, partial=out.partial)


def _gather(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = tuple(eqn.outvars[0].aval.shape)
    collapsed, batching = numbers.collapsed_slice_dims, numbers.operand_batching_dims
    batch = [i for i in range(len(shape)) if i not in numbers.offset_dims]

    def to(layout: Layout) -> Layout:
        axes = [repeated(size) for size in shape]
        for dim in batch:
            axes[dim] = picked([layout[i] for i in collapsed], shape[dim])
        kept = [i for i in range(len(layout)) if i not in {*collapsed, *batching}]
        for i, dim in zip(kept, numbers.offset_dims, strict=True):
            axes[dim] = pick(layout[i], sizes[i])
        for i, dim in zip(batching, numbers.start_indices_batching_dims, strict=True):
            axes[batch[dim]] = layout[i]
        return tuple(axes)

    out = move(recorder, eqn, ins[0], to, is_intact=False)
    return [_looked_up(recorder, eqn, out, ins[1:])]


def _concatenate(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    axis = eqn.params["dimension"]
    return _joined(recorder, eqn, ins, [shape[axis] for shape in shapes(eqn)], axis)


def _joined(
    recorder: Recorder, eqn: Any, ins: Sequence[Info], sizes: Sequence[int], axis: int
) -> list[Info]:
    """Values of `sizes` beside one another along an axis."""
    sources = sources_of(ins)
    if sources & ACTIVATION:
        end(recorder, eqn, "added token", *(x for x in ins if not x.is_activation))
        return [Info(sources=sources, partial=() if sources & DATA else displaced(ins))]
    views, start, total = [], 0, eqn.outvars[0].aval.shape[axis]
    for info, size in zip(ins, sizes, strict=True):
        for view in info.views:
            layout = list(view.layout)
            layout[axis] = Axis(layout[axis].atoms, layout[axis].offset + start, total)
            views.append(view.moved(tuple(layout), is_intact=False))
        start += size
    return [Info(tuple(views), (), sources)]


def _stack(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    """Every operand fills one position of a new axis."""
    axis = eqn.params["axis"]

    def to(layout: Layout) -> Layout:
        return (*layout[:axis], repeated(1), *layout[axis:])

    ins = [move(recorder, eqn, info, to) for info in ins]
    return _joined(recorder, eqn, ins, [1] * len(ins), axis)


def _unstack(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    (shape,), axis, outs = shapes(eqn), eqn.params["axis"], []
    for position in range(shape[axis]):

        def to(layout: Layout, position: int = position) -> Layout | None:
            if cut(layout[axis], position, position + 1) is None:
                return None
            return (*layout[:axis], *layout[axis + 1 :])

        outs.append(move(recorder, eqn, ins[0], to, is_intact=False))
    return outs


def _all_gather(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    """The shards of all devices beside one another, as manual FSDP takes its weights."""
    if not eqn.params["tiled"]:
        return unknown(recorder, eqn, ins)
    axis, shards = eqn.params["all_gather_dimension"], eqn.params["axis_size"]

    def to(layout: Layout) -> Layout:
        return (*layout[:axis], gather(layout[axis], shards), *layout[axis + 1 :])

    return [move(recorder, eqn, ins[0], to, ins[0].constant, is_intact=False)]


def _dynamic_update_slice(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    """A part of a value in another one, if it is known where."""
    whole, part, *starts = ins
    literals = [getattr(var, "val", None) for var in eqn.invars[2:]]
    (shape, sizes), sources = shapes(eqn)[:2], sources_of(ins)
    if sources & ACTIVATION or sources_of(starts):
        return unknown(recorder, eqn, ins)

    def to(layout: Layout) -> Layout:
        return tuple(map(_placed, layout, shape, sizes, literals))

    moved = move(recorder, eqn, part, to, is_intact=False)
    return [Info((*_overwritten(whole), *moved.views), (), sources)]


def _placed(axis: Axis, size: int, of_part: int, start: Any) -> Axis:
    """An axis of a part in the whole, which has another size there."""
    if of_part == size:
        return axis
    if start is None or not is_known(size, of_part):
        raise NoLayout
    first = min(max(int(start), 0), size - of_part)
    return Axis(axis.atoms, axis.offset + first, size)


def _overwritten(info: Info) -> tuple[LeafView, ...]:
    """The views of a value of which a part is replaced, as if by a mask."""
    return tuple(t.moved(t.layout, is_intact=False, masked=long_axes(t.layout)) for t in info.views)


def _scatter(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    """Constants in the place of a part of a weight."""
    whole, *others = ins
    if whole.is_activation or not all(info.is_constant for info in others):
        return unknown(recorder, eqn, ins)
    return [Info(_overwritten(whole), (), sources_of(ins))]


def _pad(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    config, shape = eqn.params["padding_config"], eqn.outvars[0].aval.shape

    def to(layout: Layout) -> Layout:
        if any(is_less(low, 0) or is_less(high, 0) or inside for low, high, inside in config):
            raise NoLayout
        return tuple(
            repeated(size) if is_repeated(axis) else Axis(axis.atoms, axis.offset + low, size)
            for axis, (low, _, _), size in zip(layout, config, shape, strict=True)
        )

    out = move(recorder, eqn, ins[0], to, is_intact=False)
    return [dataclasses.replace(out, sources=sources_of(ins))]


def _tile(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    reps = eqn.params["reps"]
    return [move(recorder, eqn, ins[0], lambda x: tuple(map(tile, x, reps)), is_intact=False)]


def _reduce_sum(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    """Sums of neurons may be taken in parts, over axes without features."""
    end(recorder, eqn, "unknown operation reduce_sum", *ins)
    summed = eqn.params["axes"]
    partial = [_summed(recorder, eqn, ins[0], one) for one in ins[0].partial]

    def to(layout: Layout) -> Layout | None:
        is_partial = all(is_repeated(layout[i]) for i in summed)
        return tuple(x for i, x in enumerate(layout) if i not in summed) if is_partial else None

    out = move(recorder, eqn, dataclasses.replace(ins[0], views=(), partial=()), to)
    return [dataclasses.replace(out, partial=tuple(partial))]


def _summed(recorder: Recorder, eqn: Any, info: Info, partial: PartialSum) -> PartialSum:
    """A partial sum in the sum of a value over some of its axes."""
    if partial.layout is None:
        return partial
    summed = long_axes(partial.layout[i] for i in eqn.params["axes"])
    call = recorder.einsum_call(eqn)
    is_multiplied = info.is_data or partial.is_weighted
    if summed and (is_multiplied if partial.call is None else call and call.place == partial.call):
        refusal = "unknown operation reduce_sum"
        recorder.revise(dataclasses.replace(partial.use, refusal=refusal))
    kept = tuple(x for i, x in enumerate(partial.layout) if i not in eqn.params["axes"])
    return dataclasses.replace(partial, layout=kept)


def _psum(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    """The same over the axes of a mesh."""
    end(recorder, eqn, f"unknown operation {eqn.primitive.name}", *ins)
    return [dataclasses.replace(info, views=()) for info in ins]


IDENTITIES = (
    "copy", "device_put", "layout_constraint", "name", "optimization_barrier", "pvary", "reshard",
    "sharding_constraint",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(["psum", "psum_invariant"], _psum),
    "reduce_sum": _reduce_sum,
    "neg": _neg,
    **dict.fromkeys(IDENTITIES, same),
    "reduce_precision": _reduce_precision,
    "stop_gradient": _stop_gradient,
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "squeeze": _squeeze,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "dynamic_update_slice": _dynamic_update_slice,
    "scatter": _scatter,
    **dict.fromkeys(["all_gather", "all_gather_invariant"], _all_gather),
    "pad": _pad,
    "tile": _tile,
}
