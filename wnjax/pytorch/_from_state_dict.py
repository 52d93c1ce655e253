"""`from_state_dict`: a PyTorch state dict as a Flax tree."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from wnjax._axes.decisions import first_patterns
from wnjax._leaves.gv import WeightNorm, norm_dtype
from wnjax._leaves.trees import (
    box_gv,
    check_not_apart,
    flatten,
    listing,
    names_on,
    outer_box,
    rebox,
    unbox,
    unbox_gv,
)
from wnjax.pytorch._entries import Entry, Misfit, Missing, StateDict, Untold
from wnjax.pytorch._layouts import TELL, UNTOLD, Chosen, Layout, Layouts, fitting, layouts_of
from wnjax.pytorch._modules import layouts_of_modules
from wnjax.pytorch._names import Names, Part, parts_of, without_collections


def from_state_dict(  # noqa: PLR0913 - each says one thing about the checkpoint
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    template: Any,
    names: Names | None = None,
    *,
    layouts: Layouts | None = None,
    model: nnx.Module | None = None,
    prefix: str = "",
    ignore: Iterable[str] = (),
    half_gains: bool = False,
) -> Any:
    """The parameters of a PyTorch model, as those of a Flax model.

    What PyTorch keeps as g and v, of w = g·v/‖v‖, becomes a `WeightNorm` (g, v) leaf with the very
    numbers; everything else, batch norm's running statistics included, comes along as it is. Both
    styles of keys are read, also in one file: `weight_g`, `weight_v`, and
    `parametrizations.weight.original0`, `original1`. `dim` is read off the shape of g.

    The tree `template` leads: for every leaf the PyTorch name is its slash path with dots, its last
    part translated (`kernel`, `scale`, `embedding`: `weight`; `mean`, `var`: `running_mean`,
    `running_var`), unless `names` says otherwise.

    Args:
      state_dict: names to numpy arrays, JAX arrays or PyTorch tensors; or the path of a
        safetensors file.
      template: the tree to be filled, of arrays or `jax.ShapeDtypeStruct`s: Linen parameters or
        whole variables (paths are then those inside of `params` and `batch_stats`), or the
        `nnx.State` of a model, whose random state is left as it is; shapes, dtypes, boxes and
        shardings are taken from it. Where it holds (g, v) leaves, the checkpoint must have g and v
        of that shape.
      names: a dict from regular expressions, matched against the whole slash path, to PyTorch
        names, in which `\\1` stands for the first group; the first match wins. The last part of
        the name is translated where it comes out of a group, and is what it says where it is
        written out. Or a callable from a path to a name. In place of a name, None leaves the
        template's value, and a `Part` is a part of a parameter; see `lstm`.
      layouts: a dict from regular expressions likewise to the order of the axes:

        * "linear": (out, in) to (in, out), or to (..., out) with several fan-in axes: kernels
          with two axes.
        * "conv": (out, in, *taps) to (*taps, in, out): other kernels; also what
          `ConvTranspose(transpose_kernel=True)` needs.
        * "conv_transpose": (in, out, *taps) to (*taps, in, out), with the taps in reverse, for
          `ConvTranspose`. It must be told, by this, by `model` or by `infer_layouts`: where in
          and out are equal, its shape is that of a "conv".
        * "heads": (heads·size, in) to (in, heads, size): kernels with three axes under
          attention's `query`, `key` and `value`.
        * "flat": one axis to several: biases with several axes.
        * "pointwise1d", "2d", "3d": (out, in, 1), (out, in, 1, 1), ... to (in, out): a convolution
          with one tap, as a `Dense`.
        * "channels1d", "2d", "3d": (1, channels, 1), ... to (channels,): Snake's alpha.
        * "scalar": (1,) to (): the slope of a PReLU.
        * "same": everything else.
        * a `Layout`.
      model: the `nnx.Module` whose state the template is. Its modules tell the layouts of their
        kernels, where `layouts` does not. Of a Linen module or a function, `infer_layouts` tells
        them, as `layouts`.
      prefix: of all names of this model, `"generator."`; names without it are left alone.
      ignore: regular expressions of names that no leaf need take, matched against the whole name,
        prefix included.
      half_gains: take g in half precision for what it is. Its rounding changes the length of a
        neuron by up to 1/2048 (float16) or 1/256 (bfloat16).

    Returns:
      `template` with the values of the checkpoint, and (g, v) leaves where it has g and v. v has
      the template's dtype, and g is float32 or wider.

    Raises:
      ValueError: with all that does not fit: leaves without a parameter, parameters without a
        leaf, other shapes (with the layouts in which they would fit), g of a shape that PyTorch's
        `dim` does not give, g without v, a weight in two styles, values that the template's dtype
        cannot hold, g in half precision, kernels with as many inputs as outputs of which neither
        `layouts`, nor `model`, nor the name (`Conv_0`) tells whether their convolution is
        transposed. And if a pattern of `names` or `layouts` matches no leaf, or one of `ignore`
        no name.
      TypeError: if a value is no array of numbers, a name or `prefix` no string, `state_dict` no
        mapping and no path, or `model` no NNX module.

    >>> import numpy as np, jax.numpy as jnp
    >>> import wnjax
    >>> state_dict = {
    ...     "head.weight_g": np.array([[10.0]], np.float32),
    ...     "head.weight_v": np.array([[3.0, 4.0]], np.float32),
    ...     "head.bias": np.zeros(1, np.float32),
    ... }
    >>> template = {"head": {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}}
    >>> params = wnjax.pytorch.from_state_dict(state_dict, template)
    >>> wnjax.fold(params)["head"]["kernel"]
    Array([[6.],
           [8.]], dtype=float32)
    """
    leaves, treedef = flatten(template)
    check_not_apart(leaves)
    paths = [path for path, _ in leaves]
    inside = without_collections(paths)
    parts = parts_of(names, inside)
    shapes = [np.shape(_weight(leaf)) for _, leaf in leaves]
    chosen = layouts_of(layouts, layouts_of_modules(model), inside, shapes)
    source = StateDict(state_dict, prefix)
    result, missing, misfits, untold = [], [], [], []
    lacking: list[str] = []
    for (path, leaf), part, choice in zip(leaves, parts, chosen, strict=True):
        try:
            result.append(_loaded(source, leaf, part, choice, half_gains))
        except Missing:
            missing.append(f"{path}: {' and '.join(part.names) if part else 'no value'}")
            lacking += part.names[:1] if part else ()
        except Misfit as misfit:
            misfits.append(f"{path}: {misfit}")
        except Untold:
            untold.append(path)
    unexpected = _not_ignored(ignore, source)
    hint = source.prefix_of(lacking)
    if hint and not source.found:  # the prefix explains both lists
        missing, unexpected = _counted(missing), _counted(unexpected)
    _check(missing, unexpected, misfits, untold, hint)
    return treedef.unflatten(result)


def _not_ignored(ignore: Iterable[str], source: StateDict) -> list[str]:
    """The names that no leaf has taken, without those that need not be."""
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    what = ("name of the state dict", "name")
    ignored = first_patterns(dict.fromkeys(patterns), source.names, "ignore", what=what)
    left = {source.prefix + name for name in source.left}
    return sorted(left.difference(n for n, p in zip(source.names, ignored, strict=True) if p))


def _counted(items: list[str]) -> list[str]:
    """Several items as one, which says how many they are."""
    return [f"{len(items)}, such as {items[0]}"] if items else []


def _weight(leaf: Any) -> Any:
    """The array of a leaf, v where it is a (g, v) leaf."""
    gv = unbox_gv(leaf)
    return unbox(leaf) if gv is None else gv.v


def _loaded(
    source: StateDict, leaf: Any, part: Part | None, choice: Chosen, half_gains: bool
) -> Any:
    """A leaf of the template with the checkpoint's value, in its box."""
    like = _weight(leaf)
    if isinstance(leaf, nnx.RngState):
        return leaf
    if part is None:
        if isinstance(like, jax.ShapeDtypeStruct):
            raise Missing
        return leaf
    entry = _entry(source, part)
    if not hasattr(like, "dtype"):
        raise Misfit(f"the template has a {type(like).__name__} there, no array")
    layout = choice.layout
    _check_shape(entry, np.shape(like), choice.called, layout)
    if not choice.is_told:
        raise Untold
    v = _cast(entry.v_name, layout.to_flax(entry.v, np.shape(like)), like.dtype)
    wanted = unbox_gv(leaf)
    if entry.g is None:
        if wanted is not None:
            raise Misfit(
                f"{entry.v_name} is a plain weight without {entry.g_name}, and the template has g "
                "and v. Use the plain template, and weight_norm after it"
            )
        return rebox(leaf, _placed(v, like, range(v.ndim)))
    g = _gain(entry, v.shape, layout, half_gains)
    g = _cast(entry.g_name, g, norm_dtype(like.dtype))
    if wanted is not None and (type(wanted), np.shape(wanted[0])) != (WeightNorm, g.shape):
        raise Misfit(
            f"{entry.g_name} gives a WeightNorm with g of shape {g.shape}, the template has a "
            f"{type(wanted).__name__} with {wanted._fields[0]} of shape {np.shape(wanted[0])}"
        )
    features = [axis for axis, size in enumerate(g.shape) if size > 1]
    gv = WeightNorm(_placed(g, like, features), _placed(v, like, range(v.ndim)))
    return box_gv(outer_box(leaf), gv, features)


def _entry(source: StateDict, part: Part) -> Entry:
    """The parameter, or the part of it, or the sum of several."""
    entries = [source.entry(name) for name in part.names]
    first = _part_of(entries[0], part)
    if len(entries) == 1:
        return first
    if any(entry.g is not None or entry.v.shape != entries[0].v.shape for entry in entries):
        raise Misfit(f"{' and '.join(part.names)} must be plain and of one shape to be added")
    total = sum(_part_of(entry, part).v for entry in entries[1:])
    return first._replace(v=first.v + total, v_name=" + ".join(part.names))


def _part_of(entry: Entry, part: Part) -> Entry:
    if part.count == 1:
        return entry
    v, g = entry.v, entry.g
    if v.ndim == 0 or v.shape[0] % part.count:
        raise Misfit(f"{entry.v_name} of shape {v.shape} does not split into {part.count} parts")
    if g is not None and g.shape[:1] != v.shape[:1]:
        raise Misfit(
            f"{entry.g_name} of shape {g.shape} is shared by the {part.count} parts of "
            f"{entry.v_name} of shape {v.shape}, and each needs its own: only dim=0 can be split"
        )
    size = v.shape[0] // part.count
    piece = slice(part.index * size, (part.index + 1) * size)
    return entry._replace(v=v[piece], g=None if g is None else g[piece])


def _check_shape(entry: Entry, shape: tuple[int, ...], called: str, layout: Layout) -> None:
    needed = layout.torch_shape(shape)
    if entry.v.shape == needed:
        return
    fits = " or ".join(map(repr, fitting(entry.v.shape, shape)))
    hint = f". It would fit as {fits}: if that is what it is, say so in layouts" if fits else ""
    raise Misfit(
        f"{entry.v_name} has shape {entry.v.shape}, but the leaf of shape {shape}, in the layout "
        f"{called}, needs {needed}{hint}"
    )


def _gain(entry: Entry, shape: tuple[int, ...], layout: Layout, half_gains: bool) -> np.ndarray:
    """The gains in Flax's layout, from PyTorch's."""
    g, v = np.asarray(entry.g), entry.v
    is_dim = g.ndim == v.ndim and all(
        size in (1, full) for size, full in zip(g.shape, v.shape, strict=True)
    )
    if g.ndim and not (is_dim and sum(size > 1 for size in g.shape) <= 1):
        raise Misfit(
            f"{entry.g_name} of shape {g.shape} does not fit {entry.v_name} of shape {v.shape}: "
            "give it the size of one axis, dim, and size 1 on the others, or no axes. (PyTorch "
            "broadcasts it, and takes other norms than are meant)"
        )
    if g.dtype.itemsize < 4 and not half_gains:
        raise Misfit(
            f"{entry.g_name} is {g.dtype}, and every rounding of g changes a neuron's length. Save "
            "the model before .half(), or pass half_gains=True to take it as it is"
        )
    if g.ndim == 0:
        return g.reshape((1,) * len(shape))
    return layout.to_flax(g, layout.gain_shape(g.shape, shape))


def _cast(name: str, x: np.ndarray, dtype: Any) -> np.ndarray:
    """`x` in a dtype that holds its values, and that JAX has: without x64, none of 64 bits."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    kinds = [
        [jnp.issubdtype(d, kind) for kind in (jnp.floating, jnp.complexfloating)]
        for d in (x.dtype, dtype)
    ]
    with np.errstate(over="ignore", invalid="ignore"):
        cast = x.astype(dtype) if kinds[0] == kinds[1] else None
    if cast is None or not np.array_equal(cast.astype(x.dtype), x, equal_nan=any(kinds[0])):
        raise Misfit(
            f"{name} is {x.dtype}, and the template's {dtype} does not hold its values. Cast it "
            f"before, or take a template of {x.dtype} (64 bits need jax_enable_x64)"
        )
    return cast


def _placed(x: np.ndarray, like: Any, axes: Iterable[int]) -> jax.Array:
    """`x` on the devices, in the sharding that `like` has on `axes`."""
    sharding = getattr(like, "sharding", None)
    own = np.array(x)  # PyTorch may write to its own
    if not isinstance(sharding, NamedSharding):
        return jnp.asarray(own)
    placed: jax.Array = jax.device_put(own, names_on(sharding, tuple(axes)))
    return placed


def _check(
    missing: list[str], unexpected: list[str], misfits: list[str], untold: list[str], hint: str
) -> None:
    """Raises with all that is wrong, at once."""
    headings = {
        "leaves of the template that the state dict lacks (leaf: name)": missing,
        "names in the state dict that no leaf takes (names or ignore may tell)": unexpected,
        "leaves that do not fit": misfits,
    }
    texts = [
        f"{heading}:" + "".join(f"\n  {item}" for item in items)
        for heading, items in headings.items()
        if items
    ]
    if untold:
        texts.append(f"{UNTOLD}:{listing(untold)}\n{TELL}")
    if hint:
        texts.append(f"what is missing seems to be there with prefix={hint!r}")
    if texts:
        raise ValueError("the state dict does not fit the template\n" + "\n".join(texts))
