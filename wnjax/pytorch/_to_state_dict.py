"""`to_state_dict`: a Flax tree as a PyTorch state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import numpy as np

from wnjax._leaves import flatten, unbox, unbox_node
from wnjax._nodes import gain
from wnjax.pytorch._entries import STYLES
from wnjax.pytorch._layouts import Layout, Layouts, layouts_of
from wnjax.pytorch._names import Names, parts_of, without_collections


def to_state_dict(
    tree: chex.ArrayTree,
    names: Names | None = None,
    *,
    layouts: Layouts | None = None,
    prefix: str = "",
    style: str = "parametrizations",
) -> dict[str, np.ndarray]:
    """The way back: a PyTorch state dict of a Flax tree.

    With the `names`, `layouts` and `prefix` that read a checkpoint it writes the same names,
    and the same numbers to the last bit; `load_state_dict` takes them, as tensors:

        module.load_state_dict({k: torch.tensor(x) for k, x in state_dict.items()})

    Args:
      tree: parameters or variables, with or without nodes; `LogWeightNorm`'s g is exp(log_g).
      names: as for `from_state_dict`; a leaf whose name is None is left out.
      layouts: likewise.
      prefix: put before all names.
      style: of the keys of g and v: `"parametrizations"`, for
        `torch.nn.utils.parametrizations.weight_norm`, or `"weight_g"`, for
        `torch.nn.utils.weight_norm`.

    Returns:
      Names to numpy arrays, in the dtypes of the tree. g has v's rank, size 1 on all axes but
      `dim`; where there is one g for the whole weight it has no axes, as with `dim=None`,
      unless v's first axis has size 1.

    Raises:
      ValueError: if a node has gains along several axes of the PyTorch parameter, which PyTorch
        cannot have; if two leaves have one name, or parts of a parameter are missing; if a
        pattern matches no leaf, or `style` is unknown.

    >>> import jax.numpy as jnp
    >>> import wnjax
    >>> params = wnjax.weight_norm({"head": {"kernel": jnp.array([[3.0], [4.0]])}})
    >>> wnjax.pytorch.to_state_dict(params)["head.parametrizations.weight.original1"]
    array([[3., 4.]], dtype=float32)
    >>> list(wnjax.pytorch.to_state_dict(params, style="weight_g"))
    ['head.weight_g', 'head.weight_v']
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    leaves, _ = flatten(tree)
    inside = without_collections([path for path, _ in leaves])
    parts = parts_of(names, inside)
    values = [(path, unbox_node(leaf), unbox(leaf)) for path, leaf in leaves]
    ranks = [np.ndim(node.v if node is not None else x) for _, node, x in values]
    written: dict[str, dict[int, tuple[str, int, np.ndarray]]] = {}
    chosen = layouts_of(layouts, inside, ranks)
    for (path, node, x), part, (_, layout) in zip(values, parts, chosen, strict=True):
        if part is None:
            continue
        for number, name in enumerate(part.names):
            if node is None:
                entries = {name: layout.to_torch(np.asarray(x))}
            else:
                entries = dict(zip(STYLES[style](name), _written(path, node, layout), strict=True))
            for key, value in entries.items():
                pieces = written.setdefault(prefix + key, {})
                if part.index in pieces:
                    raise ValueError(f"{pieces[part.index][0]} and {path} are both {prefix + key}")
                piece = np.zeros_like(value) if number else value  # the first of a sum is all of it
                pieces[part.index] = path, part.count, piece
    return {name: _joined(name, pieces) for name, pieces in written.items()}


def _written(path: str, node: Any, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """The gains and v in PyTorch's layout."""
    v, g = np.asarray(node.v), np.asarray(gain(node))
    v_shape = layout.torch_shape(v.shape)
    g_shape = layout.torch_shape(g.shape) if g.ndim == v.ndim else ()
    along = [axis for axis, size in enumerate(g_shape) if size > 1]
    fits = g.ndim == v.ndim and all(g_shape[axis] == v_shape[axis] for axis in along)
    if not fits or len(along) > 1:
        raise ValueError(
            f"{path}: g of shape {g.shape} beside v of shape {v.shape} has lengths along several "
            "axes, and PyTorch's weight_norm along one, dim. fold(tree) first to write the weight"
        )
    g, v = layout.to_torch(g), layout.to_torch(v)
    is_whole = not along and v.shape[0] != 1
    return g.reshape(()) if is_whole else g, v


def _joined(name: str, pieces: Mapping[int, tuple[str, int, np.ndarray]]) -> np.ndarray:
    """A parameter from its parts."""
    ((path, count, first), *_) = pieces.values()
    if lacking := sorted(set(range(count)).difference(pieces)):
        raise ValueError(f"{name}: no leaf gives part {lacking} of {count}, as {path} gives one")
    return first if count == 1 else np.concatenate([pieces[i][2] for i in range(count)])
