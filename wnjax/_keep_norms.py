"""`keep_norms`: steps that turn directions and leave lengths alone."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from wnjax._axes import Axes, weights_of
from wnjax._leaves import flatten, rebox, unbox, unbox_node
from wnjax._nodes import fan_in_axes, norm_dtype


def keep_norms(axes: Axes = None) -> optax.GradientTransformation:
    """After the step every neuron has the norm it had: ‖v‖ of nodes, ‖w‖ of plain weights.

    The last one in a chain: the update u becomes

        u' = (w + u)·‖w‖/‖w + u‖ − w

    so that only directions are trained: projected, or forced, weight normalization. With nodes, it
    fixes ‖v‖, and with it the effective learning rate of the directions, which else falls as ‖v‖
    grows. A neuron of zeros has no norm to keep, and takes its first update as it is. Inside
    `shard_map`, keep the fan-in axes whole: the norm of a shard is not the norm.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, section 2.1, on how ‖v‖ grows;
    Karras et al. 2023, https://arxiv.org/abs/2312.02696, section 2.3, for forcing norms.

    Args:
      axes: which plain leaves are weights, as for `weight_norm`; in a tree with nodes, the nodes
        are, and axes are not used.

    Returns:
      A gradient transformation without state. Its `update` needs `params`.

    Raises:
      ValueError: by `init` and `update`: if there is no weight, if axes do not fit, or if `params`
        are missing.

    >>> import jax.numpy as jnp, optax
    >>> import wnjax
    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> optimizer = optax.chain(optax.sgd(1.0), wnjax.keep_norms())
    >>> grads = {"kernel": jnp.array([[-5.0], [-2.0]])}
    >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"]  # (8, 6), of length 10, to length 5
    Array([[4.],
           [3.]], dtype=float32)
    """

    def init(params: chex.ArrayTree) -> optax.EmptyState:
        _fan_in(params, axes)
        return optax.EmptyState()

    def update(
        updates: chex.ArrayTree, state: optax.EmptyState, params: chex.ArrayTree | None = None
    ) -> tuple[chex.ArrayTree, optax.EmptyState]:
        if params is None:
            raise ValueError("keep_norms keeps the norms of the params: pass them")
        leaves, treedef = flatten(updates)
        fan_in = _fan_in(params, axes)
        pairs = zip(leaves, flatten(params)[0], strict=True)
        kept = [
            _keep(update, leaf, fan_in[i]) if i in fan_in else update
            for i, ((_, update), (_, leaf)) in enumerate(pairs)
        ]
        return treedef.unflatten(kept), state

    return optax.GradientTransformation(init, update)


def _fan_in(params: chex.ArrayTree, axes: Axes) -> dict[int, tuple[int, ...]]:
    """The axes that norms run over, by leaf that is a weight or a node."""
    leaves = flatten(params)[0]
    nodes = {i: node for i, (_, leaf) in enumerate(leaves) if (node := unbox_node(leaf))}
    if nodes:
        return {i: fan_in_axes(node) for i, node in nodes.items()}
    return {
        i: tuple(axis for axis in range(jnp.ndim(unbox(leaves[i][1]))) if axis not in features)
        for i, features in weights_of(params, axes).items()
    }


def _keep(update: Any, leaf: Any, fan_in: tuple[int, ...]) -> Any:
    """The update of a weight, or of a node."""
    node = unbox_node(update)
    if node is None:
        return rebox(update, _projected(unbox(update), unbox(leaf), fan_in))
    boxed, v = unbox(update), unbox_node(leaf).v
    return rebox(update, boxed._replace(v=rebox(boxed.v, _projected(node.v, v, fan_in))))


def _projected(update: jax.Array, w: jax.Array, fan_in: tuple[int, ...]) -> jax.Array:
    """(w + u)·‖w‖/‖w + u‖ − w, without cancellation."""
    wide = norm_dtype(w.dtype)
    u, w = update.astype(wide), w.astype(wide)
    squared_norm = jnp.sum(w * w, fan_in, keepdims=True)
    more = jnp.sum((2 * w + u) * u, fan_in, keepdims=True)
    tiny = jnp.finfo(wide).tiny
    norm = jnp.sqrt(squared_norm)
    new_norm = jnp.sqrt(jnp.maximum(squared_norm + more, tiny))
    shorter = -more / ((norm + new_norm) * new_norm)  # ‖w‖/‖w + u‖ − 1
    kept = u * (norm / new_norm) + w * shorter
    return jnp.where(norm == 0, u, kept).astype(update.dtype)
