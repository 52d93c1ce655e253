"""The program that makes the outputs of neurons mean 0 and deviation 1, and tells what does so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wnjax._analysis.functions import Analysis
from wnjax._analysis.views import Bias, Use
from wnjax._rewriting.rewrite import Edit, Key, Path, Values, rewrite
from wnjax._rewriting.scaling import lay_out, times
from wnjax._transforms.moments import Minibatch, Moments, count, moments


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


class Standardization:
    """The changes of a program that standardize the outputs of some weights.

    Attributes:
      edits: what is put around contractions, and around additions of biases.
      samples: by leaf: how many numbers are behind each of its moments.
    """

    def __init__(
        self,
        analysis: Analysis,
        stds: Mapping[int, float],
        biases: Mapping[int, int],
        minibatch: Minibatch,
    ):
        """Takes the standard deviations to arrive at, and the biases, by weight."""
        self.analysis, self.stds, self.minibatch = analysis, stds, minibatch
        self.edits: dict[Path, Edit] = {}
        self.samples: dict[int, int] = {}
        for use in analysis.records.uses:
            if use.leaf in stds:
                self._edit(use, use.leaf, self._standardized(use), [_key("scale", use.leaf, use)])
        for record in analysis.records.biases:
            if biases.get(record.weight) == record.bias and record.is_in_reach:
                self._edit(record, record.bias, self._centered(record), [])

    def found(self, inputs: Sequence[Any], scales: Mapping[int, jax.Array]) -> dict[int, Found]:
        """What is right for every leaf, given the inputs with v for the weights, and g/‖v‖."""
        arrays = {Key("scale", leaf): scale for leaf, scale in scales.items()}
        if self.minibatch.mask is not None:
            arrays[Key("mask")] = self.minibatch.mask
        avals = {key: jax.typeof(array) for key, array in arrays.items()}
        program = rewrite(self.analysis.traced.jaxpr, self.edits, avals)
        # Compiled as a whole, where that is not done around it.
        _, given = jax.jit(program.__call__)(inputs, arrays)
        leaves = dict.fromkeys(key.leaf for key in given)
        return {leaf: Found(*(given[Key(name, leaf)] for name in Found._fields)) for leaf in leaves}

    def _edit(self, at: Use | Bias, leaf: int, behind: Values, takes: Sequence[Key]) -> None:
        mask = [] if self.minibatch.mask is None else [Key("mask")]
        gives = tuple(_key(name, leaf, at) for name in Found._fields)
        self.edits[at.site.path] = Edit((*takes, *mask), behind, gives)
        shape = self.analysis.records.shapes[leaf]
        self.samples[leaf] = count(at.layout, shape, self.minibatch.axis_name)

    def _standardized(self, use: Use) -> Values:
        """The output divided by its standard deviation."""

        def behind(_: Any, __: Any, output: jax.Array, scale: jax.Array, *mask: jax.Array) -> Any:
            found = self._moments(output, use, scale.shape, *mask)
            level = _rounding(output.dtype) * jnp.hypot(found.mean, found.std)
            is_constant = _is_finite(found) & (found.std <= level)
            new = self.stds[use.leaf] / jnp.where(is_constant, 1, found.std)
            is_finite = _is_finite(found) & jnp.isfinite(new)
            right = Found(new.astype(scale.dtype), is_constant, is_finite)
            new = jnp.where(right.is_kept, scale, right.value)
            return [times(output, lay_out(new, use.layout)), *right]

        return behind

    def _centered(self, record: Bias) -> Values:
        """The output without its mean, in the place of the one with the bias."""
        scanned = {axis for axis, _ in record.scanned}
        sizes = enumerate(self.analysis.records.shapes[record.bias])
        shape = [1 if axis in scanned else size for axis, size in sizes]

        def behind(*values: jax.Array) -> Any:
            *operands, with_bias = values[:3]
            value = jnp.broadcast_to(operands[1 - record.operand], with_bias.shape)
            found = self._moments(value, record, shape, *values[3:])
            is_finite = _is_finite(found)
            centered = value.astype(found.mean.dtype) - lay_out(found.mean, record.layout)
            output = jnp.where(
                lay_out(is_finite, record.layout), centered.astype(with_bias.dtype), with_bias
            )
            return [output, *Found(-found.mean, jnp.zeros_like(is_finite), is_finite)]

        return behind

    def _moments(
        self, value: jax.Array, at: Use | Bias, shape: Sequence[int], *mask: jax.Array
    ) -> Moments:
        minibatch = self.minibatch._replace(mask=mask[0] if mask else None)
        return moments(value, at.layout, shape, minibatch)


def _key(name: str, leaf: int, at: Use | Bias) -> Key:
    return Key(name, leaf, at.scanned)


def _is_finite(found: Moments) -> jax.Array:
    return jnp.isfinite(found.mean) & jnp.isfinite(found.std)


def _rounding(dtype: Any) -> float:
    """The standard deviation, relative to the root mean square, up to which it is but rounding."""
    return 8 * float(jnp.finfo(dtype).eps)
