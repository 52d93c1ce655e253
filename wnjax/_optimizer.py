"""`weight_normalized`: an optimizer of (g, v) behind plain parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from wnjax._axes import Axes, is_part_of_tree, weights_of
from wnjax._axis_name import AxisName, split_over
from wnjax._chain_rule import View, chain_rule, step_back
from wnjax._leaves import box_node, flatten, listing, rebox, unbox, unbox_node
from wnjax._nodes import FanIn, WeightNorm, norm_dtype, root, sum_of_squares
from wnjax._weight_norm import check_floating, fold


class WeightNormalizedState(NamedTuple):
    """The state of `weight_normalized`.

    Attributes:
      inner: the state of the optimizer, for a tree with nodes.
      lengths: shaped like the parameters: for a weight a node, of which g is the number sign(g)·‖v‖
        of each neuron, and v what rounding took from w; for another leaf the latter alone.
        What is not kept is `optax.MaskedNode()`.
    """

    inner: Any
    lengths: Any


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

    the optimizer sees a tree of `WeightNorm` nodes, so that masks, `labels` and decay of g or v
    work in it, and what comes out is the change of w = g·v/‖v‖, without cancellation.

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
      optimizer: any optax transformation. Extra arguments of `update` are passed on to it, but
        `value_fn` as a function of nodes, and `grad` mapped as the gradients are.
      axes: as for `weight_norm`. Leaves that `optax.masked` or `optax.multi_transform` around
        this mask are left out.
      remainder: whether to keep, in float32 or wider, what rounding takes from the parameters: an
        array of the size of each. If None, of those below float32, which lose small updates.
      axis_name: inside `shard_map`, over which mesh axes the fan-in axes are split, as for
        `weight_norm`. Gradients must be those of the shards.

    Returns:
      A gradient transformation. Its `update` needs `params`.

    Raises:
      ValueError: by `init` and `update`: if nothing is normalized, if axes do not fit, if `params`
        hold nodes (which `optimizer` itself trains), or are missing; and as `fold`, with the
        lengths for g.

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

    def init(params: chex.ArrayTree) -> WeightNormalizedState:
        plain = _Plain(params, axes, axis_name)
        kept = [_rest(x, remainder) for x in plain.arrays]
        nodes = plain.exact(kept)
        for i, fan_in in plain.fan_in.items():
            w = nodes[i]
            length = root(sum_of_squares(w, fan_in))
            nodes[i] = chain_rule(w, w, length, fan_in)[0].node
            kept[i] = WeightNorm(length, kept[i])
        return WeightNormalizedState(inner.init(plain.tree(nodes)), plain.treedef.unflatten(kept))

    def update(
        updates: chex.ArrayTree,
        state: WeightNormalizedState,
        params: chex.ArrayTree | None = None,
        **extra: Any,
    ) -> tuple[chex.ArrayTree, WeightNormalizedState]:
        if params is None:
            raise ValueError("weight_normalized reads the directions off the params: pass them")
        plain = _Plain(params, axes, axis_name, state.lengths)
        kept = plain.treedef.flatten_up_to(state.lengths)
        lengths = {i: kept[i].g for i in plain.fan_in}
        rests = [rest.v if i in lengths else rest for i, rest in enumerate(kept)]
        exact = plain.exact(rests)
        views, grads = plain.chain_rule(exact, lengths, updates)
        if "grad" in extra:
            extra["grad"] = plain.chain_rule(exact, lengths, extra["grad"])[1]
        if value_fn := extra.get("value_fn"):

            def value_of_nodes(tree: chex.ArrayTree, *args: Any, **kwargs: Any) -> Any:
                return value_fn(fold(tree, axis_name=axis_name), *args, **kwargs)

            extra["value_fn"] = value_of_nodes
        nodes = plain.tree([views[i].node if i in views else x for i, x in enumerate(exact)])
        changes, inner_state = inner.update(grads, state.inner, nodes, **extra)
        result = []
        for i, (_, leaf) in enumerate(flatten(changes)[0]):
            if i in views:
                step = step_back(views[i], unbox_node(leaf))
                change, target = step.change, step.weight
            else:
                change, target = unbox(leaf), None
            change, rest = _rounded(plain.arrays[i], exact[i], change, target, rests[i])
            kept[i] = WeightNorm(step.length, rest) if i in views else rest
            result.append(rebox(plain.leaves[i], change))
        state = WeightNormalizedState(inner_state, plain.treedef.unflatten(kept))
        return plain.treedef.unflatten(result), state

    return optax.GradientTransformationExtraArgs(init, update)


class _Plain:
    """Plain parameters, and which of their leaves are weights.

    Attributes:
      leaves: with their boxes.
      arrays: without.
      features: by leaf that is a weight: its feature axes.
      fan_in: likewise: what its neurons sum over.
    """

    def __init__(
        self, params: chex.ArrayTree, axes: Axes, axis_name: AxisName, lengths: Any = None
    ):
        pairs, self.treedef = flatten(params)
        paths = [path for path, _ in pairs]
        self.leaves = [leaf for _, leaf in pairs]
        if normalized := [path for path, leaf in pairs if unbox_node(leaf) is not None]:
            raise ValueError(
                "weight_normalized: these leaves are weight-norm nodes already; give the tree to "
                f"the optimizer itself:{listing(normalized)}"
            )
        self.features = weights_of(params, axes)
        for i in self.features:
            check_floating(paths[i], unbox(self.leaves[i]))
        self.arrays = [jnp.asarray(unbox(leaf)) for leaf in self.leaves]
        known = {} if lengths is None else dict(enumerate(self.treedef.flatten_up_to(lengths)))
        weights = {i: (known[i].g if known else None, self.arrays[i]) for i in self.features}
        mesh_axes = split_over(axis_name, paths, weights, is_part=is_part_of_tree(params))
        self.fan_in = {
            i: FanIn(tuple(a for a in range(w.ndim) if a not in self.features[i]), mesh_axes[i])
            for i, (_, w) in weights.items()
        }

    def exact(self, rests: Sequence[Any]) -> list[Any]:
        """The arrays, with what rounding took from them; weights in the dtype of the norms."""
        return [
            x.astype(rest.dtype) + rest
            if not isinstance(rest, optax.MaskedNode)
            else x.astype(norm_dtype(x.dtype))
            if i in self.fan_in
            else x
            for i, (x, rest) in enumerate(zip(self.arrays, rests, strict=True))
        ]

    def chain_rule(
        self, exact: Sequence[Any], lengths: Mapping[int, jax.Array], grads: chex.ArrayTree
    ) -> tuple[dict[int, View], Any]:
        """The weights as g and v, and the gradients as a tree with theirs."""
        views: dict[int, View] = {}
        leaves: list[Any] = []
        for i, ((_, leaf), x) in enumerate(zip(flatten(grads)[0], exact, strict=True)):
            leaves.append(unbox(leaf).astype(x.dtype))
            if i in lengths:
                views[i], leaves[i] = chain_rule(x, leaves[i], lengths[i], self.fan_in[i])
        return views, self.tree(leaves)

    def tree(self, values: Sequence[Any]) -> Any:
        """Arrays, and nodes in the place of weights, in the boxes of the parameters."""
        return self.treedef.unflatten(
            _boxed(leaf, value, self.features[i]) if i in self.features else rebox(leaf, value)
            for i, (leaf, value) in enumerate(zip(self.leaves, values, strict=True))
        )


def _boxed(leaf: Any, node: WeightNorm, features: tuple[int, ...]) -> Any:
    """A node in the box of its weight; in two, where `nnx.Optimizer` expects arrays in them."""
    boxed = box_node(leaf, node, features)
    if isinstance(boxed, nnx.Variable):
        return WeightNorm(*(rebox(leaf, array) for array in node))
    return boxed


def _rest(x: jax.Array, remainder: bool | None) -> Any:
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
