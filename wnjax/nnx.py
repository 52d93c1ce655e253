"""Weight normalization as NNX modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from wnjax._axes import Axes, Neuron, canonical_axes, decide
from wnjax._leaves import flatten, listing, rebox, unbox, unbox_node
from wnjax._neurons import neurons
from wnjax._nodes import WeightNorm as Node
from wnjax._nodes import weight
from wnjax._weight_norm import weight_norm


class WeightNorm(nnx.Module):
    """A module whose weights are normalized: w = g·v/‖v‖.

    A drop-in for `flax.nnx.WeightNorm` that computes what the module computed, whose g is among
    the `nnx.Param`s and trains, and which never writes to v. The module's own Params
    hold v where they held w; the Params in `g` have the same paths, v's rank, and
    size 1 on the fan-in axes.

    Which Params are weights, and over which axes their norms run, is traced when the module
    is first called. Until then Flax's naming rules hold; they are right for `nnx.Linear`,
    `nnx.Conv` and `nnx.MultiHeadAttention`, so that an optimizer may be made at once. Where they
    were not, the first call takes the norms anew without changing the function; make
    optimizers after it, or pass `axes`.

    Source: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868, equation 2.

    Attributes:
      layer_instance: the module, with v in the place of its weights.
      g: the gains: nested dicts of `nnx.Param`, by the paths of the weights.
      needs_check: whether tracing has not yet confirmed the axes.

    >>> import jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> import wnjax
    >>> layer = wnjax.nnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    >>> layer(jnp.ones((2, 3))).shape
    (2, 4)
    >>> layer.g["kernel"].shape
    (1, 4)
    >>> optimizer = nnx.Optimizer(layer, optax.adam(1e-3), wrt=nnx.Param)
    >>> grads = nnx.grad(lambda layer: layer(jnp.ones((2, 3))).sum())(layer)
    >>> _ = optimizer.update(layer, grads)
    """

    def __init__(self, layer_instance: nnx.Module, axes: Axes | str = "traced"):
        """Normalizes a module.

        Args:
          layer_instance: the module: a layer, or a whole network. It becomes part of this one.
          axes: which of its Params are weights, in any form that `wnjax.weight_norm` takes, with
            paths inside the module; `"traced"` finds them by `wnjax.neurons` at the first call.

        Raises:
          ValueError: if no Param is a weight, or if the axes do not fit; see `weight_norm`.
        """
        self.layer_instance = layer_instance
        self.g: Any = nnx.Dict()
        chosen = None if isinstance(axes, str) else axes
        self.needs_check = isinstance(axes, str)
        decisions = decide(nnx.state(layer_instance, nnx.Param), chosen)
        if not self.needs_check or any(isinstance(what, Neuron) for _, _, what in decisions):
            self._normalize(chosen)

    def __call__(
        self, *args: Any, method: str | Callable[..., Any] | None = None, **kwargs: Any
    ) -> Any:
        """Calls the module, or one of its methods.

        Args:
          *args: go to the module.
          method: the name of one of its methods, or a function whose first argument it is; else
            `__call__`.
          **kwargs: go to the module.

        Returns:
          What the module returns.

        Raises:
          ValueError: if this is the first call, in `jit` or another transformation, and tracing
            finds other axes than the naming rules did; or if no Param is a weight.
        """
        if self.needs_check:
            self._check(method, args, kwargs)
        layer = self.folded()
        result = _call(layer, method, args, kwargs)
        nnx.update(self.layer_instance, nnx.state(layer, nnx.Not(nnx.Param)))
        return result

    def folded(self) -> Any:
        """The module with plain weights w = g·v/‖v‖: a copy, which is what one serves."""
        graph, params, rest = _split(self.layer_instance)
        gains = {path: unbox(g) for path, g in flatten(nnx.state(self.g))[0]}
        boxes, treedef = flatten(params)
        weights = treedef.unflatten(
            rebox(box, weight(Node(gains[path], unbox(box))) if path in gains else unbox(box))
            for path, box in boxes
        )
        return nnx.merge(graph, weights, rest, copy=True)

    def _normalize(self, axes: Any) -> None:
        """Takes v and g from what the Params hold now, which is w."""
        params = nnx.state(self.layer_instance, nnx.Param)
        gains: dict[str, Any] = {}
        vs = []
        boxes, treedef = flatten(weight_norm(params, axes))
        for path, box in boxes:
            if (node := unbox_node(box)) is None:
                vs.append(box)
                continue
            outer_g, outer_v = (box.g, box.v) if isinstance(box, Node) else (box, box)
            *modules, name = path.split("/")
            place = gains
            for module in modules:
                place = place.setdefault(module, {})
            place[name] = rebox(outer_g, node[0])
            vs.append(rebox(outer_v, node.v))
        nnx.update(self.layer_instance, treedef.unflatten(vs))
        self.g = _dicts(gains)

    def _check(self, method: Any, args: Any, kwargs: Any) -> None:
        """Compares the gains with what tracing finds, and takes them anew if they differ."""
        layer = self.folded()
        features = _traced_features(layer, method, args, kwargs)
        weights = {path: unbox(w) for path, w in flatten(nnx.state(layer, nnx.Param))[0]}
        wanted = {
            path: tuple(n if i in axes else 1 for i, n in enumerate(weights[path].shape))
            for path, axes in features.items()
        }
        shapes = {path: unbox(g).shape for path, g in flatten(nnx.state(self.g))[0]}
        values = jax.tree.leaves((nnx.state(self.layer_instance), args, kwargs))
        is_transformed = any(isinstance(value, jax.core.Tracer) for value in values)
        if wanted != shapes and is_transformed:
            differing = [path for path in wanted | shapes if wanted.get(path) != shapes.get(path)]
            raise ValueError(
                "WeightNorm: tracing finds other feature axes than Flax's naming rules for these "
                f"Params:{listing(differing)}\nCall the module once outside of jit, grad and other "
                "transformations, before an optimizer is made, or pass axes to WeightNorm"
            )
        if wanted != shapes:
            nnx.update(self.layer_instance, nnx.state(layer, nnx.Param))
            self._normalize({re.escape(path): axes for path, axes in features.items()})
        # In jit, a change of what is static would compile the next call again.
        self.needs_check = is_transformed


def _traced_features(layer: Any, method: Any, args: Any, kwargs: Any) -> dict[str, tuple[int, ...]]:
    """The feature axes of the weights by path, as tracing a call of a plain module finds them."""
    graph, params, rest = _split(layer)

    def fn(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        merged = nnx.merge(graph, params, rest, copy=True)
        result = _call(merged, method, args, kwargs)
        return result, nnx.state(merged, nnx.Not(nnx.Param))

    return {
        path: canonical_axes(path, leaf, what.feature_axes)
        for path, leaf, what in decide(params, neurons(fn, params, rest, args, kwargs))
        if isinstance(what, Neuron)
    }


def _split(layer: Any) -> Any:
    """What is static of a module, its Params, and the rest of its state."""
    return nnx.split(layer, nnx.Param, ...)


def _call(layer: Any, method: Any, args: Any, kwargs: Any) -> Any:
    if callable(method):
        return method(layer, *args, **kwargs)
    return getattr(layer, method or "__call__")(*args, **kwargs)


def _dicts(tree: Any) -> Any:
    return nnx.Dict({k: _dicts(x) for k, x in tree.items()}) if isinstance(tree, dict) else tree
