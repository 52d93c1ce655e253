"""In which order PyTorch and Flax keep the axes of a parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from wnjax._axes import first_patterns


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the axes of a PyTorch parameter are in the Flax leaf.

    Attributes:
      axes: for every axis of the PyTorch parameter the axes of the Flax leaf that it holds, the
        outermost first: `((2,), (1,), (0,))` for a `Conv1d`, whose (out, in, taps) Flax keeps as
        (taps, in, out); `((1, 2), (0,))` for a projection onto heads.
        `()` is a PyTorch axis of size 1 that Flax does not have.
      flipped: the Flax axes along which the two count in opposite directions.

    Raises:
      ValueError: if an axis is named twice, or `axes` is not a tuple of tuples.

    >>> import numpy as np
    >>> from wnjax.pytorch import Layout
    >>> Layout(axes=((2,), (1,), (0,))).to_torch(np.zeros((3, 6, 4))).shape
    (4, 6, 3)
    """

    axes: tuple[tuple[int, ...], ...]
    flipped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks the axes."""
        is_nested = all(isinstance(group, tuple) for group in self.axes)
        if not is_nested or sorted(self.order) != list(range(len(self.order))):
            raise ValueError(
                "Layout: axes must be tuples, one for each axis of the PyTorch parameter, that "
                f"name every axis of the Flax leaf once, such as ((1,), (0,)); got {self.axes!r}"
            )

    @property
    def order(self) -> tuple[int, ...]:
        """The Flax axes in the order in which PyTorch has them."""
        return tuple(axis for group in self.axes for axis in group)

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the PyTorch parameter for a Flax leaf of `shape`."""
        return tuple(math.prod(shape[axis] for axis in group) for group in self.axes)

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        """A Flax leaf as the PyTorch parameter: a contiguous copy, to which PyTorch may write."""
        flipped = np.flip(x, self.flipped)
        # np.ascontiguousarray makes no copy of what is contiguous already. It counts an axis of
        # size 1 as contiguous whatever its stride, and PyTorch refuses negative strides.
        return np.array(flipped.transpose(self.order), order="C").reshape(self.torch_shape(x.shape))

    def to_flax(self, x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """A PyTorch parameter as the Flax leaf of `shape`."""
        split = x.reshape([shape[axis] for axis in self.order])
        return np.flip(split.transpose(np.argsort(self.order)), self.flipped)

    def gain_shape(self, torch_shape: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that g has in Flax, from its shape in PyTorch and v's in Flax."""
        sizes = list(shape)
        for size, group in zip(torch_shape, self.axes, strict=True):
            if size == 1:
                for axis in group:
                    sizes[axis] = 1
        return tuple(sizes)


def _linear(rank: int) -> Layout:
    return Layout(((rank - 1,), tuple(range(rank - 1))))


def _heads(rank: int) -> Layout:
    return Layout((tuple(range(1, rank)), (0,)))


def _conv(rank: int) -> Layout:
    return Layout(((rank - 1,), (rank - 2,), *((axis,) for axis in range(rank - 2))))


def _conv_transpose(rank: int) -> Layout:
    taps = tuple(range(rank - 2))
    return Layout(((rank - 2,), (rank - 1,), *((axis,) for axis in taps)), flipped=taps)


def _flat(rank: int) -> Layout:
    return Layout((tuple(range(rank)),))


def _same(rank: int) -> Layout:
    return Layout(tuple((axis,) for axis in range(rank)))


# name: (the fewest axes that the Flax leaf has, its layout by their number)
NAMED = {
    "linear": (2, _linear),
    "heads": (2, _heads),
    "conv": (3, _conv),
    "conv_transpose": (3, _conv_transpose),
    "flat": (1, _flat),
    "same": (0, _same),
}
Layouts: TypeAlias = Mapping[str, str | Layout]


def layouts_of(
    given: Layouts | None, paths: Sequence[str], ranks: Sequence[int]
) -> list[tuple[str, Layout]]:
    """The layout of every leaf, and what it is called.

    Raises:
      ValueError: if a pattern matches no leaf or never applies, if a layout is unknown or
        does not fit the number of axes, or if it is not said for a `ConvTranspose`.
    """
    given = given or {}
    firsts = first_patterns(given, paths, "layouts")
    return [
        _layout(path, given[first] if first is not None else _by_name(path, rank), rank)
        for path, rank, first in zip(paths, ranks, firsts, strict=True)
    ]


def _layout(path: str, layout: Any, rank: int) -> tuple[str, Layout]:
    if isinstance(layout, Layout):
        if len(layout.order) != rank:
            raise ValueError(
                f"layouts: {path} has {rank} axes, {layout} is for {len(layout.order)}"
            )
        return "as given", layout
    if layout not in NAMED:
        raise ValueError(
            f"layouts: {path}: {layout!r} is no layout; choose from {', '.join(NAMED)}, or "
            "give a wnjax.pytorch.Layout"
        )
    least, make = NAMED[layout]
    if rank < least:
        raise ValueError(f"layouts: {path} has {rank} axes, {layout!r} needs {least} or more")
    return repr(layout), make(rank)


def _by_name(path: str, rank: int) -> str:
    """The layout of a leaf by Flax's names, as in the naming rules for axes."""
    *modules, name = path.split("/")
    if name == "bias" and rank > 1:
        return "flat"
    if name != "kernel" or rank < 2:
        return "same"
    if any(module.startswith("ConvTranspose") for module in modules):
        raise ValueError(
            f"layouts: {path} is the kernel of a transposed convolution, whose order of axes "
            "shapes cannot always tell: give 'conv_transpose', or 'conv' for transpose_kernel=True"
        )
    if rank == 3 and modules[-1:] in (["query"], ["key"], ["value"]):
        return "heads"
    return "linear" if rank == 2 else "conv"


def fitting(torch_shape: Sequence[int], shape: Sequence[int]) -> list[str]:
    """The named layouts in which a PyTorch parameter fits a Flax leaf."""
    rank = len(shape)
    return [
        name
        for name, (least, make) in NAMED.items()
        if rank >= least and make(rank).torch_shape(shape) == tuple(torch_shape)
    ]
