"""`to_state_dict`: a Flax tree as a PyTorch state dict."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from wnjax._leaves.gv import gain
from wnjax._leaves.trees import check_not_apart, flatten, listing, unbox, unbox_gv
from wnjax.pytorch._entries import STYLES, check_prefix, is_numeric, opened
from wnjax.pytorch._layouts import TELL, UNTOLD, Layout, Layouts, layouts_of
from wnjax.pytorch._modules import layouts_of_modules
from wnjax.pytorch._names import Names, parts_of, without_collections


def to_state_dict(  # noqa: PLR0913 - what read the checkpoint, and what is to be written
    tree: Any,
    names: Names | None = None,
    *,
    layouts: Layouts | None = None,
    model: nnx.Module | None = None,
    prefix: str = "",
    style: str = "parametrizations",
    like: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> dict[str, np.ndarray]:
    """The way back: a PyTorch state dict of a Flax tree.

    With the `names`, `layouts`, `model` and `prefix` that read a checkpoint it writes the same
    names, and the same numbers to the last bit, but for the biases of an `lstm`. PyTorch takes
    them as

        module.load_state_dict({name: torch.from_numpy(x) for name, x in state_dict.items()})

    and bfloat16 through a file, by `safetensors.numpy.save_file`. The arrays are copies:
    what PyTorch writes to them does not come into `tree`.

    Args:
      tree: parameters or variables, with or without (g, v) leaves; `LogWeightNorm`'s g is
        exp(log_g). Random state is left out.
      names: as for `from_state_dict`; a leaf whose name is None is left out.
      layouts: likewise.
      model: likewise; or the `wnjax.nnx.WeightNorm` whose `normalized()` the tree is.
      prefix: put before all names.
      style: of the keys of g and v: `"parametrizations"`, for
        `torch.nn.utils.parametrizations.weight_norm`, or `"weight_g"`, for
        `torch.nn.utils.weight_norm`.
      like: a state dict, or the path of a safetensors file, whose g have the shapes that are
        wanted. A single g for a whole weight has no axes in PyTorch if `dim` is None, and as many
        as the weight if `dim` is an axis of size 1. Without `like`, the former, unless the
        first axis has size 1.

    Returns:
      Names to contiguous numpy arrays, in the dtypes of the tree, g in float32 or wider. g has
      v's rank, size 1 on all axes but `dim`, or no axes.

    Raises:
      ValueError: if a (g, v) leaf has gains along several axes of the PyTorch parameter, which
        PyTorch cannot have; if two leaves have one name, or parts of a parameter are missing or
        unlike each other; if a pattern matches no leaf, or `style` is unknown; if nothing tells the
        layout of a kernel with as many inputs as outputs; if `tree` is the state of a
        `wnjax.nnx.WeightNorm`: take its `normalized()`.
      TypeError: if a leaf is no array of numbers, `prefix` no string, or `model` no NNX module.

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
    check_prefix(prefix)
    leaves = [(path, leaf) for path, leaf in flatten(tree)[0] if not isinstance(leaf, nnx.RngState)]
    check_not_apart(leaves)
    paths = [path for path, _ in leaves]
    inside = without_collections(paths)
    entries = [_arrays(path, leaf) for path, leaf in leaves]
    modules = layouts_of_modules(model)
    chosen = layouts_of(layouts, modules, inside, [v.shape for _, v in entries])
    shapes = {} if like is None else {k: np.shape(x) for k, x in opened(like, prefix).items()}
    pieces: dict[str, dict[int, _Piece]] = {}
    untold = []
    leaves_in_order = zip(paths, parts_of(names, inside), entries, chosen, strict=True)
    for path, part, (g, v), choice in leaves_in_order:
        if part is None:
            continue
        if not choice.is_told:
            untold.append(path)
        piece = _Piece(path, part.count, *_written(path, g, v, choice.layout))
        for name in part.names:
            _add(pieces.setdefault(prefix + name, {}), part.index, piece, prefix + name)
            piece = piece._replace(v=np.zeros_like(piece.v))  # the first of a sum is all of it
    if untold:
        raise ValueError(f"{UNTOLD}:{listing(untold)}\n{TELL}")
    result: dict[str, np.ndarray] = {}
    for name, parts in pieces.items():
        g, v = _joined(name, parts)
        if g is None:
            result[name] = v
        else:
            g_name, v_name = STYLES[style](name)
            result |= {g_name: _shaped(g, v, shapes.get(g_name)), v_name: v}
    return result


class _Piece(NamedTuple):
    """A leaf in PyTorch's layout, one of `parts` of a parameter; g is None if it is plain."""

    path: str
    parts: int
    g: np.ndarray | None
    v: np.ndarray


def _arrays(path: str, leaf: Any) -> tuple[np.ndarray | None, np.ndarray]:
    gv = unbox_gv(leaf)
    arrays = (None, unbox(leaf)) if gv is None else (gv[0], gv.v)
    for x in arrays:
        if x is not None and not isinstance(x, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"{path} is a {type(x).__name__}, no array")
        if x is not None and not is_numeric(x.dtype):
            raise TypeError(f"{path} is an array of {x.dtype}, not of numbers")
    return None if gv is None else np.asarray(gain(gv)), np.asarray(arrays[1])


def _written(
    path: str, g: np.ndarray | None, v: np.ndarray, layout: Layout
) -> tuple[np.ndarray | None, np.ndarray]:
    """The gains and v in PyTorch's layout."""
    if g is None:
        return None, layout.to_torch(v)
    v_shape = layout.torch_shape(v.shape)
    g_shape = layout.torch_shape(g.shape) if g.ndim == v.ndim else ()
    along = [axis for axis, size in enumerate(g_shape) if size != 1]
    fits = g.ndim == v.ndim and all(g_shape[axis] == v_shape[axis] for axis in along)
    if not fits or len(along) > 1:
        raise ValueError(
            f"{path}: g of shape {g.shape} beside v of shape {v.shape} has lengths along several "
            "axes, and PyTorch's weight_norm along one, dim. fold(tree) first to write the weight"
        )
    return layout.to_torch(g), layout.to_torch(v)


def _add(pieces: dict[int, _Piece], index: int, piece: _Piece, name: str) -> None:
    """Adds a part of a parameter to those there are, if it goes with them."""
    other = next(iter(pieces.values()), piece)
    if index in pieces:
        raise ValueError(
            f"{pieces[index].path} and {piece.path} are both {name}; give one of them the name None"
        )
    if (other.parts, other.g is None) != (piece.parts, piece.g is None):
        raise ValueError(
            f"{other.path} and {piece.path} are parts of {name}, and must be of one count, and "
            "both (g, v) leaves or both plain"
        )
    if piece.parts > 1 and piece.g is not None and piece.g.shape[0] != piece.v.shape[0]:
        raise ValueError(
            f"{piece.path}: g of shape {piece.g.shape} in PyTorch would be shared by the "
            f"{piece.parts} parts of {name}, and each has its own: only dim=0 can be joined"
        )
    pieces[index] = piece


def _joined(name: str, pieces: Mapping[int, _Piece]) -> tuple[np.ndarray | None, np.ndarray]:
    """The gains and v of a parameter from its parts."""
    first = next(iter(pieces.values()))
    if lacking := sorted(set(range(first.parts)).difference(pieces)):
        raise ValueError(
            f"{name}: no leaf gives part {lacking} of {first.parts}, as {first.path} gives one"
        )
    if first.parts == 1:
        return first.g, first.v
    gs = [pieces[i].g for i in range(first.parts)]
    v = np.concatenate([pieces[i].v for i in range(first.parts)])
    return None if first.g is None else np.concatenate([g for g in gs if g is not None]), v


def _shaped(g: np.ndarray, v: np.ndarray, wanted: tuple[int, ...] | None) -> np.ndarray:
    """The gains, without axes where PyTorch has none."""
    if g.size != 1:
        return g
    if wanted is None:
        wanted = () if v.shape[0] != 1 else g.shape
    return g.reshape(wanted)
