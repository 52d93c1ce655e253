"""Tracing a user's function to a jaxpr, and saying in the user's words why that failed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from wnjax._analysis.jaxprs import inputs_of, opened
from wnjax._analysis.lines import line_of_error
from wnjax._leaves.trees import is_array


class Traced(NamedTuple):
    """A function as a jaxpr.

    Attributes:
      jaxpr: open, without dead code; its inputs are the consts and then the arrays.
      consts: the arrays that the function closes over.
      arrays: those among the leaves of the arguments.
      places: for every leaf of the arguments its place among the arrays, None if it is static.
      rebuild: from the values of the jaxpr's outputs to what the function returns.
      memo: what was found out about the jaxpr.
    """

    jaxpr: Any
    consts: Sequence[Any]
    arrays: Sequence[Any]
    places: Sequence[int | None]
    rebuild: Callable[[Sequence[Any]], Any]
    memo: dict[Any, Any]


class Tracer:
    """Traces a function abstractly, once for all arguments with the same shapes.

    What is no array among the arguments is static. JAX keeps the jaxprs, as those of `jit`.
    """

    def __init__(self, fn: Callable[..., Any]):
        self._fn = fn
        self._flat = functools.lru_cache(maxsize=64)(self._new_flat)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Traced:
        """Traces `fn(*args, **kwargs)`.

        Raises:
          ValueError: if `fn` needs values of the data, or an axis name that nothing binds.
        """
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if is_array(leaf)]
        # By type and text as well: 1 is True, and 0.0 is -0.0.
        static = tuple(
            None if is_array(leaf) else (leaf, type(leaf), isinstance(leaf, float) and str(leaf))
            for leaf in leaves
        )
        try:
            flat = self._flat(treedef, static)
        except TypeError:  # not hashable
            flat = self._new_flat(treedef, static)
        return flat.trace(arrays)

    def _new_flat(self, treedef: Any, static: Sequence[Any]) -> _Flat:
        return _Flat(self._fn, treedef, static)


class _Flat:
    """A function of the arrays among its arguments alone."""

    def __init__(self, fn: Callable[..., Any], treedef: Any, static: Sequence[Any]):
        self.fn, self.treedef, self.static = fn, treedef, static
        indices = itertools.count()
        self.places = [next(indices) if one is None else None for one in static]
        self.out: Any = None  # of the last trace: the structure of the output, its static leaves
        self.jaxprs: dict[int, Any] = {}  # by identity of what JAX traced

    def __call__(self, *arrays: Any) -> list[Any]:
        leaves = [
            one[0] if place is None else arrays[place]
            for one, place in zip(self.static, self.places, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(self.treedef, leaves)
        out_leaves, out_tree = jax.tree.flatten(self.fn(*args, **kwargs))
        is_dynamic = [core.valid_jaxtype(leaf) for leaf in out_leaves]
        static = [None if d else x for d, x in zip(is_dynamic, out_leaves, strict=True)]
        self.out = out_tree, static
        return [leaf for d, leaf in zip(is_dynamic, out_leaves, strict=True) if d]

    def trace(self, arrays: Sequence[Any]) -> Traced:
        """The jaxpr for arrays of these shapes."""
        jaxpr, consts = opened(_make_jaxpr(self, arrays))
        if id(jaxpr) not in self.jaxprs:
            self.jaxprs[id(jaxpr)] = jaxpr, _without_dead_code(jaxpr), self.out, {}
        _, live, (out_tree, static), memo = self.jaxprs[id(jaxpr)]

        def rebuild(values: Sequence[Any]) -> Any:
            remaining = iter(values)
            return out_tree.unflatten(next(remaining) if x is None else x for x in static)

        return Traced(live, consts, arrays, self.places, rebuild, memo)


def _without_dead_code(jaxpr: Any) -> Any:
    jaxpr = jaxpr.replace(constvars=[], invars=inputs_of(jaxpr))
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return live


def _make_jaxpr(flat: Callable[..., Any], arrays: Sequence[Any]) -> Any:
    try:
        return jax.make_jaxpr(flat)(*arrays)
    except (jax.errors.ConcretizationTypeError, jax.errors.NonConcreteBooleanIndexError) as error:
        raise ValueError(
            f"fn needs the value of an array at {line_of_error(error)}, but it is traced without "
            "values. Where that is an option such as train=True, pass it as a Python value or by "
            "functools.partial; where it is data, use jnp.where or jax.lax.cond"
        ) from error
    except (
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise ValueError(
            f"fn needs the value of an array at {line_of_error(error)}, but it is traced without "
            "values. Use jax.numpy instead of numpy there, and Python numbers for sizes"
        ) from error
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        name = str(error).split("unbound axis name:")[-1].split(".")[0].strip()
        raise ValueError(
            f"fn uses the axis name {name!r} at {line_of_error(error)}, and nothing binds it here. "
            "Pass the function of one device without its collectives (such as "
            f"BatchNorm(axis_name=None)), or bind the name: jax.vmap(fn, axis_name={name!r}, ...)"
        ) from error
