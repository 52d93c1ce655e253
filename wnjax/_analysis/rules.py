"""What each primitive does to the views of its operands.

The tables are in `moves`, `arithmetic` and `contractions`. A primitive that is in none of them ends
the views, and the analysis says so: nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax.extend.core import Primitive, primitives

from wnjax._analysis.layout import Layout, NoLayout
from wnjax._analysis.views import Info, LeafView, PartialSum, Site, Use, united


class EinsumCall(NamedTuple):
    """A call of `einsum` or `multi_dot`: one sum, which may be made of several products.

    Attributes:
      place: what its products have in common, and the products of another call have not.
      is_over: whether the equation is the last of its products; None if that is not known.
    """

    place: Hashable
    is_over: bool | None


class Recorder(Protocol):
    """Who writes down what the rules find."""

    def use(self, use: Use) -> None: ...
    def revise(self, use: Use) -> None: ...
    def note(self, leaf: int, kind: str, eqn: Any) -> None: ...
    def bias(self, neurons: LeafView, bias: LeafView, operand: int, eqn: Any) -> None: ...
    def shape(self, leaf: int) -> tuple[int, ...]: ...
    def site(self, eqn: Any) -> Site: ...
    def einsum_call(self, eqn: Any) -> EinsumCall | None: ...


Rule = Callable[[Recorder, Any, Sequence[Info]], list[Info]]

_EXPORTED = {x.name: x for x in vars(primitives).values() if isinstance(x, Primitive)}


def by_primitive(rules: Mapping[str, Rule]) -> dict[Any, Rule]:
    """Rules under the primitives of JAX that have these names; under names that it keeps private.

    So a primitive of somebody else is not taken for that of JAX with the same name.
    """
    return {_EXPORTED.get(name, name): rule for name, rule in rules.items()}


def unknown(recorder: Recorder, eqn: Any, ins: Sequence[Info]) -> list[Info]:
    """The rule of everything else."""
    for info in ins:
        for view in info.views:
            recorder.note(view.leaf, f"unknown operation {eqn.primitive.name}", eqn)
    return [Info(sources=sources_of(ins), partial=displaced(ins)) for _ in eqn.outvars]


def displaced(ins: Sequence[Info]) -> tuple[PartialSum, ...]:
    """The partial sums in some values, in another that holds them in a way that is not known."""
    return united(
        dataclasses.replace(partial, layout=None) for info in ins for partial in info.partial
    )


def is_narrow(dtype: Any) -> bool:
    """Whether v·x may leave the range of a dtype where w·x does not."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).maxexp <= 16


def narrowed(info: Info) -> Info:
    """The same value in a dtype of a narrow range."""
    views = tuple(dataclasses.replace(view, is_narrow=True) for view in info.views)
    return dataclasses.replace(info, views=views)


def unscalable(info: Info) -> Info:
    """The same value, on whose output no scale may be put any more."""
    views = tuple(dataclasses.replace(view, is_intact=False) for view in info.views)
    return dataclasses.replace(info, views=views)


def sources_of(ins: Sequence[Info]) -> int:
    return functools.reduce(operator.or_, (info.sources for info in ins), 0)


def shapes(eqn: Any) -> list[tuple[int, ...]]:
    return [tuple(v.aval.shape) for v in eqn.invars]


def move(
    recorder: Recorder,
    eqn: Any,
    info: Info,
    to: Callable[[Layout], Layout | None],
    constant: frozenset[int] = frozenset(),
    **changes: Any,
) -> Info:
    """What is known of a rearrangement of a value, given what it does to a layout."""
    views, sums = [], []
    for view in info.views:
        try:
            layout = to(view.layout)
        except NoLayout:
            recorder.note(view.leaf, f"unknown operation {eqn.primitive.name}", eqn)
            continue
        if layout is not None:
            views.append(view.moved(layout, **changes))
    for view in info.sums:
        try:
            layout = to(view.layout)
        except NoLayout:
            continue
        if layout is not None:
            sums.append(view.moved(layout))
    partial = [one for p in info.partial if (one := p.moved(to)) is not None]
    return Info(tuple(views), tuple(sums), info.sources, constant, tuple(partial))


def end(recorder: Recorder, eqn: Any, kind: str, *ins: Info) -> None:
    for info in ins:
        for view in info.views:
            recorder.note(view.leaf, kind, eqn)
