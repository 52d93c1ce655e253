"""Rewrites a jaxpr: every equation as it is, but for what is put around some of them.

So nothing is lost that an equation carries: parameters, name scopes, lines, shardings, effects.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from wnjax._analysis.calls import extended_call, extended_scan, scan_parts
from wnjax._analysis.jaxprs import inner_name, opened

Path: TypeAlias = tuple[int, ...]  # as of `Site`
Values: TypeAlias = Callable[..., Sequence[jax.Array]]


class Key(NamedTuple):
    """The name of an array that equations take from outside of the jaxpr, or give to it.

    Attributes:
      name: what it is.
      leaf: the leaf of the parameters that it tells of, whose rank it has.
      scanned: the axes of the leaf that scans around run over, and how deep these are nested. The
        array has size 1 there.
    """

    name: str
    leaf: int = -1
    scanned: frozenset[tuple[int, int]] = frozenset()

    def outside(self, depth: int) -> Key:
        """The key outside of a scan whose jaxpr is nested so deep."""
        return self._replace(scanned=frozenset(x for x in self.scanned if x[1] != depth))

    def axis_at(self, depth: int) -> int | None:
        """The axis that a scan runs over, whose jaxpr is nested so deep; None if it is none."""
        return next((axis for axis, at in self.scanned if at == depth), None)


class Edit(NamedTuple):
    """What is put around an equation.

    Attributes:
      takes: the arrays that it takes.
      behind: a function of the operands, the output and what it takes. It gives the output that the
        rest of the program sees, and the arrays of `gives`.
      gives: the arrays that it gives.
      before: a function of an operand and of the first array that it takes, which gives both.
      operand: which operand this is.
      stand_in: from the equation to the one in its place, which computes the same.
    """

    takes: tuple[Key, ...]
    behind: Values
    gives: tuple[Key, ...] = ()
    before: Values | None = None
    operand: int = 0
    stand_in: Callable[[Any], Any] | None = None


class Rewritten(NamedTuple):
    """A rewritten jaxpr.

    Attributes:
      jaxpr: open. What it takes is behind its inputs, and what it gives behind its outputs.
      takes: the arrays that it takes.
      gives: the arrays that it gives.
    """

    jaxpr: Any
    takes: list[Key]
    gives: list[Key]

    def __call__(self, inputs: Sequence[Any], arrays: Mapping[Key, Any]) -> tuple[list[Any], Any]:
        """The outputs, and a dict with what it gives."""
        closed = core.ClosedJaxpr(self.jaxpr, ())
        values = core.jaxpr_as_fun(closed)(*inputs, *(arrays[key] for key in self.takes))
        count = len(values) - len(self.gives)
        return list(values[:count]), dict(zip(self.gives, values[count:], strict=True))


def rewrite(jaxpr: Any, edits: Mapping[Path, Edit], avals: Mapping[Key, Any]) -> Rewritten:
    """Rewrites an open jaxpr.

    Args:
      jaxpr: the jaxpr.
      edits: by the path of the equation: what is put around it.
      avals: the types of what the edits take, outside of all scans.
    """
    return _rewrite(jaxpr, edits, _Types(avals, {}), ())


class _Types(NamedTuple):
    """What all jaxprs of a program share.

    Attributes:
      avals: the types of the arrays that are taken, outside of all scans.
      jaxprs: by function and types of its operands: what was traced of it.
    """

    avals: Mapping[Key, Any]
    jaxprs: dict[Any, Any]

    def trace(self, fn: Values, operands: Sequence[Any]) -> Any:
        """The jaxpr of a function for operands of these types."""
        key = fn, *(operand.aval for operand in operands)
        if key not in self.jaxprs:
            self.jaxprs[key] = jax.make_jaxpr(fn)(*key[1:]).jaxpr
        return self.jaxprs[key]


def _rewrite(jaxpr: Any, edits: Mapping[Path, Edit], types: _Types, path: Path) -> Rewritten:
    body = _Body(types)
    inside: dict[int, dict[Path, Edit]] = collections.defaultdict(dict)
    for key, edit in edits.items():
        inside[key[len(path)]][key] = edit
    for i, eqn in enumerate(jaxpr.eqns):
        mine = inside.get(i)
        if mine is None:
            body.eqns.append(eqn)
        elif (*path, i) in mine:
            body.edit(eqn, mine[*path, i])
        elif eqn.primitive is primitives.scan_p:
            body.scan(eqn, mine, (*path, i, 0))
        elif eqn.primitive is primitives.cond_p:
            body.cond(eqn, mine, (*path, i))
        else:
            body.call(eqn, mine, (*path, i, 0))
    return Rewritten(
        jaxpr.replace(
            invars=[*jaxpr.invars, *body.takes.values()],
            outvars=[*jaxpr.outvars, *body.gives.values()],
            eqns=body.eqns,
        ),
        [*body.takes],
        [*body.gives],
    )


class _Body:
    """The equations of a jaxpr in the making.

    Attributes:
      eqns: the equations.
      takes: its further inputs.
      gives: its further outputs.
    """

    def __init__(self, types: _Types):
        self.types = types
        self.eqns: list[Any] = []
        self.takes: dict[Key, Any] = {}
        self.gives: dict[Key, Any] = {}

    def take(self, key: Key) -> Any:
        """The variable of an array from outside."""
        if key not in self.takes:
            aval = self.types.avals[key._replace(scanned=frozenset())]
            self.takes[key] = core.Var(_inside_scans(aval, key))
        return self.takes[key]

    def compute(
        self, fn: Values, operands: Sequence[Any], like: Any, results: Iterable[Any] = ()
    ) -> list[Any]:
        """Adds the equations of a function. Its first results become the variables `results`.

        They get the name scope and the line of the equation `like`.
        """
        jaxpr = self.types.trace(fn, operands)
        env = dict(zip(jaxpr.invars, operands, strict=True)) | dict(
            zip(jaxpr.outvars, results, strict=False)
        )

        def read(var: Any) -> Any:
            return var if isinstance(var, core.Literal) else env[var]

        for eqn in jaxpr.eqns:
            for var in eqn.outvars:
                env.setdefault(var, core.Var(var.aval))
            invars, outvars = list(map(read, eqn.invars)), list(map(read, eqn.outvars))
            changed = eqn.replace(invars=invars, outvars=outvars, source_info=like.source_info)
            self.eqns.append(changed)
        return list(map(read, jaxpr.outvars))

    def edit(self, eqn: Any, edit: Edit) -> None:
        """Adds an equation, and what is put around it."""
        operands, takes = list(eqn.invars), [self.take(key) for key in edit.takes]
        if edit.before is not None:
            changed = self.compute(edit.before, [operands[edit.operand], takes[0]], eqn)
            operands[edit.operand], takes[0] = changed
        (result,) = eqn.outvars
        output = core.Var(result.aval)
        same = eqn if edit.stand_in is None else edit.stand_in(eqn)
        self.eqns.append(same.replace(invars=operands, outvars=[output]))
        outs = self.compute(edit.behind, [*eqn.invars, output, *takes], eqn, [result])
        self.gives |= zip(edit.gives, outs[1:], strict=True)

    def call(self, eqn: Any, edits: Mapping[Path, Edit], path: Path) -> None:
        """Adds a call of a jaxpr, with edits inside."""
        name: Any = inner_name(eqn)
        if eqn.params.get("policy") is not None:  # it may ask for the primitive
            edits = {key: edit._replace(stand_in=None) for key, edit in edits.items()}
        inner = _rewrite(opened(eqn.params[name])[0], edits, self.types, path)
        results = [core.Var(var.aval) for var in inner.jaxpr.outvars[len(eqn.outvars) :]]
        params = extended_call(eqn, len(inner.takes), len(inner.gives))
        self.eqns.append(
            eqn.replace(
                params={**params, name: _closed_like(eqn.params[name], inner.jaxpr)},
                invars=[*eqn.invars, *map(self.take, inner.takes)],
                outvars=[*eqn.outvars, *results],
            )
        )
        self.gives |= zip(inner.gives, results, strict=True)

    def cond(self, eqn: Any, edits: Mapping[Path, Edit], path: Path) -> None:
        """Adds a choice of branches, all of which take what one of them takes."""
        branches = eqn.params["branches"]
        inner = []
        for i, branch in enumerate(branches):
            here = {key: edit for key, edit in edits.items() if key[len(path)] == i}
            inner.append(_rewrite(opened(branch)[0], here, self.types, (*path, i)))
        takes = list(dict.fromkeys(key for one in inner for key in one.takes))
        taken = [self.take(key) for key in takes]
        changed = (_branch(one, takes, taken) for one in inner)
        params = {**eqn.params, "branches": tuple(map(_closed_like, branches, changed))}
        self.eqns.append(eqn.replace(params=params, invars=[*eqn.invars, *taken]))

    def scan(self, eqn: Any, edits: Mapping[Path, Edit], path: Path) -> None:
        """Adds a scan, with edits inside. What runs along a scanned axis is scanned, too."""
        depth = len(path) // 2
        inner = _rewrite(opened(eqn.params["jaxpr"])[0], edits, self.types, path)
        axes = {
            key: axis for key in inner.takes if (axis := self._scanned_axis(key, depth)) is not None
        }
        consts = [key for key in inner.takes if key not in axes]
        outside = [self.take(key.outside(depth)) for key in (*consts, *axes)]
        constants, stacked = outside[: len(consts)], outside[len(consts) :]
        slices = [
            self.compute(_first(axis), [var], eqn)[0]
            for axis, var in zip(axes.values(), stacked, strict=True)
        ]
        length = eqn.params["length"]
        results = [
            core.Var(core.unmapped_aval(length, 0, var.aval))
            for var in inner.jaxpr.outvars[len(eqn.outvars) :]
        ]
        split, _ = scan_parts(eqn.params)
        params = extended_scan(eqn, len(consts), len(axes), len(inner.gives))
        body = self._scan_body(inner, axes, eqn)
        self.eqns.append(
            eqn.replace(
                params={**params, "jaxpr": _closed_like(eqn.params["jaxpr"], body)},
                invars=[*eqn.invars[:split], *constants, *eqn.invars[split:], *slices],
                outvars=[*eqn.outvars, *results],
            )
        )
        for key, result in zip(inner.gives, results, strict=True):
            given = self.compute(_unstacked(key.axis_at(depth)), [result], eqn)
            self.gives[key.outside(depth)] = given[0]

    def _scanned_axis(self, key: Key, depth: int) -> int | None:
        """The axis along which a scan slices an array; None where it takes all of it."""
        axis = key.axis_at(depth)
        is_long = axis is not None and self.take(key.outside(depth)).aval.shape[axis] != 1
        return axis if is_long else None

    def _scan_body(self, inner: Rewritten, axes: Mapping[Key, int], eqn: Any) -> Any:
        """The jaxpr of a scan: its inputs are in their groups, and slices stand for arrays."""
        first = len(inner.jaxpr.invars) - len(inner.takes)
        inputs, taken = inner.jaxpr.invars[:first], inner.jaxpr.invars[first:]
        split = first - len(eqn.invars) + scan_parts(eqn.params)[0]
        head, consts, slices = _Body(self.types), [], []
        for key, var in zip(inner.takes, taken, strict=True):
            if key not in axes:
                consts.append(var)
                continue
            slices.append(core.Var(core.mapped_aval(1, axes[key], var.aval)))
            head.compute(_expanded(axes[key]), slices[-1:], eqn, [var])
        return inner.jaxpr.replace(
            invars=[*inputs[:split], *consts, *inputs[split:], *slices],
            eqns=[*head.eqns, *inner.jaxpr.eqns],
        )


def _branch(one: Rewritten, takes: Sequence[Key], vars_of: Sequence[Any]) -> Any:
    """The jaxpr of a branch that takes all of `takes`."""
    first = len(one.jaxpr.invars) - len(one.takes)
    mine = dict(zip(one.takes, one.jaxpr.invars[first:], strict=True))
    taken = [mine.get(key, core.Var(var.aval)) for key, var in zip(takes, vars_of, strict=True)]
    return one.jaxpr.replace(invars=[*one.jaxpr.invars[:first], *taken])


def _closed_like(jaxpr: Any, new: Any) -> Any:
    """An open jaxpr with the constants of another one, if that is closed."""
    return jaxpr.replace(jaxpr=new) if hasattr(jaxpr, "jaxpr") else new


def _inside_scans(aval: Any, key: Key) -> Any:
    scanned = {axis for axis, _ in key.scanned}
    return aval.update(shape=tuple(1 if i in scanned else n for i, n in enumerate(aval.shape)))


# Functions that are the same object for the same axis, so that JAX traces them once.


@functools.cache
def _first(axis: int) -> Values:
    return lambda x: [jnp.moveaxis(x, axis, 0)]


@functools.cache
def _expanded(axis: int) -> Values:
    return lambda x: [jnp.expand_dims(x, axis)]


@functools.cache
def _unstacked(axis: int | None) -> Values:
    """What all steps of a scan gave; of its only step, where it runs over no axis of the leaf."""
    if axis is None:
        return lambda x: [x.squeeze(0)]
    return lambda x: [jnp.moveaxis(x.squeeze(axis + 1), 0, axis)]
