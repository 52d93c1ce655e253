"""Equations that call a jaxpr: how they take more operands, and give more results.

Every parameter that does not count operands or results is copied, also one that a later JAX adds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.extend.core import primitives


class Call(NamedTuple):
    """A primitive that runs a jaxpr once, on its operands.

    Attributes:
      of_operands: its parameters with an entry for every operand.
      of_results: its parameters with an entry for every result.
    """

    of_operands: tuple[str, ...] = ()
    of_results: tuple[str, ...] = ()


CALLS = {
    primitives.jit_p: Call(
        ("in_shardings", "in_layouts", "donated_invars"), ("out_shardings", "out_layouts")
    ),
    primitives.closed_call_p: Call(),
    primitives.remat_p: Call(),
}


def extended_call(eqn: Any, operands: int, results: int) -> dict[str, Any]:
    """The parameters of a call that takes more operands and gives more results."""
    call = CALLS[eqn.primitive]
    counts = dict.fromkeys(call.of_operands, operands) | dict.fromkeys(call.of_results, results)
    return {
        name: (*value, *(_of_one_operand[name] * counts[name])) if name in counts else value
        for name, value in eqn.params.items()
    }


def scan_parts(params: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    if "ft_in" in params:  # jax 0.12
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def extended_scan(eqn: Any, consts: int, xs: int, ys: int) -> dict[str, Any]:
    """The parameters of a scan with more constants, more that it runs over, and more outputs."""
    params = dict(eqn.params)
    if "ft_in" not in params:
        return params | {"num_consts": params["num_consts"] + consts}
    group = type(params["ft_in"])

    def more(old: Any, count: int) -> Any:
        return group(old, *[_carry_of_one] * count) if count else old

    old_consts, carry, old_xs = params["ft_in"].unpack()
    carried, old_ys = params["ft_out"].unpack()
    ft_in = group(more(old_consts, consts), carry, more(old_xs, xs))
    return params | {"ft_in": ft_in, "ft_out": group(carried, more(old_ys, ys))}


def _params_of(fn: Any) -> dict[str, Any]:
    """The parameters of the only equation of a function of one number."""
    params: dict[str, Any] = jax.make_jaxpr(fn)(0.0).eqns[-1].params
    return params


_of_one_operand = _params_of(jax.jit(lambda x: x + 1))
_scan_of_one = _params_of(lambda x: jax.lax.scan(lambda c, _: (c + 1, None), x, length=2)[0])
_carry_of_one = _scan_of_one["ft_in"].unpack()[1] if "ft_in" in _scan_of_one else None
