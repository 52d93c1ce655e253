"""`keep_norms`: steps that turn directions and leave lengths alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from wnjax._axes.axis_name import AxisName, split_over
from wnjax._axes.decisions import Axes, is_part_of_tree, weights_of
from wnjax._leaves.gv import FanIn, fan_in_axes, in_range, norm_dtype, root, total
from wnjax._leaves.trees import flatten, rebox, unbox, unbox_gv


def keep_norms(axes: Axes = None, *, axis_name: AxisName = None) -> optax.GradientTransformation:
    """After the step every neuron has the norm it had: ‖v‖ of (g, v) leaves, ‖w‖ of plain weights.

    The last one in a chain: the update u becomes

        u' = (w + u)·‖w‖/‖w + u‖ − w

    so that only directions are trained: projected, or forced, weight normalization. With (g, v)
    leaves, it fixes ‖v‖, and with it the effective learning rate of the directions, which else
    falls as ‖v‖ grows. A neuron of zeros has no norm to keep, and takes its first update as it is.
    So does one that the update takes to zero, and one whose squares its dtype does not represent
    (in float32: ‖w‖ below 3.2e-16 or above 1.8e19).

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, section 2.1, on how ‖v‖ grows;
    Karras et al. 2023, https://arxiv.org/abs/2312.02696, section 2.3, for forcing norms.

    Args:
      axes: which plain leaves are weights, as for `weight_norm`; in a tree with (g, v) leaves, the
        (g, v) leaves are, and axes are not used.
      axis_name: inside `shard_map`, over which mesh axes the fan-in axes are split, as for
        `weight_norm`. Of leaves that `optax.masked` masks, both may speak.

    Returns:
      A gradient transformation without state. Its `update` needs `params`.

    Raises:
      ValueError: by `init` and `update`: if there is no weight, if axes do not fit, if `params`
        are missing; and as `fold`.

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

    def init(params: Any) -> optax.EmptyState:
        _fan_in(params, axes, axis_name)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise ValueError("keep_norms keeps the norms of the params: pass them")
        leaves, treedef = flatten(updates)
        fan_in = _fan_in(params, axes, axis_name)
        pairs = zip(leaves, flatten(params)[0], strict=True)
        kept = [
            _keep(update, leaf, fan_in[i]) if i in fan_in else update
            for i, ((_, update), (_, leaf)) in enumerate(pairs)
        ]
        return treedef.unflatten(kept), state

    return optax.GradientTransformation(init, update)


def _fan_in(params: Any, axes: Axes, axis_name: AxisName) -> dict[int, FanIn]:
    """What norms run over, by leaf that is a weight or a (g, v) leaf."""
    leaves = flatten(params)[0]
    gv_leaves = {i: gv for i, (_, leaf) in enumerate(leaves) if (gv := unbox_gv(leaf))}
    weights: dict[int, tuple[Any, Any]] = {**gv_leaves}
    fan_in = {i: fan_in_axes(gv) for i, gv in gv_leaves.items()}
    for i, features in ({} if gv_leaves else weights_of(params, axes)).items():
        w = unbox(leaves[i][1])
        weights[i] = (None, w)
        fan_in[i] = tuple(axis for axis in range(jnp.ndim(w)) if axis not in features)
    paths = [path for path, _ in leaves]
    mesh_axes = split_over(axis_name, paths, weights, is_part=is_part_of_tree(params))
    return {i: FanIn(fan_in[i], mesh_axes[i]) for i in weights}


def _keep(update: Any, leaf: Any, fan_in: FanIn) -> Any:
    """The update of a weight, or of a (g, v) leaf."""
    gv = unbox_gv(update)
    if gv is None:
        return rebox(update, _projected(unbox(update), unbox(leaf), fan_in))
    boxed, v = unbox(update), unbox_gv(leaf).v
    return rebox(update, boxed._replace(v=rebox(boxed.v, _projected(gv.v, v, fan_in))))


def _projected(update: jax.Array, w: jax.Array, fan_in: FanIn) -> jax.Array:
    """(w + u)·‖w‖/‖w + u‖ − w, without cancellation."""
    wide = norm_dtype(w.dtype)
    u, w = update.astype(wide), w.astype(wide)
    squared_norm = total(w * w, fan_in)
    more = total((2 * w + u) * u, fan_in)
    new_squared_norm = squared_norm + more
    norm, new_norm = root(squared_norm), root(new_squared_norm)
    shorter = -more / ((norm + new_norm) * new_norm)  # ‖w‖/‖w + u‖ − 1
    has_norms = in_range(squared_norm) & in_range(new_squared_norm)
    kept = u * (norm / new_norm) + w * shorter
    return jnp.where(has_norms, kept, u).astype(update.dtype)
