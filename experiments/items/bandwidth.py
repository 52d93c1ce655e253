"""How fast w, and the derivatives of (g, v), are made of large arrays in a device's memory.

Nothing is computed that would take longer than moving the arrays, so that the measure is the share
of the bandwidth that the device reaches when it copies an array as large as v. The bytes that count
are the fewest that can be moved: every argument is read once, and every result is written once.
An implementation that reads v once for the norms and again for the products can reach 2/3 of the
copy's bandwidth forward, and 3/5 backward, where v and the gradient of w are both read twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

import wnjax
from experiments import items
from experiments.stopwatch import Program, time_all

DTYPES = "float32", "bfloat16"
SECONDS = 8.0  # of the rounds of one dtype, at most
HEADERS = ("", "ms", "minimum GB", "GB/s", "share of copy", "quartiles", "XLA's GB")


class Bandwidth(NamedTuple):
    """Square arrays v, whose norms run over the first axis, as those of a dense layer do."""

    size: int = 8192
    rehearsal: int = 64


class _Pass(NamedTuple):
    program: Program
    minimum_bytes: int
    bytes_accessed: float | None  # as XLA counts them


def measure(what: Bandwidth, options: items.Options) -> dict[str, Any]:
    """Times for every dtype, of what fits into the seconds."""
    end, longest = time.monotonic() + options.seconds, 0.0  # of compiling for one dtype
    arrays: list[dict[str, Any]] = []
    for number, dtype in enumerate(DTYPES):
        start = time.monotonic()
        if arrays and end - start < longest:
            break
        size = what.rehearsal if options.rehearsal else what.size
        passes = _passes(size, dtype)
        now = time.monotonic()
        longest = max(longest, now - start)
        others = len(DTYPES) - number - 1
        share = (end - now - others * longest) / (others + 1)  # the others compile, too
        seconds = 0.0 if options.rehearsal else min(SECONDS, share)
        arrays.append({"size": size, "dtype": dtype, "passes": _measure(passes, seconds)})
    return {"arrays": arrays, "left_out": list(DTYPES[len(arrays) :])}


def table(result: dict[str, Any]) -> str:
    """One table for each dtype."""
    return "\n\n".join(map(_table, result["arrays"]))


def _table(array: dict[str, Any]) -> str:
    rows = []
    for name, one in array["passes"].items():
        low, median, high = one["share_of_copy"]
        seconds, counted = float(np.median(one["seconds"])), one["bytes_accessed"]
        rows.append(
            (
                name,
                f"{1000 * seconds:.3f}",
                f"{one['minimum_bytes'] / 1e9:.3f}",
                f"{one['minimum_bytes'] / seconds / 1e9:.0f}",
                f"{median:.2f}",
                f"{low:.2f} to {high:.2f}",
                "-" if counted is None else f"{counted / 1e9:.3f}",
            )
        )
    align = ("left", *["right"] * (len(HEADERS) - 1))
    text = tabulate(rows, HEADERS, colalign=align, disable_numparse=True)
    rounds = len(array["passes"]["copy"]["seconds"])
    return f"v of {array['size']} x {array['size']}, {array['dtype']} ({rounds} rounds)\n{text}"


def _measure(passes: Mapping[str, _Pass], seconds: float) -> dict[str, Any]:
    times = time_all({name: one.program for name, one in passes.items()}, seconds, None)
    speeds = {name: one.minimum_bytes / np.array(times[name]) for name, one in passes.items()}
    return {
        name: {
            "seconds": times[name],
            "minimum_bytes": one.minimum_bytes,
            "bytes_accessed": one.bytes_accessed,
            "share_of_copy": np.quantile(speeds[name] / speeds["copy"], (0.25, 0.5, 0.75)).tolist(),
        }
        for name, one in passes.items()
    }


def _passes(size: int, dtype: str) -> dict[str, _Pass]:
    # Random numbers, since a device may move zeros at another speed.
    keys = jax.random.split(jax.random.key(0))
    v, gradient = (jax.random.normal(key, (size, size), dtype) for key in keys)
    gv = wnjax.WeightNorm(jnp.ones((1, size), jnp.float32), v)
    return {
        "copy": _compile(jnp.copy, v),
        "fold": _compile(wnjax.fold, gv),
        "vjp of fold": _compile(gradients, gv, gradient),
    }


def gradients(gv: wnjax.WeightNorm, gradient: jax.Array) -> Any:
    """The gradients of g and v, given that of w. Nothing is kept of the forward pass."""
    _, pull_back = jax.vjp(wnjax.fold, gv)
    return pull_back(gradient)


def _compile(function: Callable[..., Any], *arguments: Any) -> _Pass:
    compiled = jax.jit(function).lower(*arguments).compile()
    results = jax.eval_shape(function, *arguments)
    arrays = jax.tree.leaves((arguments, results))
    cost: Any = compiled.cost_analysis() or {}
    minimum = sum(array.size * array.dtype.itemsize for array in arrays)
    return _Pass(partial(_call, compiled, arguments), minimum, cost.get("bytes accessed"))


def _call(compiled: Any, arguments: Any, times: int) -> float:
    for _ in range(times):
        results = compiled(*arguments)
    jax.block_until_ready(results)
    return 0.0
