"""Computes a jaxpr with v in the place of w, and the scales g/‖v‖ on the outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from wnjax._matrix import matrix_product
from wnjax._riding import after, is_alone, lay_out, times
from wnjax._walk.sums import RULES as CONSUMERS
from wnjax._walk.tracks import Info, Track
from wnjax._walk.walker import (
    RULES,
    Walk,
    captured_info,
    inner_jaxpr,
    inputs_of,
    opened,
    scan_parts,
)

Key: TypeAlias = tuple[int, frozenset[tuple[int, int]]]  # a leaf, and the scans that run over it
Scales: TypeAlias = Mapping[Key, jax.Array]
Known: TypeAlias = tuple[Info, Any]  # what is known of a value, and the value


def evaluate(
    jaxpr: Any,
    ins: Iterable[Known],
    shapes: Sequence[tuple[int, ...]],
    scales: Mapping[int, jax.Array],
) -> list[Any]:
    """The outputs of an open jaxpr for w, given its constants and inputs with v for some leaves.

    Args:
      jaxpr: the jaxpr.
      ins: what is known of its constants and inputs, and their values.
      shapes: the shapes of all leaves.
      scales: g/‖v‖, of g's shape, of the leaves for which the values are v.
    """
    evaluation = Evaluation(Walk(shapes), scales.keys(), jaxpr)
    keyed: Scales = {(leaf, frozenset()): scale for leaf, scale in scales.items()}
    outs = evaluation.run(jaxpr, ins, keyed)
    return [value for _, value in evaluation.scaled(outs, keyed)]


class Evaluation:
    """Computes jaxprs of which some inputs are v instead of w, as if they were w.

    The walk says where such a value is. Its scale goes on the output of the equation that sums
    over it, or on the value itself before anything but a rearrangement happens to it.

    Attributes:
      found: what a subclass learns of leaves on the way: arrays of a leaf's rank, of which a
        scan over the leaf makes one again.
    """

    def __init__(self, walk: Walk, riding: Collection[int], jaxpr: Any):
        self.walk, self.riding, self.jaxpr = walk, riding, jaxpr
        self.found: dict[Key, Any] = {}

    def run(self, jaxpr: Any, ins: Iterable[Known], scales: Scales) -> list[Known]:
        """The outputs of an open jaxpr, given its constants and inputs; v may be among them."""
        env = dict(zip(inputs_of(jaxpr), ins, strict=True))

        def read(var: Any) -> Known:
            return (Info(), var.val) if isinstance(var, core.Literal) else env[var]

        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [read(var) for var in eqn.invars], scales)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def equation(self, eqn: Any, ins: Sequence[Known], scales: Scales) -> Sequence[Known]:
        """The outputs of one equation."""
        riding = [track for info, _ in ins for track in self.tracks(info)]
        outs = self.walk.equation(eqn, [info for info, _ in ins])
        if not riding:
            return self.bind(eqn, outs, ins)
        if opened_by := self.openers().get(eqn.primitive.name):
            return opened_by(eqn, ins, scales)
        if eqn.primitive.name in CONSUMERS and len(riding) == len(outs[0].sums) == 1:
            return self.consume(eqn, outs, ins, scales[key_of(riding[0])])
        continues = all(any(_continues(track, out) for out in outs) for track in riding)
        if eqn.primitive.name in RULES and continues:
            return self.bind(eqn, outs, ins)
        ins = self.scaled(ins, scales)
        return self.bind(eqn, self.walk.equation(eqn, [info for info, _ in ins]), ins)

    def consume(
        self, eqn: Any, outs: Sequence[Info], ins: Sequence[Known], scale: jax.Array
    ) -> list[Known]:
        """A product with v, and the scale on its output."""
        side = 0 if self.tracks(ins[0][0]) else 1
        values = [value for _, value in ins]
        output = None
        if is_alone():
            values[1 - side], scale = after(values[1 - side], scale)
            output = matrix_product(eqn, values, side)
        if output is None:
            ((_, output),) = self.bind(eqn, outs, [(Info(), value) for value in values])
        return [(outs[0], times(output, lay_out(scale, outs[0].sums[0].layout)))]

    def openers(self) -> dict[str, Callable[[Any, Sequence[Known], Scales], Sequence[Known]]]:
        """By primitive: how to compute it with v among its operands."""
        jits = dict.fromkeys(("jit", "closed_call"), self.jit)
        return {**jits, "remat2": self.remat, "cond": self.cond, "scan": self.scan}

    def bind(self, eqn: Any, infos: Sequence[Info], ins: Sequence[Known]) -> list[Known]:
        """Computes an equation as it stands."""
        args = {
            var: value
            for var, (_, value) in zip(eqn.invars, ins, strict=True)
            if not isinstance(var, core.Literal)
        }
        outvars = [var for var in eqn.outvars if not isinstance(var, core.DropVar)]
        one = self.jaxpr.replace(
            constvars=[], invars=list(args), outvars=outvars, eqns=[eqn], effects=eqn.effects
        )
        values = iter(core.jaxpr_as_fun(core.ClosedJaxpr(one, ()))(*args.values()))
        return [
            (info, None if isinstance(var, core.DropVar) else next(values))
            for info, var in zip(infos, eqn.outvars, strict=True)
        ]

    def tracks(self, info: Info) -> list[Track]:
        """The leaves of which a value is a rearrangement of v instead of w."""
        return [track for track in info.tracks if track.leaf in self.riding]

    def scaled(self, ins: Iterable[Known], scales: Scales) -> list[Known]:
        """The values with w in the place of v."""
        result = []
        for info, value in ins:
            w = value
            for track in self.tracks(info):
                w = times(w, lay_out(scales[key_of(track)], track.layout))
            result.append((dataclasses.replace(info, tracks=()), w))
        return result

    # Equations with a jaxpr inside.

    def jit(self, eqn: Any, ins: Sequence[Known], scales: Scales) -> list[Known]:
        """In line: what is around it is compiled as well."""
        jaxpr, consts = opened(inner_jaxpr(eqn))
        return self.run(jaxpr, [*_captured(consts), *ins], scales)

    def remat(self, eqn: Any, ins: Sequence[Known], scales: Scales) -> list[Known]:
        """Computed again in the backward pass, as before."""
        body = _Closed(self, inner_jaxpr(eqn), [info for info, _ in ins], scales)
        again = jax.checkpoint(
            body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
        )
        return body.known(again([value for _, value in ins]))

    def cond(self, eqn: Any, ins: Sequence[Known], scales: Scales) -> list[Known]:
        """Every branch with its own operands."""
        (_, index), *operands = ins
        infos = [info for info, _ in operands]
        branches = [_Closed(self, branch, infos, scales) for branch in eqn.params["branches"]]
        values = jax.lax.switch(index, branches, [value for _, value in operands])
        outs = self.walk.equation(eqn, [info for info, _ in ins])
        return [(dataclasses.replace(o, tracks=()), x) for o, x in zip(outs, values, strict=True)]

    def scan(self, eqn: Any, ins: Sequence[Known], scales: Scales) -> list[Known]:
        """The scales of stacked weights are scanned beside them."""
        num_consts, num_carry = scan_parts(eqn)
        first_x = num_consts + num_carry
        infos = self.walk.loop_inputs(eqn, [info for info, _ in ins])
        constant, stacked = self.sliced(ins[first_x:], scales)
        jaxpr, captured = opened(eqn.params["jaxpr"])
        values = [
            pair[1] if self.tracks(info) else self.scaled([pair], scales)[0][1]
            for pair, info in zip(ins, infos, strict=True)
        ]

        before, keys = self.found, list[Key]()

        def body(carry: list[Any], slices: Any) -> tuple[list[Any], Any]:
            xs, factors = slices
            inner = constant | {
                key: jnp.expand_dims(factor, axis)
                for (key, axis), factor in zip(stacked, factors, strict=True)
            }
            known = zip(infos, [*values[:num_consts], *carry, *xs], strict=True)
            self.found = {}
            with self.walk.inside():
                outs = self.run(jaxpr, [*_captured(captured), *known], inner)
            keys[:] = self.found
            kept = [bool(self.tracks(info)) for info in infos[num_consts:first_x]]
            final = [
                out[1] if keep else self.scaled([out], inner)[0][1]
                for keep, out in zip(kept + [False] * (len(outs) - num_carry), outs, strict=True)
            ]
            return final[:num_carry], (final[num_carry:], [*self.found.values()])

        xs = (values[first_x:], list(stacked.values()))
        has_length = bool(jax.tree.leaves(xs))  # JAX takes a symbolic length from arrays alone
        carry, (ys, found) = jax.lax.scan(
            body,
            values[num_consts:first_x],
            xs,
            length=None if has_length else eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        self.found = before | dict(map(self.stacked, keys, found))
        outs = self.walk.equation(eqn, [info for info, _ in ins])
        return self.scaled(zip(outs, [*carry, *ys], strict=True), scales)

    def stacked(self, key: Key, found: Any) -> tuple[Key, Any]:
        """What every step of a scan found, along the axis of the leaf that the scan runs over.

        Where it runs over no axis of the leaf, there is but one step.
        """
        leaf, scanned = key
        here = [(axis, depth) for axis, depth in scanned if depth == self.walk.depth]
        if not here:
            return key, jax.tree.map(lambda x: x.squeeze(0), found)
        ((axis, _),) = here
        one = jax.tree.map(lambda x: jnp.moveaxis(x.squeeze(axis + 1), 0, axis), found)
        return (leaf, scanned.difference(here)), one

    def sliced(
        self, xs: Sequence[Known], scales: Scales
    ) -> tuple[dict[Key, jax.Array], dict[tuple[Key, int], jax.Array]]:
        """The scales inside of a scan: those that stay the same, and those that run with it."""
        constant, stacked = dict(scales), {}
        for info, _ in xs:
            for track in self.tracks(info):
                axis = self.walk.scanned_axis(track)
                if axis is None:
                    continue
                key = (track.leaf, track.scanned | {(axis, self.walk.depth)})
                scale = scales[key_of(track)]
                if scale.shape[axis] == 1:
                    constant[key] = scale
                else:
                    stacked[key, axis] = jnp.moveaxis(scale, axis, 0)
        return constant, stacked


class _Closed:
    """A jaxpr as a function of values alone, for JAX to transform."""

    def __init__(self, evaluation: Evaluation, jaxpr: Any, infos: Sequence[Info], scales: Scales):
        self.evaluation, self.infos, self.scales = evaluation, infos, scales
        self.jaxpr, self.consts = opened(jaxpr)
        self.outs: list[Info] = []  # what is known of the outputs, once it has run

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        known = [*_captured(self.consts), *zip(self.infos, values, strict=True)]
        outs = self.evaluation.run(self.jaxpr, known, self.scales)
        outs = self.evaluation.scaled(outs, self.scales)
        self.outs = [info for info, _ in outs]
        return [value for _, value in outs]

    def known(self, values: Sequence[Any]) -> list[Known]:
        """The outputs, with what is known of them."""
        return list(zip(self.outs, values, strict=True))


def _captured(consts: Sequence[Any]) -> list[Known]:
    return [(captured_info(value), value) for value in consts]


def key_of(track: Track) -> Key:
    return track.leaf, track.scanned


def _continues(track: Track, out: Info) -> bool:
    """Whether a value is still a rearrangement of the leaf, or a multiple of one."""
    return any(
        t.leaf == track.leaf and t.is_intact and t.changed is None and not t.is_indexed
        for t in out.tracks
    )
