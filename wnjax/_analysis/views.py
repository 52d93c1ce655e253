"""What the analysis of a jaxpr knows of each value, and what it writes down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from wnjax._analysis.layout import Axis, Layout, NoLayout, atoms_of, leaf_axes
from wnjax._analysis.lines import is_transposed, line_of_source
from wnjax._analysis.sizes import is_long

ACTIVATION = 1  # depends on the arguments beside the parameters, or is a layer's output
CAPTURED = 2  # depends on an array that the traced function closes over
DATA = 4  # depends on the arguments beside the parameters
FIRST_LEAF = 8  # depends on leaf 0; leaf i has the bit FIRST_LEAF << i

OWN_STATISTICS = "own statistics"  # what changed a leaf that is divided by its own norm, say


@dataclasses.dataclass(frozen=True, slots=True)
class LeafView:
    """A leaf of which a value is a rearrangement.

    Attributes:
      leaf: which one.
      layout: where its axes lie in the value.
      stacked: axes of the leaf of which an index, or the steps of a scan, pick one position.
      scanned: of these, the axes that scans run over, and how deep these are nested.
      changed: what turned the value into another function of the leaf than a multiple of it.
      is_indexed: whether data pick a position: an embedding, an expert.
      is_multiple: whether it was multiplied by anything.
      is_intact: whether it is the whole leaf, but for the axes that scans run over.
      is_narrow: whether it was cast to a dtype of a narrow range, such as float16.
      masked: axes of the leaf along which a constant factor of it varies, such as a mask.
    """

    leaf: int
    layout: Layout
    stacked: frozenset[int] = frozenset()
    scanned: frozenset[tuple[int, int]] = frozenset()
    changed: str | None = None
    is_indexed: bool = False
    is_multiple: bool = False
    is_intact: bool = True
    is_narrow: bool = False
    masked: frozenset[int] = frozenset()

    def moved(self, layout: Layout, **changes: Any) -> LeafView:
        """The view with another layout; the axes that are no longer in it were picked from."""
        gone = leaf_axes(self.layout) - leaf_axes(layout)
        return dataclasses.replace(self, layout=layout, stacked=self.stacked | gone, **changes)


@dataclasses.dataclass(frozen=True, slots=True)
class Info:
    """What is known of a value.

    Attributes:
      views: the leaves that it is a rearrangement of; several after a concatenation.
      sums: the weights whose neurons' sums it is, laid out by their feature axes.
      sources: what it depends on: a set of bits.
      constant: axes along which it repeats.
      partial: the sums over axes of weights that it holds, and that may not be over yet.
    """

    views: tuple[LeafView, ...] = ()
    sums: tuple[LeafView, ...] = ()
    sources: int = 0
    constant: frozenset[int] = frozenset()
    partial: tuple[PartialSum, ...] = ()

    @property
    def is_activation(self) -> bool:
        return bool(self.sources & ACTIVATION)

    @property
    def is_data(self) -> bool:
        return bool(self.sources & DATA)

    @property
    def is_constant(self) -> bool:
        """Whether it depends on no argument: at most on arrays that the function closes over."""
        return not self.sources & ~CAPTURED

    def depends_on(self, leaf: int) -> bool:
        return bool(self.sources & (FIRST_LEAF << leaf))


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """Where something happens: an equation of the traced function.

    Attributes:
      path: its place in the jaxpr. For each equation around it: the place of that equation, and
        which of its jaxprs; then its own place in the innermost jaxpr.
      operation: the name of the primitive.
      sources: where it was written, and the equations around it.
      trips: how often it runs in one call of the function.
      is_direct: whether nothing around it hides it from `wrap`.
      is_certain: whether it runs in every call, and not in a branch alone.
    """

    path: tuple[int, ...]
    operation: str
    sources: tuple[Any, ...] = dataclasses.field(compare=False)
    trips: int
    is_direct: bool
    is_certain: bool

    @property
    def line(self) -> str:
        """The user's file, line and function."""
        return line_of_source(self.sources)

    @property
    def is_backward(self) -> bool:
        """Whether a derivative inside the traced function put it there."""
        return is_transposed(self.sources[0])


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """A sum over some axes of a leaf.

    Attributes:
      leaf: which one.
      fan_in: its axes that are summed over.
      features: its other axes.
      stack: of these, the axes along which separate matrices lie.
      refusal: why this makes no neurons of it, in words.
      site: where.
      operand: which operand of the equation the leaf is.
      layout: where its other axes lie in the output.
      output_size: the number of elements of the output.
      is_scalable: whether a factor of the weight's features can be put on the output
      instead.
      is_narrow: whether it is computed in a dtype of a narrow range, such as float16.
      scanned: the axes of the leaf that scans around this run over, and how deep these are nested.
      is_masked: whether a constant factor of the weight varies along `fan_in`.
    """

    leaf: int
    fan_in: frozenset[int]
    features: frozenset[int]
    stack: frozenset[int]
    refusal: str | None
    site: Site
    operand: int
    layout: Layout
    output_size: int
    is_scalable: bool
    is_narrow: bool
    scanned: frozenset[tuple[int, int]]
    is_masked: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class PartialSum:
    """A sum over axes of a weight that a later product may continue.

    Attributes:
      use: the sum.
      layout: where the other axes of the weight lie in the value; None if that is not known.
      call: the place of the call of `einsum` that is not at its end; None if there is none.
      is_constant: whether only arrays that the function closes over have met the weight. These
        may be data, and the value is the output of a layer; or a basis, and it is a larger weight.
      is_weighted: whether an array that the function closes over multiplies it elementwise.
    """

    use: Use
    layout: Layout | None
    call: Hashable
    is_constant: bool
    is_weighted: bool = False

    def moved(self, to: Callable[[Layout], Layout | None]) -> PartialSum | None:
        """The same in a rearranged value; None if the value holds no more of it."""
        if self.layout is None:
            return self
        try:
            layout = to(self.layout)
        except NoLayout:
            return dataclasses.replace(self, layout=None)
        return None if layout is None else dataclasses.replace(self, layout=layout)


def united(partial: Iterable[PartialSum]) -> tuple[PartialSum, ...]:
    """One entry for every sum; where it lies is known if all entries agree."""
    result: dict[Any, PartialSum] = {}
    for one in partial:
        other = result.setdefault((one.use.leaf, one.use.site), one)
        if other.layout != one.layout:
            result[one.use.leaf, one.use.site] = dataclasses.replace(other, layout=None)
    return tuple(result.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Bias:
    """A sum of the output of neurons and of a leaf with one number for each.

    Attributes:
      weight: the leaf that the neurons are of.
      bias: the leaf that is added.
      site: where.
      operand: which operand of the equation the bias is.
      layout: where its axes lie in the sum.
      scanned: the axes of the bias that scans around this run over, and how deep these are nested.
      is_in_all_loops: whether all loops around this run over both leaves.
    """

    weight: int
    bias: int
    site: Site
    operand: int
    layout: Layout
    scanned: frozenset[tuple[int, int]]
    is_in_all_loops: bool

    @property
    def is_in_reach(self) -> bool:
        """Whether it happens in every call, where equations can be changed, and for all steps."""
        return self.is_in_all_loops and self.site.is_direct and self.site.is_certain


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """Something that happens to a leaf and is no sum over its axes.

    Attributes:
      leaf: which one.
      kind: what, in words.
      site: where.
    """

    leaf: int
    kind: str
    site: Site


def is_repeated(axis: Axis) -> bool:
    """Whether the value repeats along all of an axis."""
    return all(atom.axis is None or atom.size == 1 for atom in axis.atoms)


def has_copies(view: LeafView) -> bool:
    """Whether the value holds its leaf several times."""
    return any(
        is_long(atom.size) and (atom.axis is None or atom.stride == 0)
        for atom in atoms_of(view.layout)
    )
