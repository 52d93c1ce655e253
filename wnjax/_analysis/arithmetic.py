"""Rules of elementwise arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from wnjax._analysis.layout import Layout, is_complete, leaf_axes, long_axes, repeated
from wnjax._analysis.rules import (
    Recorder,
    Rule,
    displaced,
    end,
    is_narrow,
    narrowed,
    shapes,
    sources_of,
    unscalable,
)
from wnjax._analysis.views import (
    ACTIVATION,
    CAPTURED,
    DATA,
    OWN_STATISTICS,
    Info,
    LeafView,
    PartialSum,
    is_repeated,
    united,
)


def _changed(info: Info, how: str) -> tuple[LeafView, ...]:
    return tuple(t.moved(t.layout, changed=t.changed or how) for t in info.views)


def _broadcast(eqn: Any, ins: Sequence[Info]) -> list[Info]:
    """The operands with the shape of the result: axes of size 1, and scalars, repeat."""
    shape = tuple(eqn.outvars[0].aval.shape)
    result = []
    for info, before in zip(ins, shapes(eqn), strict=True):
        grown = {i for i, size in enumerate(shape) if before[i : i + 1] != (size,)}

        def to(layout: Layout, grown: set[int] = grown) -> Layout:
            return tuple(repeated(n) if i in grown else layout[i] for i, n in enumerate(shape))

        views = tuple(view.moved(to(view.layout)) for view in info.views)
        sums = tuple(view.moved(to(view.layout)) for view in info.sums)
        partial = tuple(one for p in info.partial if (one := p.moved(to)) is not None)
        result.append(Info(views, sums, info.sources, info.constant | grown, partial))
    return result


def _common_constant(ins: Sequence[Info]) -> frozenset[int]:
    """The axes along which an elementwise result repeats."""
    return frozenset.intersection(*(info.constant for info in ins))


def _long_axes(view: LeafView) -> set[int]:
    """The axes of the value along which the leaf really varies."""
    return {i for i, axis in enumerate(view.layout) if not is_repeated(axis)}


def _repeats_along(info: Info, view: LeafView) -> bool:
    return bool(_long_axes(view) & info.constant)


def _is_scalar(info: Info, eqn: Any) -> bool:
    shape = eqn.outvars[0].aval.shape
    return all(i in info.constant or size == 1 for i, size in enumerate(shape))


def _elementwise(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    """Another function of the leaf, unless activations come in."""
    ins, sources = _broadcast(eqn, ins), sources_of(ins)
    if sources & ACTIVATION:
        end(recorder, eqn, f"unknown operation {eqn.primitive.name}", *ins)
        return [Info(sources=sources, constant=_common_constant(ins))]
    views = tuple(view for info in ins for view in _changed(info, eqn.primitive.name))
    return [Info(views, (), sources, _common_constant(ins))]


def _convert(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.inexact):
        return _elementwise(recorder, eqn, ins)
    if not jnp.issubdtype(dtype, jnp.floating):  # complex
        return [unscalable(ins[0])]
    return [narrowed(ins[0]) if is_narrow(dtype) else ins[0]]


def _mul(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    return product(recorder, eqn, *_broadcast(eqn, ins))


def product(recorder: Recorder, eqn: Any, a: Info, b: Info) -> list[Info]:
    """The elementwise product of two values that have the shape of the result."""
    views = (*_multiplied(recorder, eqn, a, b), *_multiplied(recorder, eqn, b, a))
    sums = (*_scaled_sums(eqn, a, b), *_scaled_sums(eqn, b, a))
    partial = united((*_scaled_partial(a, b), *_scaled_partial(b, a)))
    return [Info(views, sums, sources_of([a, b]), _common_constant([a, b]), partial)]


def _div(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    info, divisor = _broadcast(eqn, ins)
    views = _multiplied(recorder, eqn, info, divisor)
    end(recorder, eqn, "scale", divisor)
    sums, partial = _scaled_sums(eqn, info, divisor), _scaled_partial(info, divisor)
    return [Info(views, sums, sources_of(ins), _common_constant([info, divisor]), partial)]


def _scaled_sums(eqn: Any, info: Info, factor: Info) -> tuple[LeafView, ...]:
    return info.sums if _is_scalar(factor, eqn) and not factor.is_activation else ()


def _scaled_partial(info: Info, factor: Info) -> tuple[PartialSum, ...]:
    """The sums that stay partial. With the outputs of layers on both sides they are over."""
    is_layer = factor.is_activation and not factor.is_data
    is_captured = factor.sources == CAPTURED
    return tuple(
        dataclasses.replace(p, is_weighted=p.is_weighted or is_captured)
        for p in info.partial
        if p.call or not is_layer
    )


def _multiplied(recorder: Recorder, eqn: Any, info: Info, factor: Info) -> tuple[LeafView, ...]:
    """The views of a value that is multiplied by a factor."""
    kept = []
    call = recorder.einsum_call(eqn)
    is_summed_later = call is not None and not call.is_over
    views = [_masked(view, factor) if factor.is_constant else view for view in info.views]
    for view in views:
        repeats = _repeats_along(factor, view)
        modulates = repeats and len(_long_axes(view)) > 1
        if any(other.leaf == view.leaf for other in factor.views):
            kept.append(view.moved(view.layout, changed=view.changed or eqn.primitive.name))
        elif factor.depends_on(view.leaf) and (modulates or not factor.is_activation):
            kept.append(view.moved(view.layout, changed=OWN_STATISTICS))
        elif factor.is_activation and is_summed_later:
            if call is not None and call.is_over is None and not modulates:
                recorder.note(view.leaf, "scale", eqn)
            kept.append(view.moved(view.layout, is_multiple=True, is_intact=False))
        elif factor.is_activation and not modulates:
            recorder.note(view.leaf, "scale", eqn)
        elif factor.is_activation:
            kept.append(view.moved(view.layout, is_multiple=True))
        elif not factor.views or _is_scalar(factor, eqn):
            kept.append(view.moved(view.layout, is_multiple=True))  # by a mask, or a constant
        elif any(_repeats_along(info, other) for other in factor.views):
            recorder.note(view.leaf, "product of two parameters" if repeats else "scale", eqn)
        elif repeats:
            kept.append(view.moved(view.layout, is_multiple=True))  # by a scale of its features
        else:
            recorder.note(view.leaf, "product of two parameters", eqn)
    return tuple(kept)


def _masked(view: LeafView, factor: Info) -> LeafView:
    """The view with the axes marked along which a constant factor varies."""
    varying = (axis for i, axis in enumerate(view.layout) if i not in factor.constant)
    return view.moved(view.layout, masked=view.masked | long_axes(varying))


def _add(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    a, b = ins = _broadcast(eqn, ins)
    views = (*_plus(recorder, eqn, 0, a, b), *_plus(recorder, eqn, 1, b, a))
    sums = (*_shifted(a, b), *_shifted(b, a))
    partial = united((*_shifted_partial(recorder, a, b), *_shifted_partial(recorder, b, a)))
    return [Info(views, sums, sources_of(ins), _common_constant(ins), partial)]


def _plus(
    recorder: Recorder, eqn: Any, operand: int, info: Info, other: Info
) -> tuple[LeafView, ...]:
    """The views of a value, an operand of a sum, to which another is added."""
    if not other.is_activation:
        own = [t for t in info.views if other.depends_on(t.leaf) and not other.views]
        return _changed(info, OWN_STATISTICS if own else eqn.primitive.name)
    for view in info.views:
        neurons = [s for s in other.sums if s.leaf != view.leaf and _is_bias_of(recorder, view, s)]
        if eqn.primitive.name == "sub":
            neurons = []
        for one in neurons:
            recorder.bias(one, view, operand, eqn)
        recorder.note(view.leaf, "bias" if neurons else "added to activations", eqn)
    return ()


def _shifted(info: Info, other: Info) -> tuple[LeafView, ...]:
    """The sums that stay sums of their neurons: what is added is the same for all samples."""
    if other.views:
        return ()
    return tuple(
        s
        for s in info.sums
        if {of_other.leaf for of_other in other.sums} <= {s.leaf}
        and all(
            i in other.constant or axis.size == 1 or not is_repeated(axis)
            for i, axis in enumerate(s.layout)
        )
    )


def _shifted_partial(recorder: Recorder, info: Info, other: Info) -> tuple[PartialSum, ...]:
    """The sums that stay partial: a bias, or data, is added to what is the output of a layer."""
    biased = {s.leaf for s in info.sums for t in other.views if _is_bias_of(recorder, t, s)}
    return tuple(p for p in info.partial if p.use.leaf not in biased and not other.is_data)


def _is_bias_of(recorder: Recorder, view: LeafView, neurons: LeafView) -> bool:
    """Whether a parameter has one number for every neuron, and no more."""
    if view.changed or view.is_indexed or view.is_multiple:
        return False
    for one in (view, neurons):
        shape = recorder.shape(one.leaf)
        present = leaf_axes(one.layout)
        if not all(is_complete(one.layout, axis, shape[axis]) for axis in present):
            return False
    picked = {axis for axis in view.stacked if recorder.shape(view.leaf)[axis] > 1}
    if picked and not neurons.stacked:
        return False  # a part of something larger
    return all(
        is_repeated(bias) and is_repeated(features)
        if is_repeated(bias) or is_repeated(features)
        else not any(atom.axis is None for atom in bias.atoms)
        and (bias.length, bias.offset) == (features.length, features.offset)
        for bias, features in zip(view.layout, neurons.layout, strict=True)
    )


def _select_n(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    ins = _broadcast(eqn, ins)
    constant = _common_constant(ins)
    if (sources := sources_of(ins)) & ACTIVATION:
        end(recorder, eqn, "added token", *(x for x in ins[1:] if not x.is_activation))
        partial = () if sources & DATA or ins[0].is_activation else displaced(ins)
        return [Info(sources=sources, constant=constant, partial=partial)]
    views = [_selected(_masked(t, ins[0]), ins[0]) for x in ins[1:] for t in x.views]
    return [Info(tuple(views), (), sources, constant)]


def _selected(view: LeafView, which: Info) -> LeafView:
    changed = view.changed or ("select_n" if which.depends_on(view.leaf) else None)
    return view.moved(view.layout, is_intact=False, changed=changed)


NONLINEAR = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp",
    "cos", "cosh", "digamma", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor",
    "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "log2", "logistic",
    "lt", "max", "min", "ne", "nextafter", "not", "one_minus_square", "pow", "rem", "round",
    "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(NONLINEAR, _elementwise),
    "convert_element_type": _convert,
    "mul": _mul,
    "div": _div,
    **dict.fromkeys(["add", "add_any", "sub"], _add),
    "select_n": _select_n,
}
