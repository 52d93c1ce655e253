"""The error for what is given to a `WeightNorm` module and is no module of its kind."""

from __future__ import annotations

from typing import Any

from flax import linen, nnx


def check_module(owner: str, given: Any, kind: type) -> None:
    """Raises TypeError unless `given` is an instance of `kind`, Linen's or NNX's Module."""
    if isinstance(given, kind):
        return
    example = "nn.Dense(4)" if kind is linen.Module else "nnx.Linear(3, 4, rngs=nnx.Rngs(0))"
    if isinstance(given, type):
        got = f"the class {given.__name__}: make an instance of it first"
    elif isinstance(given, linen.Module):
        got = "a Linen module: wnjax.linen.WeightNorm takes those"
    elif isinstance(given, nnx.Module):
        got = "an NNX module: wnjax.nnx.WeightNorm takes those"
    else:
        got = f"a {type(given).__name__}: wnjax.weight_norm takes trees of arrays"
    raise TypeError(f"{owner} takes an instance of a module, such as {example}, but got {got}")
