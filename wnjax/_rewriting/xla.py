"""Work-arounds for XLA, which change what it compiles and not what is computed.

Both are primitives, so that lowering decides where they act: on one device alone. There arrays
cannot be sharded, and an order of operations sends nothing from device to device. Without them
`tests/test_wrap_cost.py` fails; where it passes without one, that one is no longer needed.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.extend.core.primitives import dot_general_p
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from wnjax._analysis import contractions, moves
from wnjax._analysis.jaxprs import RULES
from wnjax._analysis.sizes import is_known

# in_order(x, scale) = (x, scale), whose derivative finds that of `scale` only after that of `x`.
#
# `x` is the input of the layer that `scale` belongs to. The gradient of `x` reads v. That of
# `scale` goes into the update of v, in place where v is donated. Unless one depends on the other,
# XLA cannot know which comes first, and copies v: two of the three passes over v that weight
# norm then adds to a training step (jax 0.10.2). XLA drops `optimization_barrier`s too early.
in_order_p = Primitive("in_order")
in_order_p.multiple_results = True
in_order_p.def_impl(lambda x, scale: [x, scale])
in_order_p.def_abstract_eval(lambda x, scale: [x, scale])

# wait(y, x) = y, computed after x.
wait_p = Primitive("wait")
wait_p.def_impl(lambda y, x: y)
wait_p.def_abstract_eval(lambda y, x: y)


def in_order(x: jax.Array, scale: jax.Array) -> list[jax.Array]:
    """Both; the derivative finds that of `scale` only after that of `x`."""
    both: list[jax.Array] = in_order_p.bind(x, scale)
    return both


def _in_order_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    is_linear = all(type(tangent) is not ad.Zero for tangent in tangents)
    return in_order_p.bind(*primals), in_order_p.bind(*tangents) if is_linear else tangents


def _in_order_transpose(cotangents: Any, *_: Any) -> list[Any]:
    dx, dscale = cotangents
    if type(dx) is not ad.Zero and type(dscale) is not ad.Zero:
        dscale = wait_p.bind(dscale, dx)
    return [dx, dscale]


def _wait_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    return wait_p.bind(*primals), tangents[0]


def _wait_transpose(cotangent: Any, y: Any, x: Any) -> list[Any]:
    is_linear = [ad.is_undefined_primal(operand) for operand in (y, x)]
    return [cotangent if is_linear[0] else None, ad.Zero(x.aval) if is_linear[1] else None]


def _waiting(y: jax.Array, x: jax.Array) -> jax.Array:
    """`y`, by a formula of which XLA cannot know that it does not depend on `x`."""
    rows = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)  # as a product has them
    number = jnp.real(jax.lax.slice(rows, (0, 0), (1, 1)).reshape(())).astype(y.dtype)
    return jnp.where(jnp.isnan(y), y + number, y)


def _lower_wait(ctx: Any, y: Any, x: Any) -> Any:
    sizes = ctx.avals_in[1].shape
    if not _is_on_one_device(ctx) or not is_known(*sizes) or 0 in sizes:
        return [y]
    return mlir.lower_fun(_waiting, multiple_results=False)(ctx, y, x)


batching.primitive_batchers[in_order_p] = lambda args, dims: (in_order_p.bind(*args), dims)
batching.primitive_batchers[wait_p] = lambda args, dims: (wait_p.bind(*args), dims[0])
ad.primitive_jvps[in_order_p] = _in_order_jvp
ad.primitive_transposes[in_order_p] = _in_order_transpose
ad.primitive_jvps[wait_p] = _wait_jvp
ad.primitive_transposes[wait_p] = _wait_transpose
mlir.register_lowering(in_order_p, lambda ctx, x, scale: [x, scale])
mlir.register_lowering(wait_p, _lower_wait)

# contraction(x, w) = dot_general(x, w), where w has several feature or several fan-in axes.
#
# Its derivative is a product with the transpose of w. XLA on a CPU copies that, as long as w is
# no matrix, and keeps the copy from the beginning of the step: a pass over v, and memory of its
# size, that the plain network takes too (jax 0.10.2). So all products are computed with matrices.
contraction_p = Primitive("contraction")
contraction_p.def_impl(dot_general_p.bind)
contraction_p.def_effectful_abstract_eval(dot_general_p.abstract_eval)


def as_contraction(eqn: Any, weight: int) -> Any:
    """A product as a `contraction`, where it can be one, given which operand is the weight.

    A policy of `jax.checkpoint` around does not take it for a product. So it stands on a CPU alone.
    """
    if (
        jax.default_backend() != "cpu"
        or eqn.primitive is not dot_general_p
        or len(eqn.invars[weight].aval.shape) < 3
    ):
        return eqn
    is_alone = not any(map(_has_explicit_axes, eqn.invars))
    is_simple = is_alone and not isinstance(eqn.params["precision"], tuple)
    return eqn.replace(primitive=_product_p(eqn.params["dimension_numbers"])) if is_simple else eqn


def _has_explicit_axes(var: Any) -> bool:
    """Whether the type of a value says how it is sharded: gradients then need such types, too."""
    return AxisType.Explicit in (var.aval.sharding.mesh.axis_types or ())


def _product_p(dimension_numbers: Any) -> Primitive:
    """The primitive of a product: a contraction if its axes can be merged."""
    sums, (batch, _) = dimension_numbers
    can_merge = all(axes and tuple(axes) == tuple(range(axes[0], axes[-1] + 1)) for axes in sums)
    return contraction_p if can_merge and not batch else dot_general_p


def _with_matrices(*operands: jax.Array, dimension_numbers: Any, **params: Any) -> jax.Array:
    """The product, computed with merged axes."""
    merged, places, shape = [], [], []
    for x, axes in zip(operands, dimension_numbers[0], strict=True):
        first, end = axes[0], axes[-1] + 1
        before, inner, after = x.shape[:first], x.shape[first:end], x.shape[end:]
        shape += [*before, *after]
        sizes = [(math.prod(part),) if part else () for part in (before, inner, after)]
        merged.append(x.reshape([*sizes[0], *sizes[1], *sizes[2]]))
        places.append((len(sizes[0]),))
    numbers = (tuple(places), ((), ()))
    product: jax.Array = dot_general_p.bind(*merged, dimension_numbers=numbers, **params)
    return product.reshape(shape)


def _lower_contraction(ctx: Any, *args: Any, **params: Any) -> Any:
    is_on_cpu = "cpu" in ctx.module_context.platforms
    product = _with_matrices if is_on_cpu and _is_on_one_device(ctx) else dot_general_p.bind
    return mlir.lower_fun(product, multiple_results=False)(ctx, *args, **params)


def _gradient(of: int, grad: jax.Array, *operands: Any, **params: Any) -> jax.Array:
    """The gradient of one operand, a product of that of the output and the other operand."""
    x, y = operands[of].aval, operands[1 - of]
    sums, batch = params.pop("dimension_numbers")
    x_summed, y_summed = sums[of], sums[1 - of]
    x_free = [i for i in range(x.ndim) if i not in x_summed]
    y_free = [i for i in range(y.ndim) if i not in y_summed]
    first = len(x_free) if of == 0 else 0
    pairs = [(grad, tuple(range(first, first + len(y_free)))), (y, tuple(y_free))]
    order = [*x_free, *x_summed]
    if x_summed[0] == 0:  # in the order in which the gradient need not be transposed
        pairs, order = pairs[::-1], [*x_summed, *x_free]
    factors, axes = zip(*pairs, strict=True)
    product_p = _product_p((axes, batch))
    result: jax.Array = product_p.bind(*factors, dimension_numbers=(axes, batch), **params)
    return result.transpose(np.argsort(order)).astype(x.dtype)


def _batched_contraction(args: Any, dims: Any, **params: Any) -> tuple[Any, int]:
    return jax.vmap(functools.partial(dot_general_p.bind, **params), dims)(*args), 0


ad.defbilinear(contraction_p, functools.partial(_gradient, 0), functools.partial(_gradient, 1))
batching.primitive_batchers[contraction_p] = _batched_contraction
mlir.register_lowering(contraction_p, _lower_contraction)


# Functions that were wrapped before may be analyzed.
RULES[in_order_p] = moves.same
RULES[wait_p] = lambda recorder, eqn, ins: [ins[0]]
RULES[contraction_p] = contractions.dot_general


def _is_on_one_device(ctx: Any) -> bool:
    """Whether what is being lowered runs on one device; False where JAX does not say so."""
    return getattr(ctx.module_context.axis_context, "num_devices", None) == 1
