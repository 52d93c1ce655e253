"""What weight normalization costs in tracing and compiling: python -m experiments.tracing.

Unrolled attention blocks have many weights and little to compute. The gradient of their loss is
traced, lowered and compiled, plain, with `fold` and with `wrap`, in turn in one process.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

import wnjax

HEADERS = ("", "equations", "beyond plain, a weight", "tracing", "with lowering and compiling")


class Blocks(nn.Module):
    """Attention blocks with six weights each."""

    blocks: int
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Of shape (examples, positions, width), as the output is."""
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(hidden)
        return x


class Seconds(NamedTuple):
    """Of one gradient.

    Attributes:
      tracing: the seconds of tracing.
      all: with lowering and compiling.
      equations: how many the traced program has, without those in functions that it calls.
    """

    tracing: float
    all: float
    equations: int


def measure(blocks: int, rounds: int) -> tuple[int, Mapping[str, list[Seconds]]]:
    """The number of weights, and the seconds of every form, in turn."""
    model, x = Blocks(blocks), jnp.ones((2, 8, 64))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y: Any = model.apply({"params": params}, x)
        return jnp.mean(jnp.square(y))

    axes = wnjax.infer_axes(loss)(params, x)
    normalized = jax.eval_shape(lambda params: wnjax.weight_norm(params, axes), params)
    forms: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "plain": (lambda fn: fn, params),
        "fold": (lambda fn: lambda params, x: fn(wnjax.fold(params), x), normalized),
        "wrap": (wnjax.wrap, normalized),
    }
    seconds: dict[str, list[Seconds]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, (transform, tree) in forms.items():
            # A function of its own for each round, so that JAX remembers nothing of the last one.
            seconds[name].append(_seconds(transform(functools.partial(loss)), tree, x))
    weights = sum(
        map(wnjax.is_weight_norm, jax.tree.leaves(normalized, is_leaf=wnjax.is_weight_norm))
    )
    return weights, seconds


def _seconds(fn: Any, tree: Any, x: jax.Array) -> Seconds:
    start = time.perf_counter()
    traced = jax.jit(jax.value_and_grad(fn)).trace(tree, x)
    tracing = time.perf_counter() - start
    traced.lower().compile()
    return Seconds(tracing, time.perf_counter() - start, len(traced.jaxpr.eqns))


def table(weights: int, seconds: Mapping[str, list[Seconds]]) -> str:
    """Medians and quartiles, over rounds, of the ratios to the plain form in the same round."""
    plain = seconds["plain"]
    rows = []
    for name, these in seconds.items():
        more = (these[0].equations - plain[0].equations) / weights
        ratios = [
            np.percentile(np.divide(*zip(*pairs, strict=True)), (25, 50, 75))
            for pairs in (
                [(one.tracing, base.tracing) for one, base in zip(these, plain, strict=True)],
                [(one.all, base.all) for one, base in zip(these, plain, strict=True)],
            )
        ]
        texts = [f"{median:.2f} ({low:.2f} to {high:.2f})" for low, median, high in ratios]
        rows.append((name, f"{these[0].equations:,}", f"{more:.1f}", *texts))
    return str(tabulate(rows, HEADERS, disable_numparse=True))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=24, help="attention blocks; default: 24")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    arguments = parser.parse_args()
    weights, seconds = measure(arguments.blocks, arguments.rounds)
    base = [
        np.median([getattr(one, name) for one in seconds["plain"]]) for name in ("tracing", "all")
    ]
    print(table(weights, seconds))
    print(
        f"{weights} weights; the plain form takes {base[0]:.1f} and {base[1]:.1f} seconds (medians)"
    )


if __name__ == "__main__":
    main()
