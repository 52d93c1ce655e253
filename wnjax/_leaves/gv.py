"""The two (g, v) leaves that stand where a weight stood, and their arithmetic."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.export
import jax.numpy as jnp

from wnjax._leaves.not_an_array import not_an_array


def _array(v: Any) -> Any:
    """The array of a direction, which may be in a Flax box."""
    return next(iter(jax.tree.leaves(v)), None)


@not_an_array
class WeightNorm(NamedTuple):
    """A weight w = g·v/‖v‖: one length g and one direction v for every neuron.

    A plain pytree of two arrays. The shapes say which axes a neuron sums over, so
    slicing, stacking, vmapping, scanning, sharding and checkpointing just work. It has the `shape`,
    `dtype` and `ndim` of the weight, so that `jnp.zeros_like` takes it. It is no array: operators,
    `jnp.asarray` and indices other than those of a tuple raise a TypeError that says to fold the
    parameters or to wrap the function.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Attributes:
      g: the gains: v's rank, size 1 on the fan-in axes; float32 or wider.
      v: the directions: the weight's shape and dtype.

    >>> import jax.numpy as jnp
    >>> import wnjax
    >>> v = jnp.array([[3.0, 0.0], [4.0, 2.0]])  # two inputs, two neurons
    >>> wnjax.fold(wnjax.WeightNorm(g=jnp.array([[10.0, 1.0]]), v=v))
    Array([[6., 0.],
           [8., 1.]], dtype=float32)
    """

    g: Any
    v: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(_array(self.v).shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return _array(self.v).dtype

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.shape)


@not_an_array
class LogWeightNorm(NamedTuple):
    """A weight w = exp(log_g)·v/‖v‖: a positive length, learned on a log scale.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, section 2,
    which calls log_g s. It is no array either, as `WeightNorm` is none.

    Attributes:
      log_g: the logarithms of the gains: shape and dtype as `WeightNorm.g`.
      v: the directions: the weight's shape and dtype.

    >>> import jax.numpy as jnp
    >>> import wnjax
    >>> gv = wnjax.LogWeightNorm(log_g=jnp.zeros((1, 1)), v=jnp.array([[3.0], [4.0]]))
    >>> wnjax.fold(gv).round(6)
    Array([[0.6],
           [0.8]], dtype=float32)
    """

    log_g: Any
    v: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(_array(self.v).shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return _array(self.v).dtype

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.shape)


GVLeaf = WeightNorm | LogWeightNorm
GV_LEAVES = frozenset({WeightNorm, LogWeightNorm})
for _gv in GV_LEAVES:
    jax.export.register_namedtuple_serialization(_gv, serialized_name=f"wnjax.{_gv.__name__}")


def is_weight_norm(x: Any) -> TypeGuard[GVLeaf]:
    """Whether `x` is a `WeightNorm` or a `LogWeightNorm`.

    Args:
      x: anything; most often a vertex of a tree, for `is_leaf=`.

    Returns:
      A boolean, which type checkers understand.

    >>> import jax, jax.numpy as jnp
    >>> import wnjax
    >>> params = wnjax.weight_norm({"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)})
    >>> jax.tree.map(wnjax.is_weight_norm, params, is_leaf=wnjax.is_weight_norm)
    {'bias': False, 'kernel': True}
    """
    return isinstance(x, GVLeaf)


def norm_dtype(dtype: Any) -> Any:
    """The dtype in which norms accumulate and gains are kept: float32 or wider."""
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32
    return jnp.dtype(dtype if is_wide else jnp.float32)


class FanIn(NamedTuple):
    """What a neuron sums over.

    Attributes:
      axes: the axes of its weight.
      mesh_axes: the mesh axes over which these are split, in `shard_map`: arrays are shards there.
    """

    axes: tuple[int, ...]
    mesh_axes: tuple[str, ...] = ()


def fan_in_axes(gv: GVLeaf) -> tuple[int, ...]:
    """The axes that the norm runs over, read off the shapes.

    An axis of size 1 in both arrays is left out: it cannot matter to the norm.

    Raises:
      ValueError: if the gain's shape does not fit the direction's.
    """
    gain_shape, shape = jnp.shape(gv[0]), jnp.shape(gv.v)
    fits = len(gain_shape) == len(shape) and all(
        size in (1, full) for size, full in zip(gain_shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{gv._fields[0]} of shape {gain_shape} does not fit v of shape {shape}: give it "
            "v's rank, size 1 on the fan-in axes and v's size on the feature axes"
        )
    return tuple(axis for axis, size in enumerate(gain_shape) if size != shape[axis])


def gain_axes(gv: GVLeaf) -> frozenset[int]:
    """The axes along which the gain varies."""
    return frozenset(axis for axis, size in enumerate(jnp.shape(gv[0])) if size > 1)


def gain(gv: GVLeaf) -> jax.Array:
    """The gain g of either kind of (g, v) leaf, in the dtype of the norms."""
    wide = jnp.asarray(gv[0]).astype(norm_dtype(jnp.result_type(gv.v)))
    return jnp.exp(wide) if isinstance(gv, LogWeightNorm) else wide


def total(x: jax.Array, fan_in: FanIn) -> jax.Array:
    """Σx over the fan-in axes, which stay with size 1, and over the devices that share them."""
    shard = jnp.sum(x, axis=fan_in.axes, keepdims=True)
    return jax.lax.psum(shard, fan_in.mesh_axes) if fan_in.mesh_axes else shard


@functools.partial(jax.jit, static_argnames="fan_in", inline=True)
def sum_of_squares(x: jax.Array, fan_in: FanIn) -> jax.Array:
    """Σx² over the fan-in axes, which stay with size 1, in the dtype of the norms.

    One compiled kernel outside `jit` too, so that splitting a weight and folding it
    find the same norm to the last bit, and x² is never stored.
    """
    wide = x.astype(norm_dtype(x.dtype))
    return total(wide * wide, fan_in)


def in_range(squared_norm: jax.Array) -> jax.Array:
    """Whether a squared norm is finite and no square that matters to it was flushed to zero.

    In float32 that is so for norms from 3.2e-16 to 1.8e19. A NaN counts as in range: it
    must stay visible.
    """
    limits = jnp.finfo(squared_norm.dtype)
    return ~((squared_norm < limits.tiny / limits.eps) | (squared_norm > limits.max))


def root(squared_norm: jax.Array) -> jax.Array:
    """√x where `in_range`, else 1."""
    return jnp.sqrt(jnp.where(in_range(squared_norm), squared_norm, 1))


@jax.custom_jvp
def inverse_root(squared_norm: jax.Array) -> jax.Array:
    """1/√x; 0 where x is not `in_range`.

    In the order in which its derivative multiplies, nothing overflows while x is in range;
    that of `rsqrt` does below 1e-26.
    """
    ordinary = in_range(squared_norm)
    return jnp.where(ordinary, jax.lax.rsqrt(jnp.where(ordinary, squared_norm, 1)), 0)


@inverse_root.defjvp
def _inverse_root_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    ((squared_norm,), (dx,)) = primals, tangents
    inverse = inverse_root(squared_norm)
    return inverse, jnp.where(inverse != 0, -0.5 * dx * inverse * inverse * inverse, 0)


@jax.custom_jvp
def over_root(g: jax.Array, squared_norm: jax.Array) -> jax.Array:
    """g/√x, and exactly 1 where g is √x; 0 where x is not `in_range`.

    Derivatives multiply by 1/√x instead of dividing again: for every division XLA
    compiles a kernel, and a training step has a fifth fewer without them.
    """
    ordinary = inverse_root(squared_norm) != 0
    return jnp.where(ordinary, g / jnp.sqrt(jnp.where(ordinary, squared_norm, 1)), 0)


@over_root.defjvp
def _over_root_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (g, squared_norm), (dg, dx) = primals, tangents
    scale, inverse = over_root(g, squared_norm), inverse_root(squared_norm)
    dscale = dg * inverse - 0.5 * dx * inverse * inverse * scale
    return scale, jnp.where(inverse != 0, dscale, 0)


def squared_norm_of(gv: GVLeaf, mesh_axes: tuple[str, ...] = ()) -> jax.Array:
    """‖v‖², of g's shape; v may be split over mesh axes."""
    squared: jax.Array = sum_of_squares(gv.v, FanIn(fan_in_axes(gv), mesh_axes))
    return squared


def scale(gv: GVLeaf, mesh_axes: tuple[str, ...] = ()) -> jax.Array:
    """g/‖v‖, of g's shape; 0 where ‖v‖² is not `in_range`.

    Formed on the small array: XLA then never stores v/‖v‖.
    """
    return over_root(gain(gv), squared_norm_of(gv, mesh_axes))


def weight(gv: GVLeaf, mesh_axes: tuple[str, ...] = ()) -> jax.Array:
    """The weight w = v·(g/‖v‖), of v's shape and dtype."""
    v, factor = jnp.asarray(gv.v), scale(gv, mesh_axes)
    return (v.astype(factor.dtype) * factor).astype(v.dtype)
