"""`infer_layouts`: the layouts of kernels, told by the equations that consume them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from wnjax._analysis.functions import Analyzer
from wnjax._analysis.jaxprs import JaxprAnalyzer
from wnjax._analysis.layout import Atom, Axis
from wnjax._analysis.views import Info, LeafView, Use
from wnjax._transforms.arguments import params_of_call
from wnjax.pytorch._layouts import Layout, name_of
from wnjax.pytorch._names import without_collections


def infer_layouts(fn: Callable[..., Any]) -> Callable[..., dict[str, str | Layout]]:
    """Makes a function that tells the `layouts` of a model's kernels.

    It takes the arguments of `fn`, and traces `fn(params, *args, **kwargs)`. A kernel with as many
    inputs as outputs has the same shape in a convolution and in a transposed one, and PyTorch keeps
    the two in different orders. The equation that consumes the kernel tells which it is. Nothing
    is computed: tracing needs shapes and dtypes alone.

    Args:
      fn: the forward function, as for `wnjax.infer_axes`, such as
        `lambda params, x: model.apply({"params": params}, x)`.

    Returns:
      A function of the arguments of `fn`. `params`, the first, is the tree that is to be filled or
      written: its arrays, or their `jax.ShapeDtypeStruct`s; parameters, or whole Linen variables.
      The others are arrays or `jax.ShapeDtypeStruct`s; anything else is static. It returns the
      `layouts` argument of `from_state_dict` and `to_state_dict`. That names the weights of
      convolutions, and the kernels with three or more axes of matrix products, such as attention's
      `out`. It leaves out those whose axes the equations do not show one by one, and those that
      are used in two ways. Own layouts go before: `{"alpha": "channels1d"} | inferred`.

    Raises:
      ValueError: when that is called: if `fn` needs values of the data, or uses axis names that
        nothing binds.

    >>> import flax.linen as nn
    >>> import jax, jax.numpy as jnp
    >>> import wnjax
    >>> model = nn.Sequential([nn.ConvTranspose(4, (4,), (2,)), nn.Conv(4, (3,))])
    >>> x = jnp.ones((1, 8, 4))
    >>> params = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> wnjax.pytorch.infer_layouts(model.apply)(params, x)
    {'layers_0/kernel': 'conv_transpose', 'layers_1/kernel': 'conv'}
    """
    analyze = Analyzer(fn)

    def inferred(*args: Any, **kwargs: Any) -> dict[str, str | Layout]:
        params, args, kwargs = params_of_call(fn, args, kwargs)
        analysis = analyze(params, *args, **kwargs)
        records = _Convolutions([getattr(array, "shape", ()) for array in analysis.arrays])
        records.analyze(analysis.traced.jaxpr, analysis.infos)
        for use in analysis.records.uses:
            if _is_linear(use, analysis.paths[use.leaf]):
                layout = Layout((tuple(sorted(use.features)), tuple(sorted(use.fan_in))))
                records.found.setdefault(use.leaf, set()).add(layout)
        inside = without_collections(analysis.paths)
        return {
            re.escape(inside[leaf]): name_of(layout)
            for leaf, layouts in sorted(records.found.items())
            for layout in layouts
            if layout is not None and len(layouts) == 1
        }

    return inferred


def _is_linear(use: Use, path: str) -> bool:
    """Whether a kernel with three or more axes is that of a linear layer: attention's, say."""
    is_kernel = path.rpartition("/")[2] == "kernel" and len(use.fan_in | use.features) > 2
    is_product = use.site.operation == "dot_general" and use.refusal is None
    return is_kernel and is_product and not use.site.is_backward


class _Convolutions(JaxprAnalyzer):
    """A analysis that writes down how convolutions take their kernels.

    Attributes:
      found: the layouts of every leaf, one for each way in which it is used, None where the
        axes cannot be told.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        super().__init__(shapes)
        self.found: dict[int, set[Layout | None]] = {}

    def equation(self, eqn: Any, ins: Sequence[Info]) -> list[Info]:
        """What is known of the outputs of one equation."""
        if eqn.primitive.name == "conv_general_dilated" and not self.site(eqn).is_backward:
            for view in ins[1].views:
                self.found.setdefault(view.leaf, set()).add(self._layout(eqn, view))
        return super().equation(eqn, ins)

    def _layout(self, eqn: Any, view: LeafView) -> Layout | None:
        """The order in which PyTorch keeps a kernel; None if the equation does not show it."""
        shape = self.shape(view.leaf)
        places = [_place(axis, shape) for axis in view.layout]
        found = [place for place in places if place is not None]
        if sorted(axis for axis, _ in found) != list(range(len(shape))) or None in places:
            return None
        (outputs, _), (inputs, _), *taps = (
            found[dim] for dim in eqn.params["dimension_numbers"].rhs_spec
        )
        is_transposed = _is_transposed(eqn)
        is_grouped = eqn.params["feature_group_count"] > 1
        is_unclear = (
            any(is_reversed for _, is_reversed in taps) or eqn.source_info.traceback is None
        )
        if is_grouped if is_transposed else is_unclear:
            return None
        first, second = (inputs, outputs) if is_transposed else (outputs, inputs)
        flipped = tuple(axis for axis, is_reversed in taps if is_transposed and not is_reversed)
        return Layout(((first,), (second,), *((axis,) for axis, _ in taps)), flipped)


def _place(axis: Axis, shape: Sequence[int]) -> tuple[int, bool] | None:
    """The axis of the leaf that an axis of the kernel is, and whether in reverse."""
    match axis.atoms:
        case (Atom(int(of), 1 | -1 as stride, size),) if size == axis.size == shape[of]:
            return of, stride < 0
    return None


def _is_transposed(eqn: Any) -> bool:
    """Whether a convolution is a transposed one: it stretches its input, or JAX calls it so.

    With strides of 1 the two are the same equation. Then the call of `jax.lax.conv_transpose`, in
    the equation's traceback, tells.
    """
    traceback = eqn.source_info.traceback
    calls = [frame.function_name for frame in traceback.frames] if traceback else []
    return any(size > 1 for size in eqn.params["lhs_dilation"]) or "conv_transpose" in calls
