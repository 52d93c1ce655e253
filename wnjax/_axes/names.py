"""Flax's naming rules: the feature axes of kernels, by their names and the biases beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

Shape = tuple[int, ...]


class Named(NamedTuple):
    """What the naming rules say of a kernel.

    Attributes:
      feature_axes: counted from the end; where they are in doubt, those that are likeliest.
      is_guess: whether neither a name nor a bias stands behind them.
      is_refused: whether a bias speaks against them, or for others as well.
      possible: the feature axes that the bias allows, where they are refused.
    """

    feature_axes: Shape
    is_guess: bool = False
    is_refused: bool = False
    possible: tuple[Shape, ...] = ()


def named(modules: Sequence[str], shape: Shape, bias: Shape | None) -> Named:
    """The feature axes of a kernel of two or more axes.

    Args:
      modules: the names on the way to it.
      shape: of the kernel.
      bias: the shape of the bias in the same module; None where there is none.
    """
    module = modules[-1] if modules else ""
    rank, heads = len(shape), (-2, -1)
    is_projection = module in ("query", "key", "value") and rank == 3
    if bias is None:
        is_guess = rank > 2 and not _names_tell(modules, rank)
        return Named(heads if is_projection else (-1,), is_guess)
    axes = tuple(range(-rank, 0))
    found, turned = (_explained(axes, shape, bias, is_turned) for is_turned in (False, True))
    if is_projection and heads in found:
        return Named(heads)
    if len(found) == 1:
        is_guess = module.startswith("ConvTranspose") and bool(turned - found)
        return Named(found.pop(), is_guess)
    possible = sorted(found or turned)
    likeliest = possible[0] if len(possible) == 1 else (-1,)
    return Named(likeliest, is_refused=True, possible=tuple(possible))


def _names_tell(modules: Sequence[str], rank: int) -> bool:
    """Whether names alone tell the feature axes of a kernel of three or more axes."""
    if any(re.search(r"(Scan|Vmap)[A-Z]\w*_\d+$", module) for module in modules):
        return False  # Linen's names of what is stacked
    *_, module = "", *modules
    if module in ("query", "key", "value", "out"):
        return rank == 3
    return re.fullmatch(r"Conv_\d+", module) is not None


def _explained(axes: Shape, shape: Shape, bias: Shape, is_turned: bool) -> set[Shape]:
    """The choices of feature axes with which a layer, alone or in stacks, has a bias of this shape.

    A layer's own feature axes are its last; or the last but one, where its inputs and outputs have
    changed places. `nn.scan` and `nn.vmap` put the axis of a stack in the same place of the kernel
    and of the bias, counted from the front or from the end.
    """
    count = len(bias)
    if not 0 < count < len(axes):
        return set()
    own = axes[-2:-1] if is_turned else axes[-count:]
    found = {own} if tuple(shape[axis] for axis in own) == bias else set()
    for place in range(-count, count) if count > 1 else ():
        stack = axes[place]
        if shape[stack] == bias[place]:
            layer = tuple(axis for axis in axes if axis != stack)
            rest = tuple(size for i, size in enumerate(bias) if i != place % count)
            inner = _explained(layer, shape, rest, is_turned)
            found |= {tuple(sorted((stack, *features))) for features in inner}
    return found
