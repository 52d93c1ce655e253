"""The entries of a PyTorch state dict: plain parameters, and (g, v) in either of two styles."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Entry(NamedTuple):
    """A parameter of a state dict.

    Attributes:
      v: its value, or v where it is normalized.
      g: None where it is not.
      v_name: what v is called there.
      g_name: what g is called, or would be.
    """

    v: np.ndarray
    g: np.ndarray | None
    v_name: str
    g_name: str


class Missing(Exception):
    """A parameter that is not in the state dict."""


class Misfit(Exception):
    """A parameter that is, but cannot be used; the message says why."""


def by_suffix(name: str) -> tuple[str, str]:
    """What `torch.nn.utils.weight_norm` calls g and v of a parameter."""
    return f"{name}_g", f"{name}_v"


def by_parametrization(name: str) -> tuple[str, str]:
    """What `torch.nn.utils.parametrizations.weight_norm` calls them."""
    module, _, parameter = name.rpartition(".")
    path = ".".join(filter(None, (module, "parametrizations", parameter)))
    return f"{path}.original0", f"{path}.original1"


STYLES = {"parametrizations": by_parametrization, "weight_g": by_suffix}


class StateDict:
    """A state dict that is read from, and knows what was.

    Attributes:
      values: the arrays by their names, without the prefix.
      left: the names that nothing has asked for yet.
    """

    def __init__(self, source: Any, prefix: str):
        values = _opened(source)
        self.prefix = prefix
        self.values = {
            name.removeprefix(prefix): value
            for name, value in values.items()
            if name.startswith(prefix)
        }
        if values and not self.values:
            raise ValueError(
                f"no name in the state dict begins with the prefix {prefix!r}; they begin like "
                f"{', '.join(list(values)[:3])}"
            )
        # PyTorch counts batches where it keeps running averages; nothing reads the count.
        counts = (name for name in self.values if name.endswith("num_batches_tracked"))
        self.left = set(self.values).difference(counts)

    def entry(self, name: str) -> Entry:
        """The parameter of a name, in whichever form it is there."""
        forms = {
            style: [key for key in names(name) if key in self.values]
            for style, names in {"plain": lambda name: (name,), **STYLES}.items()
        }
        found = {style: keys for style, keys in forms.items() if keys}
        self.left.difference_update(*found.values())
        if not found:
            raise Missing
        if len(found) > 1:
            keys = [key for keys in found.values() for key in keys]
            raise Misfit(
                f"{name} is there in {len(found)} forms: {', '.join(keys)}. Keep one of them"
            )
        ((style, keys),) = found.items()
        if style == "plain":
            return Entry(self._array(name), None, name, by_suffix(name)[0])
        g_name, v_name = STYLES[style](name)
        if len(keys) < 2:
            there, lacking = (g_name, v_name) if keys == [g_name] else (v_name, g_name)
            raise Misfit(f"{there} is there without {lacking}")
        return Entry(self._array(v_name), self._array(g_name), v_name, g_name)

    def _array(self, name: str) -> np.ndarray:
        return as_numpy(name, self.values[name])


def _opened(source: Any) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            "the state dict must be a mapping from names to arrays or the path of a safetensors "
            f"file, got a {type(source).__name__}"
        )
    if not str(source).endswith(".safetensors"):
        raise ValueError(
            f"{source} is no .safetensors file; of one that torch.save has written, pass "
            "torch.load(path, weights_only=True)"
        )
    try:
        from safetensors.flax import load_file  # noqa: PLC0415 - the library does without
    except ImportError as error:
        raise ImportError(f"{source}: pip install safetensors to read it") from error
    loaded: Mapping[str, Any] = load_file(source)
    return loaded


def as_numpy(name: str, value: Any) -> np.ndarray:
    """An array, or a PyTorch tensor on any device, as a numpy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        is_bfloat16 = str(value.dtype) == "torch.bfloat16"  # which numpy() refuses
        value = value.float().numpy().astype(jnp.bfloat16) if is_bfloat16 else value.numpy()
    if isinstance(value, Mapping) or not hasattr(value, "dtype"):
        raise TypeError(
            f"{name} in the state dict is a {type(value).__name__}, no array. A checkpoint that "
            "holds state dicts among other things: pass the state dict itself"
        )
    return np.asarray(value)
