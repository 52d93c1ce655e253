"""Products with weights of many axes, computed as products with matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax


def matrix_product(eqn: Any, operands: Sequence[jax.Array], weight: int) -> jax.Array | None:
    """The output of a product, computed with merged axes; None where they cannot be merged.

    Where a weight has several feature axes, or several that are summed over (attention heads), the
    derivative's product is with its transpose. XLA on a CPU copies that, as long as the weight
    is no matrix, and keeps the copy from the beginning of the step: a pass over v and memory of
    its size that the plain network takes too.

    Args:
      eqn: the equation.
      operands: the values of its two operands.
      weight: which of them is the weight.
    """
    if eqn.primitive.name != "dot_general":
        return None
    sums, (batch, _) = eqn.params["dimension_numbers"]
    if operands[weight].ndim < 3 or batch or eqn.params.get("out_sharding") is not None:
        return None
    if not all(axes and tuple(axes) == tuple(range(axes[0], axes[-1] + 1)) for axes in sums):
        return None
    merged, places = [], []
    for i, (x, axes) in enumerate(zip(operands, sums, strict=True)):
        first, end = axes[0], axes[-1] + 1
        before, inner, after = x.shape[:first], x.shape[first:end], x.shape[end:]
        if i == weight:
            before, after = ((math.prod(sizes),) if sizes else () for sizes in (before, after))
        merged.append(x.reshape(*before, math.prod(inner), *after))
        places.append(len(before))
    (left, right), (left_place, right_place) = merged, places
    output = jax.lax.dot_general(
        left,
        right,
        (((left_place,), (right_place,)), ((), ())),
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    return output.reshape(eqn.outvars[0].aval.shape)
