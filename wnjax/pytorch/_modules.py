"""The layouts of kernels, told by the NNX modules that hold them."""

from __future__ import annotations

from flax import nnx

from wnjax.nnx import WeightNorm
from wnjax.pytorch._layouts import Layout, name_of


def layouts_of_modules(model: nnx.Module | None) -> dict[str, str | Layout]:
    """The layout of every kernel of which a module of `model` tells it, by the kernel's path.

    Raises:
      TypeError: if `model` is not an NNX module.
    """
    if model is None:
        return {}
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx.Module, got a {type(model).__name__}. Of a Linen module or a "
            "function, pass layouts=wnjax.pytorch.infer_layouts(fn)(params, x)"
        )
    inside = model.layer_instance if isinstance(model, WeightNorm) else model
    found = {}
    for path, module in nnx.iter_modules(inside):
        layout = _layout(module)
        if layout is not None:
            found["/".join(map(str, (*path, "kernel")))] = layout
    return found


def _layout(module: nnx.Module) -> str | Layout | None:
    """What a module of Flax says of its kernel; None of one that says nothing, or of a stack."""
    if isinstance(module, nnx.Conv | nnx.ConvTranspose):
        is_one = module.kernel.ndim == len(module.kernel_size) + 2
        is_flipped = isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel
        return ("conv_transpose" if is_flipped else "conv") if is_one else None
    if isinstance(module, nnx.LinearGeneral) and not module.batch_axis:
        inputs = len(module.in_features)
        rank = inputs + len(module.out_features)
        layout = Layout((tuple(range(inputs, rank)), tuple(range(inputs))))
        return name_of(layout) if module.kernel.ndim == rank else None
    return None
