"""The mesh axes over which the fan-in axes of weights are split, inside `shard_map`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax

from wnjax._axes.decisions import first_patterns

Names: TypeAlias = str | tuple[str, ...] | None
AxisName: TypeAlias = Names | Mapping[str, Names]


def split_over(
    axis_name: AxisName,
    paths: Sequence[str],
    weights: Mapping[int, tuple[Any, Any]],
    *,
    is_part: bool = False,
) -> dict[int, tuple[str, ...]]:
    """The mesh axes over which the fan-in axes of each weight are split.

    None outside `shard_map` and other transformations that bind the names: arrays are whole there.

    Args:
      axis_name: as of `weight_norm`.
      paths: of all leaves.
      weights: by the place of the leaf: (g, v), or (None, w) where no gain is known.
      is_part: whether `axis_name` may speak of leaves that `paths` lacks.

    Raises:
      ValueError: if a pattern matches no leaf, if only other axes are bound, and as `check_split`.
      TypeError: if `axis_name` is none of the forms.
    """
    if isinstance(axis_name, Mapping):
        patterns = first_patterns(axis_name, paths, "axis_name", is_part=is_part)
        said = [None if p is None else _as_tuple(axis_name[p]) for p in patterns]
    else:
        said = [None if axis_name is None else _as_tuple(axis_name)] * len(paths)
    names = {i: tuple(filter(_is_bound, said[i] or ())) for i in weights}
    for i, (g, v) in weights.items():
        check_split(paths[i], None if said[i] is None else names[i], v, g)
    return names


def check_split(path: str, names: Sequence[str] | None, v: Any, g: Any = None) -> None:
    """Raises ValueError where JAX knows that a norm over `names` as well would be no norm.

    It does where `shard_map` checks how values vary over its mesh; not under `pmap` and `vmap`.
    Of a leaf of which nothing is said, `names` is None.
    """
    where, v_varies = path or "the weight", _varying(v)
    tracked = [name for name in names or () if name in _varying(jax.lax.axis_index(name))]
    if same := [name for name in tracked if name not in v_varies]:
        raise ValueError(
            f"{where}: axis_name says that its fan-in axes are split over {_listed(same)}, but it "
            "is the same there on all devices, and every element would count several times. "
            "Split it in the in_specs of shard_map, or give None for its path"
        )
    if g is None:
        return
    if split := [name for name in tracked if name in _varying(g)]:
        raise ValueError(
            f"{where}: axis_name says that its fan-in axes are split over {_listed(split)}, but "
            "its gain differs between devices there. If the neurons are split over that mesh axis, "
            "give None for its path; if not, let the in_specs of shard_map replicate the gain"
        )
    unnamed = sorted(v_varies - _varying(g)) if names is None else []
    if unnamed:
        raise ValueError(
            f"{where}: its fan-in axes seem to be split over {_listed(unnamed)}: v differs between "
            "devices there, and its gain does not. The norm of a shard is not the norm: name that "
            "mesh axis in axis_name, or say there that these axes are whole (gathered), by (). "
            "Modules and data_init, where that cannot be said, need whole fan-in axes, and a gain "
            "made to vary by jax.lax.pcast"
        )


def _varying(x: Any) -> frozenset[str]:
    """The mesh axes along which JAX knows an array to differ from device to device."""
    return jax.typeof(x).manual_axis_type.varying if isinstance(x, jax.Array) else frozenset()


def _is_bound(name: str) -> bool:
    """Whether `shard_map`, or another transformation around, splits arrays over the axis."""
    try:
        jax.lax.axis_size(name)
    except NameError:
        if bound := jax.sharding.get_abstract_mesh().manual_axes:
            raise ValueError(
                f"axis_name: {name!r} is no axis here; shard_map binds {_listed(bound)}"
            ) from None
        return False
    return True


def _as_tuple(names: Any) -> tuple[str, ...]:
    given = () if names is None else (names,) if isinstance(names, str) else names
    if not isinstance(given, tuple) or not all(isinstance(name, str) for name in given):
        raise TypeError(
            "axis_name must be None, the name of a mesh axis, a tuple of names, or a dict from "
            f"regular expressions to these; got {names!r}"
        )
    return given


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))
