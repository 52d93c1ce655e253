"""What happens to each leaf of the parameters in a function: traced and analyzed once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from wnjax._analysis.jaxprs import JaxprAnalyzer, captured_info, leaf_info
from wnjax._analysis.plain_weights import plain_weights
from wnjax._analysis.trace import Traced, Tracer
from wnjax._analysis.views import ACTIVATION, DATA, Info
from wnjax._axes.decisions import beside_parameters
from wnjax._leaves.gv import GVLeaf, weight
from wnjax._leaves.trees import (
    flatten,
    fold_leaf,
    is_array,
    map_leaves,
    outer_box,
    rebox,
    unbox,
    unbox_gv,
)


class Analysis(NamedTuple):
    """A traced function, and what was found in it.

    Attributes:
      traced: the function.
      infos: what is known of its constants and inputs.
      records: what happens to each leaf of the parameters.
      plain: the parameters, with shapes and dtypes of weights in the place of (g, v) leaves.
      paths: of the leaves of `plain`.
      arrays: the leaves, without boxes.
    """

    traced: Traced
    infos: list[Info]
    records: JaxprAnalyzer
    plain: Any
    paths: list[str]
    arrays: list[Any]

    def type_of(self, leaf: int) -> Any:
        """The type of a leaf in the jaxpr: of the weight, in the place of a (g, v) leaf."""
        before = len(self.traced.consts) + sum(map(is_array, self.arrays[:leaf]))
        return self.traced.jaxpr.invars[before].aval

    def inputs(self, params: Any, /, *args: Any, **kwargs: Any) -> list[Any]:
        """The inputs of the jaxpr, for `params` of the structure of `plain`."""
        arrays = [x for x in jax.tree.leaves(((params, *args), kwargs)) if is_array(x)]
        return [*self.traced.consts, *arrays]


class Analyzer:
    """Analyzes a function of plain weights, once for all arguments with the same shapes."""

    def __init__(self, fn: Callable[..., Any]):
        self._tracer = Tracer(fn)

    def __call__(self, params: Any, /, *args: Any, **kwargs: Any) -> Analysis:
        """Traces `fn(params, *args, **kwargs)`, with weights in the place of (g, v) leaves.

        Raises:
          ValueError: if `fn` needs values of the data, or uses axis names that nothing binds.
        """
        plain = _fold_abstractly(params)
        with plain_weights():
            traced = self._tracer(plain, *args, **kwargs)
        leaves = flatten(plain)[0]
        paths, arrays = [path for path, _ in leaves], [unbox(leaf) for _, leaf in leaves]
        if "analyzed" not in traced.memo:
            infos = _input_infos(traced, arrays, plain)
            records = JaxprAnalyzer([getattr(array, "shape", ()) for array in arrays])
            records.analyze(traced.jaxpr, infos)
            traced.memo["analyzed"] = infos, records
        infos, records = traced.memo["analyzed"]
        return Analysis(traced, infos, records, plain, paths, arrays)


def _fold_abstractly(params: Any) -> Any:
    """`params` with shapes and dtypes alone in the place of (g, v) leaves."""

    def shape_of(path: str, leaf: Any) -> Any:
        gv = unbox_gv(leaf)
        if gv is None:
            return rebox(leaf, unbox(leaf))
        if any(isinstance(array, jax.ShapeDtypeStruct) for array in gv):
            return fold_leaf(path, leaf)
        kind: Any = type(gv)
        try:
            return rebox(outer_box(leaf), _folded(kind, *map(jax.typeof, gv)))
        except ValueError as error:
            raise ValueError(f"{path or 'the gv'}: {error}") from error

    return map_leaves(shape_of, params)


@functools.lru_cache(maxsize=256)
def _folded(kind: Callable[..., GVLeaf], *types: Any) -> Any:
    return jax.eval_shape(lambda *arrays: weight(kind(*arrays)), *types)


def _input_infos(traced: Traced, arrays: Sequence[Any], plain: Any) -> list[Info]:
    """What is known of the inputs of a traced function, whose first argument is `plain`."""
    infos = [*map(captured_info, traced.consts)]
    leaves = flatten(plain)[0]
    owners = [i for i, (_, box) in enumerate(leaves) for _ in jax.tree.leaves(box)]
    others = beside_parameters(leaves)  # data, as they are where they come as another argument
    for place, leaf in enumerate(traced.places):
        if leaf is None:
            continue
        owner = owners[place] if place < len(owners) else None
        known = owner is not None and owner not in others and is_array(arrays[owner])
        infos.append(
            leaf_info(owner, arrays[owner].shape)
            if known and owner is not None
            else Info(sources=ACTIVATION | DATA)
        )
    return infos
