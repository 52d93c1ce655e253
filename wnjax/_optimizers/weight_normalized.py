"""`weight_normalized`: an optimizer of (g, v) behind plain parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import optax
from flax.core import FrozenDict

from wnjax._axes.axis_name import AxisName, split_over
from wnjax._axes.decisions import Axes, is_part_of_tree, weights_of
from wnjax._leaves.gv import FanIn, norm_dtype, root, sum_of_squares
from wnjax._leaves.states import check_state
from wnjax._leaves.trees import box_arrays, flatten, listing, rebox, unbox, unbox_gv
from wnjax._optimizers.chain_rule import View, chain_rule, step_back, view, weight_grad
from wnjax._transforms.weight_norm import check_floating

T = TypeVar("T")
K = TypeVar("K")


class WeightNormalizedState(NamedTuple):
    """The state of `weight_normalized`.

    What is not kept of a leaf is `optax.MaskedNode()`.

    Attributes:
      inner: the state of the optimizer, for a tree with (g, v) leaves. Gradients that it keeps
        under the name `grad`, as line searches do, are those of the plain parameters, so that
        `optax.value_and_grad_from_state` finds them.
      lengths: shaped like the parameters: for a weight sign(g)·‖v‖ of each neuron, of g's shape.
      residuals: shaped like the parameters: what rounding took from each.
    """

    inner: Any
    lengths: Any
    residuals: Any


def weight_normalized(
    optimizer: optax.GradientTransformation,
    axes: Axes = None,
    *,
    remainder: bool | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Lets `optimizer` train g and v, while parameters, model and checkpoints stay plain w.

    The trajectory of w is that of training g and v with `optimizer`: gradients are mapped by

        dL/dg = ⟨dL/dw, v⟩/‖v‖,   dL/dv = (g/‖v‖)(dL/dw − ⟨dL/dw, v⟩/‖v‖²·v),

    the optimizer sees a tree of `WeightNorm` (g, v) leaves, so that masks, `labels` and decay of g
    or v work in it, and what comes out is the change of w = g·v/‖v‖, without cancellation.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equations 2 and 3.

    Beside the optimizer's own state it keeps one number per neuron, sign(g)·‖v‖. Directions are
    read off the parameters at every step, so that other parameters, from an average, a checkpoint
    or clipping, are simply gone on with; ‖v‖ stays. A neuron of zeros has no direction: it takes a
    plain step, with v = w from then on. That is so, too, after a step that took g to 0 exactly.
    After one that took it close to 0, w is rounded, and its direction with it, by about
    ulp(w)/|g'|, unless the remainder is kept. g, v and their gradients are float32 or wider,
    and so is what the optimizer remembers of them. Under `jit` every axis may be sharded; inside
    `shard_map` too, where `axis_name` says over which mesh axes the fan-in axes are split. `init`
    may be called inside it or, on whole arrays, outside: lengths are sharded as gains are.

    Args:
      optimizer: any optax transformation. Extra arguments of `update` are passed on to it. Of
        them `grad` is mapped as the gradients are, and functions of the parameters become functions
        of (g, v) leaves: `value_fn` and `obj_fn`, which give a value, and `grad_fn`, which gives
        gradients.
      axes: as for `weight_norm`. Leaves that `optax.masked` or `optax.multi_transform` around
        this mask are left out.
      remainder: whether to keep, in float32 or wider, what rounding takes from the parameters: an
        array of the size of each. If None, of those below float32, which lose small updates.
      axis_name: inside `shard_map`, over which mesh axes the fan-in axes are split, as for
        `weight_norm`. Gradients must be those of the shards.

    Returns:
      A gradient transformation. Its `update` needs `params`. Its state is a
      `WeightNormalizedState`; `inner_params` gives the (g, v) leaves that `optimizer` sees.

    Raises:
      ValueError: by `init` and `update`: if nothing is normalized, if axes do not fit, if `params`
        hold (g, v) leaves (which `optimizer` itself trains) or the state of an optimizer, or are
        missing; and as `fold`, with the
        lengths for g.
      TypeError: by `update`: if the state is not that of `init`, as one that was restored without
        a target; or if another extra argument is a function, which would be given (g, v) leaves.

    >>> import jax, jax.numpy as jnp, optax
    >>> import wnjax
    >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.zeros(1)}
    >>> optimizer = wnjax.weight_normalized(optax.sgd(0.5))
    >>> state = optimizer.init(params)
    >>> grads = {"kernel": jnp.array([[1.0], [0.0]]), "bias": jnp.ones(1)}
    >>> updates, state = optimizer.update(grads, state, params)
    >>> w = optax.apply_updates(params, updates)["kernel"]
    >>> v = jnp.array([[2.68], [4.24]])  # from (3, 4), while g goes from 5 to 4.7
    >>> bool(jnp.allclose(w, 4.7 * v / jnp.linalg.norm(v)))
    True
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> WeightNormalizedState:
        plain = _Plain(params, _weights_of(params, axes), axis_name)
        residuals = [_residual(x, remainder) for x in plain.arrays]
        gv_leaves, lengths = plain.exact(residuals), plain.nothing()
        for i, fan_in in plain.fan_in.items():
            lengths[i] = root(sum_of_squares(gv_leaves[i], fan_in))
            gv_leaves[i] = view(gv_leaves[i], lengths[i], fan_in).gv
        tree = plain.tree(gv_leaves)
        inner_state = _with_grad(
            inner.init(tree), tree, lambda _: jax.tree.map(jnp.zeros_like, params)
        )
        keep = plain.treedef.unflatten
        return WeightNormalizedState(inner_state, keep(lengths), keep(residuals))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        **extra: Any,
    ) -> tuple[Any, WeightNormalizedState]:
        check_state(state, WeightNormalizedState, "weight_normalized")
        if params is None:
            raise ValueError("weight_normalized reads the directions off the params: pass them")
        plain = _Plain(params, _weights_of(params, axes), axis_name, state.lengths)
        residuals = plain.treedef.flatten_up_to(state.residuals)
        exact = plain.exact(residuals)
        views = plain.views(exact)
        gv_leaves = plain.normalized(exact, views)
        changes, inner_state = inner.update(
            plain.chain_rule(exact, views, updates),
            _with_grad(state.inner, params, lambda grad: plain.chain_rule(exact, views, grad)),
            gv_leaves,
            **plain.extra(exact, views, extra),
        )
        inner_state = _with_grad(
            inner_state, gv_leaves, lambda grad: plain.weight_grads(views, changes, grad)
        )
        result, lengths = [], plain.nothing()
        for i, (_, leaf) in enumerate(flatten(changes)[0]):
            if i in views:
                step = step_back(views[i], unbox_gv(leaf))
                change, target, lengths[i] = step
            else:
                change, target = unbox(leaf), None
            change, residuals[i] = _rounded(plain.arrays[i], exact[i], change, target, residuals[i])
            result.append(rebox(plain.leaves[i], change))
        keep = plain.treedef.unflatten
        return keep(result), WeightNormalizedState(inner_state, keep(lengths), keep(residuals))

    return optax.GradientTransformationExtraArgs(init, update)


# As in `weight_norm`, dicts, lists and arrays do not keep their types; and optax calls every state
# an `OptState`.
@overload
def inner_params(
    state: Any, params: FrozenDict[Any, Any] | list[Any] | jax.Array, *, axis_name: AxisName = None
) -> Any: ...
@overload
def inner_params(
    state: Any, params: dict[K, Any], *, axis_name: AxisName = None
) -> dict[K, Any]: ...
@overload
def inner_params(state: Any, params: T, *, axis_name: AxisName = None) -> T: ...
def inner_params(state: Any, params: Any, *, axis_name: AxisName = None) -> Any:
    """The (g, v) leaves that the optimizer inside of `weight_normalized` sees.

    For functions of optax that take its state and its parameters, such as
    `optax.contrib.schedule_free_eval_params`; for logging by `norms`; or to go on with explicit g
    and v, by the optimizer itself and `state.inner`.

    Args:
      state: of `weight_normalized`. In the state of a chain and the like find it with
        `optax.tree.get(state, "WeightNormalizedState")`.
      params: the plain parameters that go with it; masked where `optax.masked` masks them.
      axis_name: inside `shard_map`, over which mesh axes the fan-in axes are split, as for
        `weight_norm`.

    Returns:
      `params` with a `WeightNorm` in the place of every weight, in the dtype of the norms, and with
      what rounding took from the parameters. ‖v‖ is the length that v has inside. A neuron whose
      squares its dtype does not represent, as one of zeros, has g = 0 and v = w.

    Raises:
      TypeError: if `state` is not that of `weight_normalized`.
      ValueError: as `fold`, with the lengths for g.

    >>> import jax.numpy as jnp, optax
    >>> import wnjax
    >>> params = {"kernel": jnp.array([[3.0], [4.0]])}
    >>> schedule_free = optax.contrib.schedule_free_sgd(0.1)
    >>> optimizer = wnjax.weight_normalized(schedule_free)
    >>> state = optimizer.init(params)
    >>> normalized = wnjax.inner_params(state, params)
    >>> normalized["kernel"].g
    Array([[5.]], dtype=float32)
    >>> evaluated = optax.contrib.schedule_free_eval_params(state.inner, normalized)
    >>> wnjax.fold(evaluated)["kernel"].round(5)
    Array([[3.],
           [4.]], dtype=float32)
    """
    check_state(state, WeightNormalizedState, "inner_params")
    pairs, treedef = flatten(params)
    lengths = treedef.flatten_up_to(state.lengths)
    features = {
        i: tuple(axis for axis, n in enumerate(jnp.shape(unbox(leaf))) if length.shape[axis] == n)
        for i, (length, (_, leaf)) in enumerate(zip(lengths, pairs, strict=True))
        if not isinstance(length, optax.MaskedNode)
    }
    plain = _Plain(params, features, axis_name, state.lengths)
    exact = plain.exact(treedef.flatten_up_to(state.residuals))
    return plain.normalized(exact, plain.views(exact))


def _weights_of(params: Any, axes: Axes) -> dict[int, tuple[int, ...]]:
    """The feature axes of every leaf of plain parameters that is a weight."""
    if normalized := [path for path, leaf in flatten(params)[0] if unbox_gv(leaf) is not None]:
        raise ValueError(
            "weight_normalized: these are (g, v) leaves already; give the tree to "
            f"the optimizer itself:{listing(normalized)}"
        )
    return weights_of(params, axes)


class _Plain:
    """Plain parameters, and which of their leaves are weights.

    Attributes:
      leaves: with their boxes.
      arrays: without.
      features: by leaf that is a weight: its feature axes.
      fan_in: likewise: what its neurons sum over.
      lengths: likewise: sign(g)·‖v‖; empty in `init`.
    """

    def __init__(
        self,
        params: Any,
        features: Mapping[int, tuple[int, ...]],
        axis_name: AxisName,
        lengths: Any = None,
    ):
        pairs, self.treedef = flatten(params)
        paths = [path for path, _ in pairs]
        self.leaves = [leaf for _, leaf in pairs]
        self.features = features
        for i in self.features:
            check_floating(paths[i], unbox(self.leaves[i]))
        self.arrays = [jnp.asarray(unbox(leaf)) for leaf in self.leaves]
        known = [] if lengths is None else self.treedef.flatten_up_to(lengths)
        self.lengths = {i: known[i] for i in self.features} if known else {}
        weights = {i: (self.lengths.get(i), self.arrays[i]) for i in self.features}
        mesh_axes = split_over(axis_name, paths, weights, is_part=is_part_of_tree(params))
        self.fan_in = {
            i: FanIn(tuple(a for a in range(w.ndim) if a not in self.features[i]), mesh_axes[i])
            for i, (_, w) in weights.items()
        }

    def nothing(self) -> list[Any]:
        """For every leaf, that nothing is kept of it."""
        return [optax.MaskedNode() for _ in self.leaves]

    def exact(self, residuals: Sequence[Any]) -> list[Any]:
        """The arrays, with what rounding took from them; weights in the dtype of the norms."""
        return [
            x.astype(residual.dtype) + residual
            if not isinstance(residual, optax.MaskedNode)
            else x.astype(norm_dtype(x.dtype))
            if i in self.fan_in
            else x
            for i, (x, residual) in enumerate(zip(self.arrays, residuals, strict=True))
        ]

    def views(self, exact: Sequence[Any]) -> dict[int, View]:
        """The weights as g and v."""
        return {i: view(exact[i], self.lengths[i], fan_in) for i, fan_in in self.fan_in.items()}

    def normalized(self, exact: Sequence[Any], views: Mapping[int, View]) -> Any:
        """All leaves, with g and v in the place of weights."""
        return self.tree([views[i].gv if i in views else x for i, x in enumerate(exact)])

    def chain_rule(self, exact: Sequence[Any], views: Mapping[int, View], grads: Any) -> Any:
        """Gradients of the plain parameters as a tree with those of g and v."""
        leaves: list[Any] = []
        for i, ((_, leaf), x) in enumerate(zip(flatten(grads)[0], exact, strict=True)):
            grad = unbox(leaf).astype(x.dtype)
            leaves.append(chain_rule(views[i], grad) if i in views else grad)
        return self.tree(leaves)

    def weight_grads(self, views: Mapping[int, View], changes: Any, grads: Any) -> Any:
        """Gradients of g and v after a step as those of the plain parameters."""
        pairs = zip(flatten(changes)[0], flatten(grads)[0], self.arrays, strict=True)
        leaves = []
        for i, ((_, change), (_, grad), x) in enumerate(pairs):
            found = (
                weight_grad(views[i], unbox_gv(change), unbox_gv(grad))
                if i in views
                else unbox(grad)
            )
            leaves.append(rebox(self.leaves[i], found.astype(x.dtype)))
        return self.treedef.unflatten(leaves)

    def fold(self, views: Mapping[int, View], gv_leaves: Any) -> Any:
        """(g, v) leaves that a step has made of the views as plain parameters, in their dtypes."""
        leaves = []
        for i, ((_, leaf), x) in enumerate(zip(flatten(gv_leaves)[0], self.arrays, strict=True)):
            found = views[i].weight(unbox_gv(leaf)) if i in views else unbox(leaf)
            leaves.append(rebox(self.leaves[i], found.astype(x.dtype)))
        return self.treedef.unflatten(leaves)

    def extra(
        self, exact: Sequence[Any], views: Mapping[int, View], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The extra arguments of `update`, as those of an optimizer of (g, v) leaves.

        Raises:
          TypeError: if one of another name than optax's is a function.
        """
        fold = functools.partial(self.fold, views)
        extra = dict(given)
        for name, x in given.items():
            if name == "grad" and x is not None:
                extra[name] = self.chain_rule(exact, views, x)
            elif not callable(x):
                continue
            elif name in ("value_fn", "obj_fn"):
                extra[name] = _value_of_gv_leaves(x, fold)
            elif name == "grad_fn":
                extra[name] = _grad_of_gv_leaves(x, fold)
            else:
                raise TypeError(
                    f"weight_normalized: the extra argument {name!r} of update is a function, and "
                    "the optimizer inside would call it with g and v in the place of the "
                    "parameters. value_fn, obj_fn (values) and grad_fn (gradients) are understood. "
                    "Let what calls another function close over it: it is then one of (g, v) leaves"
                )
        return extra

    def tree(self, values: Sequence[Any]) -> Any:
        """Arrays, and (g, v) leaves in the place of weights, in the boxes of the parameters."""
        return self.treedef.unflatten(
            box_arrays(leaf, value, self.features[i]) if i in self.features else rebox(leaf, value)
            for i, (leaf, value) in enumerate(zip(self.leaves, values, strict=True))
        )


def _value_of_gv_leaves(fn: Callable[..., Any], fold: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function of plain parameters as one of (g, v) leaves. Line searches read its signature."""

    @functools.wraps(fn)
    def of_gv_leaves(gv_leaves: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(fold(gv_leaves), *args, **kwargs)

    return of_gv_leaves


def _grad_of_gv_leaves(fn: Callable[..., Any], fold: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function that gives gradients of plain parameters, as one that gives those of g and v."""

    @functools.wraps(fn)
    def of_gv_leaves(gv_leaves: Any, *args: Any, **kwargs: Any) -> Any:
        params, pull = jax.vjp(fold, gv_leaves)
        (grads,) = pull(fn(params, *args, **kwargs))
        return grads

    return of_gv_leaves


def _with_grad(state: Any, like: Any, fn: Callable[[Any], Any]) -> Any:
    """The state of an optimizer, with `fn` of the gradients that it keeps, if it keeps any.

    It does so if its one field called `grad`, as optax would find it, is a tree like `like`.
    """
    structure: Any = jax.tree.structure(like)

    def is_tree(_: Any, x: Any) -> bool:
        return bool(structure == jax.tree.structure(x))

    found = optax.tree.get_all_with_path(state, "grad", is_tree)
    if len(found) != 1:
        return state
    return optax.tree.set(state, is_tree, grad=fn(found[0][1]))


def _residual(x: jax.Array, remainder: bool | None) -> Any:
    """Zeros in which to keep what rounding takes from a parameter, if that is to be kept."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return optax.MaskedNode()
    wide = norm_dtype(x.dtype)
    keeps = wide != x.dtype if remainder is None else remainder
    return jnp.zeros(x.shape, wide) if keeps else optax.MaskedNode()


def _rounded(
    x: jax.Array, exact: jax.Array, change: jax.Array, target: jax.Array | None, rest: Any
) -> tuple[jax.Array, Any]:
    """The update of a parameter in its own dtype, and what rounding will take from the sum."""
    if isinstance(rest, optax.MaskedNode):
        return change.astype(x.dtype), rest
    wide, limits = x.astype(rest.dtype), jnp.finfo(x.dtype)
    target = exact + change if target is None else target
    update = (target - wide).astype(x.dtype)
    # As the sum will be in memory: inside a computation, XLA keeps more digits of it.
    new = jax.lax.reduce_precision(wide + update.astype(rest.dtype), limits.nexp, limits.nmant)
    return update, target - new
