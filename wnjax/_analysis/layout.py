"""Where the axes of a leaf lie in a value that is a rearrangement of it.

Every axis of the value is a row-major list of atoms, stretches of one axis of the leaf.
Reshapes that split and merge axes are then exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from wnjax._analysis.sizes import is_known, is_long, is_part


class Atom(NamedTuple):
    """A stretch of one axis of the leaf."""

    axis: int | None  # None: the value repeats along it
    stride: int  # in elements of the leaf's axis
    size: int


class Axis(NamedTuple):
    """One axis of a value: atoms, outermost first, that fill it from `offset` on."""

    atoms: tuple[Atom, ...]
    offset: int  # not 0, and the atoms shorter than `size`, after a concatenation
    size: int

    @property
    def length(self) -> int:
        """How many positions the atoms fill."""
        return math.prod(atom.size for atom in self.atoms)

    @property
    def is_whole(self) -> bool:
        return self.length == self.size


Layout = tuple[Axis, ...]


class NoLayout(Exception):
    """The rearrangement cannot be expressed in atoms."""


def of_leaf(shape: Sequence[int]) -> Layout:
    """The layout of the leaf itself."""
    return tuple(whole(Atom(axis, 1, size)) for axis, size in enumerate(shape))


def whole(*atoms: Atom) -> Axis:
    return Axis(atoms, 0, math.prod(atom.size for atom in atoms))


def repeated(size: int) -> Axis:
    """An axis along which the value repeats."""
    return whole(*[Atom(None, 0, size)] if is_long(size) else [])


def atoms_of(layout: Iterable[Axis]) -> list[Atom]:
    return [atom for axis in layout for atom in axis.atoms]


def leaf_axes(layout: Iterable[Axis]) -> frozenset[int]:
    """The axes of the leaf that `layout` has atoms of."""
    return frozenset(atom.axis for atom in atoms_of(layout) if atom.axis is not None)


def long_axes(layout: Iterable[Axis]) -> frozenset[int]:
    """The axes of the leaf of which `layout` has more than one position."""
    return frozenset(a.axis for a in atoms_of(layout) if a.axis is not None and is_long(a.size))


def reshape(layout: Layout, sizes: Sequence[int]) -> Layout:
    """The layout after a row-major reshape to `sizes`.

    Raises:
      NoLayout: if atoms would have to be cut at no boundary of their own.
    """
    result: list[Axis] = []
    for before, after in _groups(layout, sizes):
        result += _split(_merge(before), after)
    return tuple(result)


def _groups(layout: Layout, sizes: Sequence[int]) -> Iterator[tuple[Layout, tuple[int, ...]]]:
    """The smallest runs of axes before and after that hold the same elements."""
    if 0 in sizes:
        raise NoLayout
    before, after = list(layout), list(sizes)
    while before or after:
        old, new = before[:1], after[:1]
        if [axis.size for axis in old] != new and (new == [1] or (old and old[0].size == 1)):
            lone_new = new == [1]  # an axis of size 1 comes or goes
            yield (() if lone_new else tuple(old)), (tuple(new) if lone_new else ())
            del (after if lone_new else before)[:1]
            continue
        del before[:1], after[:1]
        while (size := math.prod(a.size for a in old)) != math.prod(new):
            is_short = is_part(size, math.prod(new))
            if not (before if is_short else after):
                raise NoLayout  # equal sizes, but symbols do not show it
            if is_short:
                old.append(before.pop(0))
            else:
                new.append(after.pop(0))
        yield tuple(old), tuple(new)


def _merge(axes: Sequence[Axis]) -> Axis:
    if not all(axis.is_whole for axis in axes[1:]):
        raise NoLayout
    inner = math.prod(axis.size for axis in axes[1:])
    if not axes:
        return whole()
    return Axis(tuple(atoms_of(axes)), axes[0].offset * inner, axes[0].size * inner)


def _split(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """`axis` cut into axes of `sizes`; only the outermost may then be filled in part."""
    inner = math.prod(sizes[1:])
    if not axis.is_whole and (axis.offset % inner or axis.length % inner):
        raise NoLayout
    remaining, result = list(axis.atoms), []
    for size in reversed(sizes[1:]):
        result.append(whole(*_take_innermost(remaining, size)))
    outermost = Axis(tuple(remaining), axis.offset // inner, math.prod(sizes[:1]))
    return [outermost, *reversed(result)] if sizes else []


def _take_innermost(atoms: list[Atom], size: int) -> list[Atom]:
    """Removes the innermost atoms that make up `size` from `atoms`, cutting one if needed."""
    taken: list[Atom] = []
    while size != 1:
        if not atoms:
            raise NoLayout  # as in `_groups`
        atom = atoms.pop()
        if size % atom.size == 0:
            taken.append(atom)
            size //= atom.size
        elif atom.size % size == 0:
            taken.append(atom._replace(size=size))
            outer = Atom(atom.axis, atom.stride * size, atom.size // size)
            atoms.append(outer)
            size = 1
        else:
            raise NoLayout
    return taken[::-1]


def cut(axis: Axis, start: int, stop: int, step: int = 1) -> Axis | None:
    """The part of `axis` from `start` to `stop`; None if none of its atoms is there.

    Raises:
      NoLayout: if the part is no product of stretches.
    """
    size = (stop - start + step - 1) // step
    if not is_known(start, stop, axis.size):
        if step > 1:
            raise NoLayout
        return pick(axis, size)
    low, high = max(start, axis.offset), min(stop, axis.offset + axis.length)
    if low >= high:
        return None
    if step > 1 and not axis.is_whole:
        raise NoLayout
    kept = size if axis.is_whole else high - low
    return Axis(_shorten(axis.atoms, kept, step, low - axis.offset), low - start, size)


def _shorten(atoms: tuple[Atom, ...], size: int, step: int, start: int) -> tuple[Atom, ...]:
    """`size` of the positions that `atoms` fill, every `step` of them, from `start` on."""
    sizes = [atom.size for atom in atoms]
    if size == 0:
        raise NoLayout
    if size == math.prod(sizes):
        return atoms
    if size == 1:
        return tuple(atom._replace(size=1) for atom in atoms)
    long = [i for i, atom in enumerate(atoms) if is_long(atom.size)]
    inner = math.prod(sizes[long[0] + 1 :])
    if len(long) > 1 and (step > 1 or size % inner or start % inner):
        raise NoLayout
    atom = atoms[long[0]]
    shorter = Atom(atom.axis, atom.stride * step, size // inner)
    return (*atoms[: long[0]], shorter, *atoms[long[0] + 1 :])


def pick(axis: Axis, size: int) -> Axis:
    """Some `size` positions of `axis` in a row, from where on is not known.

    Raises:
      NoLayout: if they may be no product of stretches.
    """
    if size == axis.size:
        return axis
    if axis.is_whole and not leaf_axes([axis]):
        return repeated(size)
    long = [atom for atom in axis.atoms if is_long(atom.size)]
    if is_long(size) and not (axis.is_whole and len(long) == 1):
        raise NoLayout
    return whole(*_shorten(axis.atoms, size, 1, 0))


def picked(axes: Sequence[Axis], size: int) -> Axis:
    """An axis of `size` positions, each of which is some position of all `axes` together."""
    leaf = sorted(leaf_axes(axes))
    first, others = leaf[:1], leaf[1:]
    atoms = [*(Atom(axis, 0, size) for axis in first), *(Atom(axis, 0, 1) for axis in others)]
    return whole(*atoms) if atoms else repeated(size)


def flip(axis: Axis) -> Axis:
    """`axis` from its end.

    Raises:
      NoLayout: if atoms do not fill it.
    """
    if not axis.is_whole:
        raise NoLayout
    return whole(*(atom._replace(stride=-atom.stride) for atom in axis.atoms))


def is_complete(layout: Iterable[Axis], axis: int, size: int) -> bool:
    """Whether an axis of the leaf lies in `layout` as a whole, with its positions in order."""
    atoms = [atom for atom in atoms_of(layout) if atom.axis == axis and is_long(atom.size)]
    atoms.sort(key=lambda atom: -atom.stride)
    strides = [math.prod(atom.size for atom in atoms[i + 1 :]) for i in range(len(atoms))]
    total = math.prod(atom.size for atom in atoms)
    is_all = size > 0 and total % size == 0  # all_gather makes of one device's shard several
    return is_all and [atom.stride for atom in atoms] == strides


def tile(axis: Axis, copies: int) -> Axis:
    """`axis` several times in a row.

    Raises:
      NoLayout: if atoms do not fill it.
    """
    if not axis.is_whole:
        raise NoLayout
    return whole(*repeated(copies).atoms, *axis.atoms)


def shard(axis: Axis, size: int) -> Axis:
    """The part of `axis` that one of several devices holds.

    Raises:
      NoLayout: if it is no product of stretches.
    """
    if size == axis.size:
        return axis
    shards = axis.size // size
    long = [i for i, atom in enumerate(axis.atoms) if is_long(atom.size)]
    if not axis.is_whole or axis.atoms[long[0]].size % shards:
        raise NoLayout
    atoms = list(axis.atoms)
    atoms[long[0]] = atoms[long[0]]._replace(size=atoms[long[0]].size // shards)
    return whole(*atoms)


def gather(axis: Axis, shards: int) -> Axis:
    """An axis of which every device holds a part, on all of them: what undoes `shard`.

    Raises:
      NoLayout: if atoms do not fill it.
    """
    if not axis.is_whole:
        raise NoLayout
    outer, *inner = axis.atoms or (Atom(None, 0, 1),)
    return whole(outer._replace(size=outer.size * shards), *inner)
