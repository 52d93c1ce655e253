"""In which order PyTorch and Flax keep the axes of a parameter."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from wnjax._axes.decisions import first_patterns
from wnjax._leaves.trees import listing


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


def _pointwise(rank: int, taps: int) -> Layout:
    return Layout(((1,), (0,), *[()] * taps))


def _channels(rank: int, places: int) -> Layout:
    return Layout(((), (0,), *[()] * places))


# name: (the fewest and the most axes that the Flax leaf has, its layout by their number)
NAMED: dict[str, tuple[int, float, Callable[[int], Layout]]] = {
    "linear": (2, math.inf, _linear),
    "heads": (2, math.inf, _heads),
    "conv": (3, math.inf, _conv),
    "conv_transpose": (3, math.inf, _conv_transpose),
    "flat": (1, math.inf, _flat),
    "same": (0, math.inf, _same),
    "scalar": (0, 0, lambda rank: Layout(((),))),
    **{f"pointwise{n}d": (2, 2, functools.partial(_pointwise, taps=n)) for n in (1, 2, 3)},
    **{f"channels{n}d": (1, 1, functools.partial(_channels, places=n)) for n in (1, 2, 3)},
}
Layouts: TypeAlias = Mapping[str, str | Layout]


TELL = (
    "The whole model tells it at once: model=, an nnx.Module, or "
    "layouts=wnjax.pytorch.infer_layouts(fn)(params, x); a pattern tells it of some: "
    "layouts={pattern: 'conv' or 'conv_transpose'}"
)
UNTOLD = (
    "kernels with as many inputs as outputs, or beside a bias of several axes, and nothing tells "
    "whether they are those of a convolution, of a transposed one, or of several heads"
)


class Chosen(NamedTuple):
    """The layout of a leaf.

    Attributes:
      called: what it is called in messages.
      layout: what it is.
      is_told: whether anything tells it. If not, the leaf has as many inputs as outputs, so that
        its shape cannot show a mistake, or it is in a stack or has several output axes, as the
        bias beside it shows.
    """

    called: str
    layout: Layout
    is_told: bool = True


def layouts_of(
    given: Layouts | None,
    modules: Layouts,
    paths: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
) -> list[Chosen]:
    """The layout of every leaf: the given one, or that of its module, or that of its name.

    Args:
      given: by regular expressions.
      modules: by paths.
      paths: of all leaves.
      shapes: theirs.

    Raises:
      ValueError: if a pattern matches no leaf or never applies, if a layout is unknown or
        does not fit the number of axes, if it is not said for a `ConvTranspose`, or if no path of
        `modules` is a leaf's.
    """
    if modules and not set(modules).intersection(paths):
        raise ValueError(
            "model: the tree has none of its kernels. Pass the module whose state the tree is. "
            f"Kernels of the model:{listing(modules)}"
        )
    given = given or {}
    firsts = first_patterns(given, paths, "layouts")
    beside = dict(zip(paths, shapes, strict=True))
    return [
        _chosen(path, shape, modules.get(path) if first is None else given[first], beside)
        for path, shape, first in zip(paths, shapes, firsts, strict=True)
    ]


def _chosen(
    path: str, shape: tuple[int, ...], told: Any, beside: Mapping[str, tuple[int, ...]]
) -> Chosen:
    if told is not None:
        return Chosen(*_layout(path, told, len(shape)))
    bias = beside.get(re.sub(r"(^|/)kernel$", r"\1bias", path), ())
    name, is_told = _by_name(path, shape, bias)
    return Chosen(*_layout(path, name, len(shape)), is_told)


def _layout(path: str, layout: Any, rank: int) -> tuple[str, Layout]:
    if isinstance(layout, Layout):
        if len(layout.order) != rank:
            raise ValueError(
                f"layouts: {path} has {rank} axes, {layout} is for {len(layout.order)}"
            )
        return "as given", layout
    if not isinstance(layout, str) or layout not in NAMED:
        raise ValueError(
            f"layouts: {path}: {layout!r} is no layout; choose from {', '.join(NAMED)}, or "
            "give a wnjax.pytorch.Layout"
        )
    least, most, make = NAMED[layout]
    if not least <= rank <= most:
        needed = f"{least}" if least == most else f"{least} or more"
        raise ValueError(f"layouts: {path} has {rank} axes, {layout!r} needs {needed}")
    return repr(layout), make(rank)


def _by_name(path: str, shape: tuple[int, ...], bias: tuple[int, ...]) -> tuple[str, bool]:
    """The layout of a leaf by Flax's names, as in the naming rules for axes, and if it is told.

    A bias of several axes is that of heads, or of a stack of layers.
    """
    *modules, name = path.split("/")
    rank = len(shape)
    if name == "bias" and rank > 1:
        return "flat", True
    if name != "kernel" or rank < 2:
        return "same", True
    if rank == 2:
        return "linear", True
    is_projection = rank == 3 and modules[-1:] in (["query"], ["key"], ["value"])
    is_one_layer = len(bias) < 2 or (is_projection and bias == shape[1:])
    if is_one_layer and re.fullmatch(r"Conv_\d+", "".join(modules[-1:])):
        return "conv", True  # Linen's own names of plain convolutions
    if any(module.startswith("ConvTranspose") for module in modules):
        raise ValueError(
            f"layouts: {path} is the kernel of a transposed convolution, whose order of axes "
            "shapes cannot always tell: give 'conv_transpose', or 'conv' for "
            f"transpose_kernel=True. {TELL}"
        )
    if is_one_layer and is_projection:
        return "heads", True
    return "conv", is_one_layer and (shape[-1] != shape[-2] or math.prod(shape) == 1)


def fitting(torch_shape: Sequence[int], shape: Sequence[int]) -> list[str]:
    """The named layouts in which a PyTorch parameter fits a Flax leaf."""
    rank = len(shape)
    return [
        name
        for name, (least, most, make) in NAMED.items()
        if least <= rank <= most and make(rank).torch_shape(shape) == tuple(torch_shape)
    ]


def name_of(layout: Layout) -> str | Layout:
    """What a layout is called; itself where it has no name."""
    rank = len(layout.order)
    named = (
        name
        for name, (least, most, make) in NAMED.items()
        if least <= rank <= most and make(rank) == layout
    )
    return next(named, layout)
