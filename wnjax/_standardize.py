"""Computes a function while it makes the outputs of its neurons mean 0 and deviation 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wnjax._evaluate import Evaluation, Known, Scales, key_of
from wnjax._moments import Minibatch, Moments, moments
from wnjax._riding import lay_out, times
from wnjax._walk.layout import repeated
from wnjax._walk.sizes import is_long
from wnjax._walk.tracks import Info, Track
from wnjax._walk.walker import Walk


class Found(NamedTuple):
    """What is right for the neurons of a leaf on this minibatch; arrays of its gain's shape.

    Attributes:
      value: for a weight g/‖v‖, so that the standard deviation is what it should be; for a bias
        its new value.
      is_constant: where the standard deviation is at the level of rounding.
      is_finite: where the moments are finite.
    """

    value: jax.Array
    is_constant: jax.Array
    is_finite: jax.Array

    @property
    def is_kept(self) -> jax.Array:
        """Where the minibatch says nothing, so that the neuron keeps what it has."""
        return self.is_constant | ~self.is_finite


class Standardization(Evaluation):
    """Evaluates a jaxpr with v for some weights. What flows on is what will be computed."""

    def __init__(
        self,
        walk: Walk,
        jaxpr: Any,
        stds: Mapping[int, float],
        biases: Mapping[int, int],
        minibatch: Minibatch,
    ):
        """Takes the standard deviations to arrive at, and the biases, by weight."""
        super().__init__(walk, stds.keys(), jaxpr)
        self.stds, self.biases, self.minibatch = stds, biases, minibatch
        self.samples: dict[int, int] = {}  # behind the moments of a leaf
        self.loops: frozenset[int] = frozenset()  # depths of the scans around with several steps

    def results(self, ins: Iterable[Known], scales: Mapping[int, jax.Array]) -> dict[int, Found]:
        """What is right for every leaf."""
        infos, values = zip(*ins, strict=True)
        keyed = {(leaf, frozenset[Any]()): scale for leaf, scale in scales.items()}

        @jax.jit  # compiled as a whole, where that is not done around it
        def run(values: Sequence[Any], keyed: Scales) -> list[Any]:
            self.run(self.jaxpr, zip(infos, values, strict=True), keyed)
            return [*self.found.values()]

        found = run(values, keyed)
        return {leaf: one for (leaf, _), one in zip(self.found, found, strict=True)}

    def consume(
        self, eqn: Any, outs: Sequence[Info], ins: Sequence[Known], scale: jax.Array
    ) -> list[Known]:
        """A product with v, divided by its standard deviation."""
        (track,) = (track for info, _ in ins for track in self.tracks(info))
        ((info, output),) = self.bind(eqn, outs, ins)
        layout = info.sums[0].layout
        found = self.moments(output, layout, scale.shape, track.leaf)
        level = _rounding(output.dtype) * jnp.hypot(found.mean, found.std)
        is_constant = _is_finite(found) & (found.std <= level)
        new = self.stds[track.leaf] / jnp.where(is_constant, 1, found.std)
        is_finite = _is_finite(found) & jnp.isfinite(new)
        right = Found(new.astype(scale.dtype), is_constant, is_finite)
        self.found[key_of(track)] = right
        new = jnp.where(right.is_kept, scale, right.value)
        return [(info, times(output, lay_out(new, layout)))]

    def equation(self, eqn: Any, ins: Sequence[Known], scales: Scales) -> Sequence[Known]:
        """Takes away the mean where a bias is added."""
        if eqn.primitive.name in ("add", "add_any"):
            for (info, value), (other, _) in (ins, ins[::-1]):
                if (bias := self.bias_of(info, other)) is not None:
                    return [self.centered(eqn, ins, value, bias)]
        return super().equation(eqn, ins, scales)

    def bias_of(self, info: Info, other: Info) -> Track | None:
        """The bias that one operand of a sum is, of the neurons whose outputs are the other."""
        tracks = {track.leaf: track for track in other.tracks}
        for neurons in info.sums:
            track = tracks.get(self.biases.get(neurons.leaf, -1))
            if track and self.loops <= _depths(track) & _depths(neurons):
                return track
        return None

    def centered(self, eqn: Any, ins: Sequence[Known], value: jax.Array, bias: Track) -> Known:
        """The value minus its mean."""
        infos = self.walk.equation(eqn, [info for info, _ in ins])
        ((info, with_bias),) = self.bind(eqn, infos, ins)
        value = jnp.broadcast_to(value, eqn.outvars[0].aval.shape)
        axes = bias.layout or [repeated(1)] * value.ndim  # a number is added to all
        pairs = zip(axes, value.shape, strict=True)
        layout = tuple(axis if axis.size == size else repeated(size) for axis, size in pairs)
        scanned = {axis for axis, _ in bias.scanned}
        sizes = enumerate(self.walk.shapes[bias.leaf])
        shape = [1 if axis in scanned else size for axis, size in sizes]
        found = self.moments(value, layout, shape, bias.leaf)
        is_finite = _is_finite(found)
        self.found[key_of(bias)] = Found(-found.mean, jnp.zeros_like(is_finite), is_finite)
        centered = value.astype(found.mean.dtype) - lay_out(found.mean, layout)
        return info, jnp.where(lay_out(is_finite, layout), centered.astype(value.dtype), with_bias)

    def moments(self, value: jax.Array, layout: Any, shape: Sequence[int], leaf: int) -> Moments:
        """The moments of the neurons of a leaf."""
        found = moments(value, layout, shape, self.minibatch)
        self.samples[leaf] = found.samples
        return found

    def openers(self) -> dict[str, Callable[[Any, Sequence[Known], Scales], Sequence[Known]]]:
        """Nothing is differentiated here, so that nothing need be computed again."""
        return super().openers() | {"remat2": self.jit}

    def scan(self, eqn: Any, ins: Sequence[Known], scales: Scales) -> list[Known]:
        """As it is, one scan deeper."""
        before = self.loops
        if is_long(eqn.params["length"]):
            self.loops |= {self.walk.depth}
        try:
            return super().scan(eqn, ins, scales)
        finally:
            self.loops = before


def _depths(track: Track) -> frozenset[int]:
    """How deep the scans are nested that run over a leaf."""
    return frozenset(depth for _, depth in track.scanned)


def _is_finite(found: Moments) -> jax.Array:
    return jnp.isfinite(found.mean) & jnp.isfinite(found.std)


def _rounding(dtype: Any) -> float:
    """The standard deviation, relative to the root mean square, up to which it is but rounding."""
    return 8 * float(jnp.finfo(dtype).eps)
