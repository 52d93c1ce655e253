"""`wrap`: a function of weights as one of nodes, which builds w only where that is cheaper."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from wnjax._axis_name import AxisName, split_over
from wnjax._evaluate import evaluate
from wnjax._infer_axes import examine
from wnjax._leaves import flatten, outer_box, rebox, unbox, unbox_node
from wnjax._nodes import Node, gain_axes, scale, weight
from wnjax._riding import is_alone
from wnjax._walk.rules import is_narrow
from wnjax._walk.sizes import is_at_most, is_less
from wnjax._walk.tracks import Use
from wnjax._walk.walker import Walk
from wnjax._weight_norm import warn_of_rounded_gains

# Traced once for all leaves of a shape.
_scale = jax.jit(scale, static_argnames="mesh_axes", inline=True)
_weight = jax.jit(weight, static_argnames="mesh_axes", inline=True)


def wrap(fn: Callable[..., Any], *, axis_name: AxisName = None) -> Callable[..., Any]:
    """Makes of `fn(params, ...)`, of plain weights, the same function of a tree with nodes.

    Equal to `fn(fold(params), ...)` to rounding, and so are its derivatives of any kind, but
    cheaper: where a layer's output is smaller than its weight, w is never built, and the
    scale g/‖v‖ is put on the output instead,

        w·x = (g/‖v‖)·(v·x)

    (Sizes alone decide; under `vmap` those of one example. A size that `jax.export` leaves open
    counts as large.) It traces `fn`, so call it inside `jit`, as one does with a loss. What tracing
    does not understand gets the folded weight. So does what is computed in float16, whose range v·x
    may leave where w·x does not; in wider dtypes it may do so only for ‖v‖ beyond what `fold` takes
    for finite.
    Inside `shard_map`, where fan-in axes may be split, what `fold` says of derivatives holds.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Args:
      fn: the forward function, or a loss: `fn(params, *args, **kwargs)`, of which `params` is any
        pytree of plain weights. Pure, as for `jit`.
      axis_name: over which mesh axes the fan-in axes are split, as for `weight_norm`. Sums over
        them, as in y = psum(x @ w), remain those of `fn`.

    Returns:
      The function of the same arguments, but for nodes in `params` wherever one likes. A tree
      without nodes goes to `fn` as it is.

    Raises:
      ValueError: when called: if `fn` needs values of the data, or uses axis names that
        nothing binds; if the shapes of a node's g and v do not fit each other; and as `fold`.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> import wnjax
    >>> model, x = nn.Dense(4), jnp.ones((2, 3))
    >>> def fn(params, x):
    ...     return model.apply({"params": params}, x)
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> normalized = wnjax.weight_norm(params, axes=wnjax.infer_axes(fn)(params, x))
    >>> y = jax.jit(wnjax.wrap(fn))(normalized, x)
    >>> bool(jnp.allclose(y, fn(params, x), rtol=1e-6))
    True
    """

    @functools.wraps(fn)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> Any:
        boxes, treedef = flatten(params)
        nodes = {i: node for i, (_, box) in enumerate(boxes) if (node := unbox_node(box))}
        if not nodes:
            return fn(params, *args, **kwargs)
        paths = [path for path, _ in boxes]
        warn_of_rounded_gains(paths, nodes)
        mesh_axes = split_over(axis_name, paths, nodes)
        examined = examine(fn, params, *args, **kwargs)
        riding = _riding(examined.walk, nodes)
        values = treedef.unflatten(
            _value(box, nodes[i], i in riding, mesh_axes[i])
            if i in nodes
            else rebox(box, unbox(box))
            for i, (_, box) in enumerate(boxes)
        )
        scales = {leaf: _scale(nodes[leaf], mesh_axes[leaf]) for leaf in riding}
        known = examined.known(values, *args, **kwargs)
        traced, shapes = examined.traced, examined.walk.shapes
        return traced.rebuild(evaluate(traced.jaxpr, known, shapes, scales))

    return wrapped


def scales_output(weight_size: int, output_size: int, in_order: bool) -> bool:
    """Whether the scale goes on the output of a layer rather than on its weight.

    With W and A the sizes of the weight and of the output, XLA's training step with Adam reads
    and writes, beyond the plain one's: 5 W with the scale on the weight; 3 W + 4 A with it on
    the output, or W + 4 A where no copy of v is made (see `after` in `_riding`); there a tie
    goes to the output, for less memory.

    Args:
      weight_size: the number of elements of the weight.
      output_size: the number of elements of all outputs that it makes in one call.
      in_order: whether XLA is told the order that spares it the copy.
    """
    if in_order:
        return is_at_most(output_size, weight_size)
    return is_less(2 * output_size, weight_size)


def _riding(walk: Walk, nodes: Mapping[int, Node]) -> set[int]:
    """The leaves whose scale goes on the outputs: all that happens to them must allow it."""
    uses: dict[int, list[Use]] = collections.defaultdict(list)
    for use in walk.uses:
        uses[use.leaf].append(use)
    noted = {note.leaf for note in walk.notes}
    return {
        leaf
        for leaf, node in nodes.items()
        if uses[leaf] and leaf not in noted and node.v.size
        if all(use.rides and use.fan_in.isdisjoint(gain_axes(node)) for use in uses[leaf])
        if not any(use.is_narrow for use in uses[leaf])  # v·x may overflow where w·x does not
        if not is_narrow(node.v.dtype)
        if scales_output(
            math.prod(node.v.shape),
            sum(use.output_size * use.site.trips for use in uses[leaf]),
            in_order=is_alone(),
        )
    }


def _value(box: Any, node: Node, rides: bool, mesh_axes: tuple[str, ...]) -> Any:
    """What stands for a node in the evaluation: v where the scale rides, else the weight."""
    return rebox(outer_box(box), jnp.asarray(node.v) if rides else _weight(node, mesh_axes))
