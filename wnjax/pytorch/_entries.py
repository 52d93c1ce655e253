"""The entries of a PyTorch state dict: plain parameters, and (g, v) in either of two styles."""

from __future__ import annotations

import collections
import os
from collections.abc import Mapping, Sequence
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


class Untold(Exception):
    """A parameter that fits in two orders of axes, and nothing tells in which it is."""


class StateDict:
    """A state dict that is read from, and knows what was.

    Attributes:
      prefix: of the names that are read.
      names: all of them, with their prefixes.
      values: the arrays by their names, without the prefix.
      left: the names that nothing has asked for yet.
      found: whether anything that was asked for is there.
    """

    def __init__(self, source: Any, prefix: str):
        check_prefix(prefix)
        values = opened(source, prefix)
        self.prefix = prefix
        self.names = list(values)
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
        self.found = False

    def entry(self, name: str) -> Entry:
        """The parameter of a name, in whichever form it is there."""
        pairs = {style: keys(name) for style, keys in STYLES.items()}
        found = [[key for key in pair if key in self.values] for pair in pairs.values()]
        if name in self.values:
            found = [[name], *(keys for keys in found if len(keys) == 2)]
        found = [keys for keys in found if keys]
        self.left.difference_update(*found)
        if not found:
            raise Missing
        self.found = True
        if len(found) > 1:
            keys = ", ".join(key for keys in found for key in keys)
            raise Misfit(f"{name} is there in {len(found)} forms: {keys}. Keep one of them")
        if found == [[name]]:
            return Entry(self._array(name), None, name, by_suffix(name)[0])
        g_name, v_name = next(pair for pair in pairs.values() if found[0][0] in pair)
        for there, lacking in ((v_name, g_name), (g_name, v_name)):
            if lacking not in self.values:
                raise Misfit(f"{there} is there without {lacking}{self._spectral(name)}")
        return Entry(self._array(v_name), self._array(g_name), v_name, g_name)

    def _spectral(self, name: str) -> str:
        is_spectral = f"{name}_orig" in self.values
        return ". This is spectral norm: remove it in PyTorch first" if is_spectral else ""

    def prefix_of(self, names: Sequence[str]) -> str:
        """The prefix with which most of the names would be there; "" if with none."""
        counts: collections.Counter[str] = collections.Counter()
        for name in names:
            keys = [name, *(key for of in STYLES.values() for key in of(name))]
            ends = tuple(f".{key}" for key in keys)
            there = [other for other in self.values if other.endswith(ends)]
            counts.update({o.removesuffix(end) for o in there for end in ends if o.endswith(end)})
        [(prefix, count)] = counts.most_common(1) or [("", 0)]
        return f"{self.prefix}{prefix}." if 2 * count > len(names) else ""

    def _array(self, name: str) -> np.ndarray:
        return as_numpy(name, self.values[name])


def opened(source: Any, prefix: str) -> Mapping[str, Any]:
    """The arrays by name; of a file, only those with the prefix, and None for others.

    Raises:
      ValueError: if the path is that of another file.
      TypeError: if `source` is no mapping from strings to arrays and no path.
    """
    if isinstance(source, Mapping):
        _check_names(source)
        return source
    if not isinstance(source, str | os.PathLike):
        is_module = callable(getattr(source, "state_dict", None))
        raise TypeError(
            "the state dict must be a mapping from names to arrays or the path of a safetensors "
            f"file, got a {type(source).__name__}"
            + (". Pass what its .state_dict() returns" if is_module else "")
        )
    if str(source).endswith(".index.json"):
        is_safe = str(source).endswith(".safetensors.index.json")
        load = (
            "safetensors.numpy.load_file(file)"
            if is_safe
            else "torch.load(file, weights_only=True)"
        )
        raise ValueError(
            f"{source} lists the files of a checkpoint that is in several. Pass the arrays of all: "
            f"{{name: x for file in files for name, x in {load}.items()}}"
        )
    if not str(source).endswith(".safetensors"):
        raise ValueError(
            f"{source} is no .safetensors file; of one that torch.save has written, pass "
            "torch.load(path, weights_only=True)"
        )
    try:
        from safetensors import safe_open  # noqa: PLC0415 - the library does without
    except ImportError as error:
        raise ImportError(f"{source}: pip install safetensors to read it") from error
    with safe_open(source, "numpy") as file:
        return {
            name: file.get_tensor(name) if name.startswith(prefix) else None
            for name in file.keys()  # noqa: SIM118 - a file is no mapping
        }


def check_prefix(prefix: Any) -> None:
    """Raises TypeError if a prefix is no string."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {prefix!r}")


def _check_names(values: Mapping[Any, Any]) -> None:
    for name, value in values.items():
        if not isinstance(name, str) or isinstance(value, Mapping):
            kind = f"is a {type(value).__name__}" if isinstance(name, str) else "is no name"
            raise TypeError(
                f"{name!r} in the state dict {kind}. Of a checkpoint that holds state dicts "
                "among other things, pass the state dict itself"
            )


def as_numpy(name: str, value: Any) -> np.ndarray:
    """An array, or a PyTorch tensor on any device, as a numpy array.

    Raises:
      TypeError: if it is neither, or holds no numbers, or is a tensor that numpy cannot hold.
    """
    if hasattr(value, "detach"):
        value = _tensor_as_numpy(name, value)
    if not hasattr(value, "dtype"):
        raise TypeError(f"{name} in the state dict is a {type(value).__name__}, no array")
    if not is_numeric(value.dtype):
        raise TypeError(f"{name} in the state dict is an array of {value.dtype}, not of numbers")
    return np.asarray(value)


def _tensor_as_numpy(name: str, tensor: Any) -> np.ndarray:
    try:
        tensor = tensor.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":  # which numpy() refuses
            return np.asarray(tensor.float().numpy().astype(jnp.bfloat16))
        return np.asarray(tensor.numpy())
    except (TypeError, RuntimeError) as error:  # sparse, quantized, without data
        raise TypeError(
            f"{name} in the state dict does not become a numpy array: {error}"
        ) from error


def is_numeric(dtype: Any) -> bool:
    """Whether a dtype is one of numbers, or bool."""
    return bool(jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_))
