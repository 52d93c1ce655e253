"""The analysis of a jaxpr: follows every leaf of the parameters to where it is summed over.

One forward pass of abstract interpretation: `rules` says what a primitive does to the views,
this module how they enter and leave nested jaxprs. It reads types and equations alone.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from wnjax._analysis import arithmetic, contractions, layout, moves
from wnjax._analysis.calls import CALLS, scan_parts
from wnjax._analysis.layout import Layout
from wnjax._analysis.lines import calls_around_einsum
from wnjax._analysis.rules import (
    EinsumCall,
    Rule,
    by_primitive,
    displaced,
    move,
    sources_of,
    unknown,
    unscalable,
)
from wnjax._analysis.sizes import is_long
from wnjax._analysis.views import (
    CAPTURED,
    FIRST_LEAF,
    Bias,
    Info,
    LeafView,
    Note,
    Site,
    Use,
    is_repeated,
    united,
)

RULES = by_primitive(moves.RULES | arithmetic.RULES | contractions.RULES)


def rule_of(eqn: Any) -> Rule | None:
    """The rule of the primitive of an equation, if there is one."""
    return RULES.get(eqn.primitive, RULES.get(eqn.primitive.name))


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr, open or closed, as an open one and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def inputs_of(jaxpr: Any) -> list[Any]:
    """The variables of an open jaxpr: of its constants first."""
    return [*jaxpr.constvars, *jaxpr.invars]


def leaf_info(leaf: int, shape: Sequence[int]) -> Info:
    """What is known of leaf number `leaf` itself."""
    return Info((LeafView(leaf, layout.of_leaf(shape)),), (), FIRST_LEAF << leaf)


def captured_info(value: Any) -> Info:
    """What is known of an array that a function closes over: it may be data, or a table."""
    is_array = getattr(value, "shape", ()) != ()
    is_float = is_array and jnp.issubdtype(jnp.result_type(value), jnp.inexact)
    return Info(sources=CAPTURED if is_float else 0)


# `einsum` names the scope of its products after its subscripts, if these are a string.
_SUBSCRIPTS = re.compile(r"(?:[\w. ]*,)+[\w. ]*(?:->[\w. ]*)?(?=\)*$)")


def einsum_calls(jaxpr: Any) -> dict[int, EinsumCall]:
    """By the identity of an equation: the call of `einsum` that it is one product of several of."""
    calls, products = {}, collections.Counter[str]()
    for eqn in jaxpr.eqns:
        if (operation := eqn.primitive.name) not in ("dot_general", "reduce_sum"):
            continue
        name = str(eqn.source_info.name_stack)
        found = _SUBSCRIPTS.search(name)
        if found is None:
            if place := calls_around_einsum(eqn.source_info):
                calls[id(eqn)] = EinsumCall(place, None)
        elif (operands := found[0].count(",")) > 1:
            products[name] += operation == "dot_general"
            is_over = products[name] % operands == 0
            calls[id(eqn)] = EinsumCall(name, is_over and operation == "dot_general")
    return calls


def inner_name(eqn: Any) -> str | None:
    """The parameter with the jaxpr that an equation calls with its own operands; None if none."""
    found = [
        name
        for name, jaxpr in eqn.params.items()
        if isinstance(jaxpr, core.Jaxpr | core.ClosedJaxpr) and _fits(eqn, *opened(jaxpr))
    ]
    return found[0] if len(found) == 1 else None


def _fits(eqn: Any, jaxpr: Any, consts: Sequence[Any]) -> bool:
    operands = inputs_of(jaxpr)[len(consts) :]
    return [_shape(v) for v in operands] == [_shape(v) for v in eqn.invars] and [
        _shape(v) for v in jaxpr.outvars
    ] == [_shape(v) for v in eqn.outvars]


def _shape(var: Any) -> Any:
    return getattr(var.aval, "shape", None)


class JaxprAnalyzer:
    """One pass over a function. Collects what happens to each of its leaves.

    Attributes:
      uses: sums over axes of a leaf.
      notes: everything else that ends its view.
      biases: sums of the outputs of neurons with their biases.
      needed: leaves of which something else needs the value: the output of the function, say.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        """Takes the shapes of the leaves."""
        self.shapes = shapes
        self.uses: list[Use] = []
        self.notes: list[Note] = []
        self.biases: list[Bias] = []
        self.needed: set[int] = set()
        self._path: tuple[int, ...] = ()
        self._sources: tuple[Any, ...] = ()  # of the equations around
        self._loops: frozenset[int] = frozenset()  # depths of the scans around with several steps
        self._is_silent = False
        self._known: dict[Any, list[Info]] = {}  # outputs of the jaxprs that were run silently
        self._trips = 1
        self._is_direct = True
        self._is_certain = True
        self._einsum_calls: dict[int, EinsumCall] = {}

    # What the rules write down.

    def use(self, use: Use) -> None:
        """Records a sum over some axes of a leaf."""
        self.uses.append(use)

    def revise(self, use: Use) -> None:
        """Says anew what the sum is that was recorded of this leaf at this site."""
        self.uses = [
            use if (old.leaf, old.refusal) == (use.leaf, None) and old.site == use.site else old
            for old in self.uses
        ]

    def note(self, leaf: int, kind: str, eqn: Any) -> None:
        """Records anything else that happens to a leaf."""
        self.notes.append(Note(leaf, kind, self.site(eqn)))

    def bias(self, neurons: LeafView, bias: LeafView, operand: int, eqn: Any) -> None:
        """Records that one leaf is added to the sums of another's neurons."""
        depths = [{depth for _, depth in view.scanned} for view in (neurons, bias)]
        is_in_all_loops = self._loops <= depths[0] & depths[1]
        where = self.site(eqn), operand, bias.layout, bias.scanned, is_in_all_loops
        self.biases.append(Bias(neurons.leaf, bias.leaf, *where))

    def shape(self, leaf: int) -> tuple[int, ...]:
        """The shape of a leaf."""
        return self.shapes[leaf]

    def einsum_call(self, eqn: Any) -> EinsumCall | None:
        """The call of `einsum` that an equation is one product of several of."""
        return self._einsum_calls.get(id(eqn))

    def site(self, eqn: Any) -> Site:
        """Where an equation stands."""
        where = self._trips, self._is_direct, self._is_certain
        return Site(self._path, eqn.primitive.name, (eqn.source_info, *self._sources), *where)

    # Jaxprs.

    def analyze(self, jaxpr: Any, ins: Sequence[Info]) -> None:
        """Records what happens to the leaves in an open jaxpr, given its constants and inputs."""
        for info in self.run(jaxpr, ins):
            self.needed |= {view.leaf for view in info.views}

    def run(self, jaxpr: Any, ins: Sequence[Info]) -> list[Info]:
        """What is known of the outputs of an open jaxpr, given its constants and inputs."""
        if not self._is_silent:
            return self._outputs(jaxpr, ins)
        key = self._path, tuple(ins)
        if key not in self._known:
            self._known[key] = self._outputs(jaxpr, ins)
        return self._known[key]

    def _outputs(self, jaxpr: Any, ins: Sequence[Info]) -> list[Info]:
        env = dict(zip(inputs_of(jaxpr), ins, strict=True))

        def read(var: Any) -> Info:
            return captured_info(var.val) if isinstance(var, core.Literal) else env[var]

        before = self._einsum_calls, self._path
        self._einsum_calls = einsum_calls(jaxpr)
        for i, eqn in enumerate(jaxpr.eqns):
            self._path = (*before[1], i)
            outs = self.checked(eqn, [read(var) for var in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        self._einsum_calls, self._path = before
        return [read(var) for var in jaxpr.outvars]

    def checked(self, eqn: Any, ins: Sequence[Info]) -> list[Info]:
        """The outputs of one equation. A leaf that ends here without a record is needed itself."""
        before = len(self.uses), len(self.notes)
        outs = self.equation(eqn, ins)
        if leaves := _intact(ins) - _intact(outs):
            recorded = {use.leaf for use in self.uses[before[0] :]}
            recorded |= {note.leaf for note in self.notes[before[1] :]}
            self.needed |= leaves - recorded
        return outs

    def equation(self, eqn: Any, ins: Sequence[Info]) -> list[Info]:
        """What is known of the outputs of one equation."""
        nested = {
            primitives.scan_p: self.scan,
            primitives.while_p: self.while_loop,
            primitives.cond_p: self.cond,
            "shard_map": self.shard_map,  # not exported
        }
        if method := nested.get(eqn.primitive, nested.get(eqn.primitive.name)):
            return method(eqn, ins)
        if rule := rule_of(eqn):
            return rule(self, eqn, ins)
        return self.call(eqn, ins) if inner_name(eqn) else unknown(self, eqn, ins)

    def call(self, eqn: Any, ins: Sequence[Info]) -> list[Info]:
        """Jit, remat, custom derivatives: the jaxpr runs once, on the operands."""
        jaxpr, consts = opened(eqn.params[inner_name(eqn)])
        is_direct = eqn.primitive in CALLS and not eqn.params.get("differentiated")
        with self.inside(eqn, is_direct=is_direct):
            outs = self.run(jaxpr, [*map(captured_info, consts), *ins])
        return outs if is_direct else list(map(unscalable, outs))

    def scan(self, eqn: Any, ins: Sequence[Info]) -> list[Info]:
        """The steps run over the first axes of what is scanned."""
        jaxpr, consts = opened(eqn.params["jaxpr"])
        steps = eqn.params["length"]
        # A scan of references says by number which operands they are.
        is_direct = not any(hasattr(effect, "input_index") for effect in eqn.effects)
        with self.inside(eqn, trips=steps, is_direct=is_direct), self.looping(steps):
            ins = self.loop_inputs(eqn, ins)
            outs = self.run(jaxpr, [*map(captured_info, consts), *ins])
        first, carried = scan_parts(eqn.params)
        carry = ins[first : first + carried]
        for info in outs[carried:]:
            for view in info.views:
                self.note(view.leaf, "unknown operation scan (stacked outputs)", eqn)
        after = self._joined(eqn, carry, outs[:carried])
        return [*after, *map(_opaque, outs[carried:])]

    def loop_inputs(self, eqn: Any, ins: Sequence[Info]) -> list[Info]:
        """What every step of a scan knows of its inputs."""
        num_consts, num_carry = scan_parts(eqn.params)
        consts, rest = list(ins[:num_consts]), ins[num_consts:]
        sliced = [self._sliced(info) for info in rest[num_carry:]]
        jaxpr, captured = opened(eqn.params["jaxpr"])
        before = [*map(captured_info, captured), *consts]

        def step(carry: list[Info]) -> list[Info]:
            return self.run(jaxpr, [*before, *carry, *sliced])[:num_carry]

        return [*consts, *self._fixpoint(eqn, list(rest[:num_carry]), step), *sliced]

    def _sliced(self, info: Info) -> Info:
        """What one step of a scan sees of an operand that the scan runs over."""
        views = []
        for view in info.views:
            axis = self.scanned_axis(view)
            scanned = view.scanned if axis is None else view.scanned | {(axis, self.depth)}
            is_intact = view.is_intact and (axis is not None or is_repeated(view.layout[0]))
            views.append(view.moved(view.layout[1:], scanned=scanned, is_intact=is_intact))
        constant = frozenset(axis - 1 for axis in info.constant if axis)
        partial = [one for p in info.partial if (one := p.moved(lambda x: x[1:])) is not None]
        return Info(tuple(views), (), info.sources, constant, tuple(partial))

    def scanned_axis(self, view: LeafView) -> int | None:
        """The axis of its leaf that the first axis of a value is; None if it is no whole axis."""
        atoms = view.layout[0].atoms
        whole = [layout.Atom(axis, 1, n) for axis, n in enumerate(self.shapes[view.leaf])]
        return atoms[0].axis if len(atoms) == 1 and atoms[0] in whole else None

    def _fixpoint(self, eqn: Any, carry: list[Info], step: Any) -> list[Info]:
        """What holds of the carried values before every step of a loop."""
        start = carry
        with self.silent():
            while True:
                after = [_join(a, b) for a, b in zip(carry, step(carry), strict=True)]
                if after == carry:
                    break
                carry = after
        self._joined(eqn, start, carry)
        return carry

    def _joined(self, eqn: Any, carry: Sequence[Info], after: Sequence[Info]) -> list[Info]:
        """What holds of carried values before and after; the rest of their views ends here."""
        joined = [_join(a, b) for a, b in zip(carry, after, strict=True)]
        for infos, common in zip(zip(carry, after, strict=True), joined, strict=True):
            for view in {view for info in infos for view in info.views} - {*common.views}:
                self.note(view.leaf, "unknown operation: changed by the steps of a loop", eqn)
        return joined

    def while_loop(self, eqn: Any, ins: Sequence[Info]) -> list[Info]:
        """As often as it runs, whatever the condition."""
        num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond, cond_consts = opened(eqn.params["cond_jaxpr"])
        body, body_consts = opened(eqn.params["body_jaxpr"])
        for_cond = [*map(captured_info, cond_consts), *ins[:num_cond]]
        for_body = [*map(captured_info, body_consts), *ins[num_cond : num_cond + num_body]]
        with self.inside(eqn, is_direct=False):
            carry = self._fixpoint(
                eqn, list(ins[num_cond + num_body :]), lambda x: self.run(body, [*for_body, *x])
            )
            after = self._joined(eqn, carry, self.run(body, [*for_body, *carry]))
        with self.inside(eqn, 1, is_direct=False):
            self.run(cond, [*for_cond, *carry])
        return list(map(unscalable, after))

    def cond(self, eqn: Any, ins: Sequence[Info]) -> list[Info]:
        """All branches; an output may be any of theirs."""
        which, *operands = ins
        outs = []
        for number, branch in enumerate(eqn.params["branches"]):
            jaxpr, consts = opened(branch)
            with self.inside(eqn, number, is_certain=False):
                outs.append(self.run(jaxpr, [*map(captured_info, consts), *operands]))
        return [_either(which, infos) for infos in zip(*outs, strict=True)]

    def shard_map(self, eqn: Any, ins: Sequence[Info]) -> list[Info]:
        """The jaxpr runs on every device, on its shards."""
        jaxpr, consts = opened(eqn.params["jaxpr"])
        local = []
        for info, var in zip(ins, inputs_of(jaxpr)[len(consts) :], strict=True):
            sizes = _shape(var)

            def to(before: Layout, sizes: Any = sizes) -> Layout:
                return tuple(map(layout.shard, before, sizes))

            local.append(move(self, eqn, info, to, info.constant))
        before, self.shapes = self.shapes, self._local_shapes(local)
        with self.inside(eqn, is_direct=False):
            outs = self.run(jaxpr, [*map(captured_info, consts), *local])
        self.shapes = before
        return list(map(_opaque, outs))

    def _local_shapes(self, infos: Sequence[Info]) -> list[tuple[int, ...]]:
        """The shapes of the leaves, of those that `infos` hold as one device has them."""
        shapes = list(self.shapes)
        for view in itertools.chain(*(info.views for info in infos)):
            sizes = list(shapes[view.leaf])
            for axis in layout.leaf_axes(view.layout):
                atoms = [a for a in layout.atoms_of(view.layout) if a.axis == axis]
                sizes[axis] = math.prod(atom.size for atom in atoms)
            shapes[view.leaf] = tuple(sizes)
        return shapes

    # Where the analysis is.

    @contextlib.contextmanager
    def inside(
        self,
        eqn: Any,
        number: int = 0,
        *,
        trips: int = 1,
        is_direct: bool = True,
        is_certain: bool = True,
    ) -> Iterator[None]:
        """Goes into one of the jaxprs of an equation.

        Marks what is recorded: how often it runs, whether `wrap` reaches it, and if at all.
        """
        before = self._path, self._sources, self._trips, self._is_direct, self._is_certain
        self._path = (*self._path, number)
        self._sources = (eqn.source_info, *self._sources)
        self._trips *= trips
        self._is_direct &= is_direct
        self._is_certain &= is_certain
        try:
            yield
        finally:
            self._path, self._sources, self._trips, self._is_direct, self._is_certain = before

    @contextlib.contextmanager
    def looping(self, steps: Any) -> Iterator[None]:
        """Marks biases that are recorded in a loop."""
        before = self._loops
        self._loops |= {self.depth} if is_long(steps) else set()
        try:
            yield
        finally:
            self._loops = before

    @property
    def depth(self) -> int:
        """How deep the jaxpr at hand is nested."""
        return len(self._path) // 2

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Records nothing."""
        before = self.uses, self.notes, self.biases, self.needed, self._is_silent
        self.uses, self.notes, self.biases, self.needed, self._is_silent = [], [], [], set(), True
        try:
            yield
        finally:
            self.uses, self.notes, self.biases, self.needed, self._is_silent = before


def _intact(infos: Sequence[Info]) -> set[int]:
    """The leaves of which values are rearrangements that still allow a scale on the output."""
    return {
        view.leaf for info in infos for view in info.views if view.is_intact and not view.changed
    }


def _join(a: Info, b: Info) -> Info:
    """What holds of a value that may be either of two."""
    return Info(
        tuple(view for view in a.views if view in b.views),
        tuple(view for view in a.sums if view in b.sums),
        a.sources | b.sources,
        a.constant & b.constant,
        united((*a.partial, *b.partial)),
    )


def _opaque(info: Info) -> Info:
    """A value that leaves a jaxpr in another form than it has inside."""
    return Info(sources=info.sources, partial=displaced([info]))


def _either(which: Info, infos: Sequence[Info]) -> Info:
    """What is known of the output of one of several branches."""
    views = dict.fromkeys(itertools.chain(*(info.views for info in infos)))
    is_indexed = which.is_activation
    return Info(
        tuple(
            t.moved(t.layout, is_indexed=t.is_indexed or is_indexed, is_intact=False) for t in views
        ),
        tuple(t for t in infos[0].sums if all(t in info.sums for info in infos)),
        which.sources | sources_of(infos),
        frozenset.intersection(*(info.constant for info in infos)),
        united(partial for info in infos for partial in info.partial),
    )
