"""What weight normalization costs on an accelerator: training steps, and moving w through memory.

Every implementation trains the same network on the same batch, in one process and in turn, as in
`experiments.overhead`. Batches count images, or sequences of tokens. Networks in float32 multiply
with JAX's default precision, which on a recent GPU is that of TF32.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from experiments import items
from experiments.items import bandwidth
from experiments.items.bandwidth import Bandwidth
from experiments.logs import log
from experiments.networks.classifiers import MLP, ConvPoolCNN
from experiments.networks.resnet import ResNet
from experiments.networks.transformer import Transformer
from experiments.peers import IMPLEMENTATIONS
from experiments.problems import Network, images, sequences
from experiments.stopwatch import (
    Cell,
    Compiled,
    Measurement,
    compile_side_by_side,
    first_line,
    ratios,
    time_all,
)

ROUND_SECONDS = 15.0  # of the rounds of one batch size, at most
LEAST_SECONDS = 3.0  # of the same, also where time is short
HEADERS = ("", "step time", "quartiles", "ms a step", "bytes", "memory")

ALL = (
    "plain",
    "wnjax-wrap",
    "wnjax-fold",
    "wnjax-optimizer",
    "linen",
    "naive",
    "batch-norm",
    "layer-norm",
)


class Steps(NamedTuple):
    """Training steps of a network.

    Attributes:
      network: what is trained, and at which batch sizes.
      rehearsal: a small network of the same kind.
      implementations: what is compared.
    """

    network: Network
    rehearsal: Network
    implementations: tuple[str, ...] = ALL


# The order of gradients matters only where a scale lies on an output, as in the MLP and the
# transformer at small batches. In the other networks nearly every output is larger than its weight.
WITH_UNORDERED = (*ALL, "wnjax-wrap-unordered")
# GPT-2 uses its embedding table as its head. This decoder has a head of its own, because Linen's
# WeightNorm cannot wrap the table. So it has 163 million parameters instead of 124.
GPT2 = Transformer(
    layers=12,
    width=768,
    heads=12,
    hidden=3072,
    vocabulary=50257,
    length=1024,
    dtype=jnp.bfloat16,
)
SMALL = Transformer(layers=1, width=8, heads=2, hidden=16, vocabulary=11, length=6)

CELLS: Mapping[str, Steps | Bandwidth] = {
    "cost_mlp": Steps(
        Network(MLP(), images(784), (64, 512, 4096)),
        Network(MLP((8,)), images(12), (2, 4)),
        WITH_UNORDERED,
    ),
    "cost_transformer": Steps(
        Network(Transformer(), sequences(64, 256), (8, 64)),
        Network(SMALL, sequences(6, 11), (2,)),
        WITH_UNORDERED,
    ),
    "cost_convpool": Steps(
        Network(ConvPoolCNN(dropout=0.0, noise=0.0), images(32, 32, 3), (100,)),
        Network(ConvPoolCNN((4, 6, 6), dropout=0.0, noise=0.0), images(16, 16, 3), (2,)),
    ),
    "cost_resnet50": Steps(
        Network(ResNet(dtype=jnp.bfloat16), images(224, 224, 3, classes=1000), (128,)),
        Network(ResNet((1,), 4, 10, dtype=jnp.bfloat16), images(16, 16, 3), (2,)),
    ),
    "cost_gpt2": Steps(
        Network(GPT2, sequences(1024, 50257), (8,)),
        Network(SMALL.clone(dtype=jnp.bfloat16), sequences(6, 11), (2,)),
    ),
    "cost_bandwidth": Bandwidth(),
}


def run(name: str, options: items.Options) -> dict[str, Any]:
    """Measures one of `CELLS`.

    The first batch size is measured in any case, in a few rounds at least; batch sizes for which
    no time remains are left out.
    """
    what, settings = CELLS[name], cast(Any, jax.config)
    with _quick_compilation() if options.rehearsal else contextlib.nullcontext():
        if isinstance(what, Bandwidth):
            measured = bandwidth.measure(what, options)
        else:
            measured = _measure_sizes(name, what, options)
    return {"matmul_precision": settings.jax_default_matmul_precision, **measured}


@contextlib.contextmanager
def _quick_compilation() -> Iterator[None]:
    """Compiles without most optimizations: a rehearsal shows that everything runs, not how fast."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def table(result: dict[str, Any]) -> str:
    """What was measured, a table for every batch size or dtype."""
    if "arrays" in result:
        text = bandwidth.table(result)
    else:
        text = "\n\n".join(map(_table, result["cells"]))
    if result["left_out"]:
        text += f"\nleft out, for want of time: {', '.join(map(str, result['left_out']))}"
    return text


def _table(cell: dict[str, Any]) -> str:
    measured = cell["measurements"]
    rows = [(name, *_texts(one)) for name, one in measured.items()]
    align = ("left", *["right"] * (len(HEADERS) - 1))
    text = tabulate(rows, HEADERS, colalign=align, disable_numparse=True)
    rounds = len(next(iter(measured.values()))["seconds"]) if measured else 0
    errors = [f"{name}: {error}" for name, error in cell["errors"].items()]
    return "\n".join([f"{cell['model']}, batch {cell['batch']} ({rounds} rounds)", text, *errors])


def _texts(one: dict[str, Any]) -> tuple[str, ...]:
    milliseconds = f"{1000 * np.median(one['seconds']):.2f}"
    if (found := one["ratios"]) is None:
        return "-", "-", milliseconds, "-", "-"
    low, median, high = found["step"]
    others = ("-" if x is None else f"{x:.2f}" for x in (found["bytes"], found["memory"]))
    return f"{median:.3f}", f"{low:.3f} to {high:.3f}", milliseconds, *others


def _measure_sizes(name: str, what: Steps, options: items.Options) -> dict[str, Any]:
    """Every batch size for which there is time."""
    network = what.rehearsal if options.rehearsal else what.network
    end, longest = time.monotonic() + options.seconds, 0.0  # of compiling for one batch size
    cells: list[dict[str, Any]] = []
    for number, size in enumerate(network.sizes):
        start = time.monotonic()
        if cells and end - start < longest:
            break
        compiled, errors = _compile(name, network, size, what.implementations)
        now = time.monotonic()
        longest = max(longest, now - start)
        others = len(network.sizes) - number - 1
        share = (end - now - others * longest) / (others + 1)  # the others compile, too
        seconds = 0.0 if options.rehearsal else max(LEAST_SECONDS, min(ROUND_SECONDS, share))
        cells.append(_measure(name, size, compiled, errors, seconds))
        del compiled  # for its states fill the memory that those of the next batch size need
    return {"cells": cells, "left_out": list(network.sizes[len(cells) :])}


def _compile(
    name: str, network: Network, size: int, implementations: Sequence[str]
) -> tuple[dict[str, Compiled], dict[str, str]]:
    """What can be compiled and run, after a first step; and the errors of what cannot."""
    log.info("%s, batch %d: compiling", name, size)
    chosen = {name: IMPLEMENTATIONS[name] for name in implementations}
    compiled, errors = compile_side_by_side(chosen, network.problem(size))
    for failing in [name for name, one in compiled.items() if not _runs(name, one, errors)]:
        del compiled[failing]
    for failing, error in errors.items():
        log.error("%s, batch %d: %s: %s", name, size, failing, error)
    return compiled, errors


def _runs(name: str, compiled: Compiled, errors: dict[str, str]) -> bool:
    """Whether a first step succeeds; if it does not, its error is added to the others."""
    try:
        if not math.isfinite(loss := compiled.program(1)):
            raise FloatingPointError(f"the loss is {loss}")
    except Exception as error:
        errors[name] = first_line(error)
    return name not in errors


def _measure(
    name: str, size: int, compiled: Mapping[str, Compiled], errors: dict[str, str], seconds: float
) -> dict[str, Any]:
    """The times, and what they are against those of the plain network."""
    programs = {name: one.program for name, one in compiled.items()}
    times = time_all(programs, seconds, None) if programs else {}
    cell = {
        implementation: Measurement(name, size, implementation, times[implementation], *one[1:])
        for implementation, one in compiled.items()
    }
    measurements = {name: _record(cell, name) for name in cell}
    return {"model": name, "batch": size, "measurements": measurements, "errors": errors}


def _record(cell: Cell, name: str) -> dict[str, Any]:
    """One implementation, with no ratios where the plain network failed."""
    one, found = cell[name], None
    if IMPLEMENTATIONS[name].against in cell:
        step, _, bytes_accessed, memory = ratios(cell, name)
        found = {"step": step.tolist(), "bytes": bytes_accessed, "memory": memory}
    return {
        "seconds": one.seconds,
        "bytes_accessed": one.bytes_accessed,
        "temporary_bytes": one.temporary_bytes,
        "compile_seconds": one.compile_seconds,  # side by side with others
        "ratios": found,
    }


if __name__ == "__main__":
    items.main(sys.argv[1:], run)
