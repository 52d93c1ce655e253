"""What a leaf of a Flax tree is called in PyTorch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from wnjax._axes import first_patterns

# The last part of a name, where the two differ.
PARAMETERS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
COLLECTIONS = ("params", "batch_stats")


@dataclasses.dataclass(frozen=True)
class Part:
    """One of several equal parts of a PyTorch parameter, along its first axis.

    Attributes:
      name: of the PyTorch parameter; or of several, of which the leaf is the sum: PyTorch's LSTM
        has two biases where Flax has one.
      index: which part.
      count: of how many.

    >>> from wnjax.pytorch import Part
    >>> Part("lstm.weight_ih_l0", 1, 4)  # the forget gate
    Part(name='lstm.weight_ih_l0', index=1, count=4)
    """

    name: str | tuple[str, ...]
    index: int = 0
    count: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return (self.name,) if isinstance(self.name, str) else self.name


Names: TypeAlias = Mapping[str, str | Part | None] | Callable[[str], str | Part | None]


def parts_of(given: Names | None, paths: Sequence[str]) -> list[Part | None]:
    """What PyTorch calls every leaf; None for one that it does not have.

    Raises:
      ValueError: if a pattern matches no leaf or never applies.
    """
    if callable(given):
        return [_part(given(path), path) for path in paths]
    given = given or {}
    firsts = first_patterns(given, paths, "names")
    return [
        _part(path if first is None else _expanded(given[first], first, path), path)
        for path, first in zip(paths, firsts, strict=True)
    ]


def _expanded(name: str | Part | None, pattern: str, path: str) -> str | Part | None:
    match = re.fullmatch(pattern, path)
    if match is None:
        return None
    if isinstance(name, Part):
        return dataclasses.replace(name, name=tuple(map(match.expand, name.names)))
    return match.expand(name) if isinstance(name, str) else name


def _part(name: str | Part | None, path: str) -> Part | None:
    if name is None:
        return None
    if isinstance(name, Part):
        return dataclasses.replace(name, name=tuple(map(_torch_name, name.names)))
    if not isinstance(name, str):
        raise TypeError(f"names: {path} must be given a string, a Part or None, got {name!r}")
    return Part((_torch_name(name),))


def _torch_name(name: str) -> str:
    *modules, last = name.replace("/", ".").split(".")
    return ".".join([*modules, PARAMETERS.get(last, last)])


def without_collections(paths: Sequence[str]) -> list[str]:
    """The paths inside of `params` and `batch_stats`, if the tree is Flax's `variables`."""
    if not all(path.split("/")[0] in COLLECTIONS for path in paths):
        return list(paths)
    return [path.partition("/")[2] for path in paths]


def lstm(
    path: str, name: str, *, layer: int = 0, reverse: bool = False, fused: bool = False
) -> dict[str, Part]:
    """The `names` of an LSTM cell's leaves: rules to be merged into others.

    Flax has one bias where PyTorch has two: it gets their sum, and on the way back the first gets
    all of it, the second zeros. (Two biases learn twice as fast as their sum.)

    Args:
      path: of the Flax cell: `LSTMCell` or `OptimizedLSTMCell`, of Linen or NNX.
      name: of the `torch.nn.LSTM`.
      layer: which of its layers.
      reverse: whether its reverse direction.
      fused: for `nnx.OptimizedLSTMCell`, which keeps its gates together, as PyTorch does.

    Returns:
      A dict from patterns to `Part`s.

    >>> from wnjax.pytorch import lstm
    >>> lstm("rnn/cell", "rnn")["rnn/cell/hg/kernel"]
    Part(name='rnn.weight_hh_l0', index=2, count=4)
    """
    end = f"l{layer}_reverse" if reverse else f"l{layer}"
    biases = (f"{name}.bias_ih_{end}", f"{name}.bias_hh_{end}")
    if fused:
        return {
            f"{path}/dense_i/kernel": Part(f"{name}.weight_ih_{end}"),
            f"{path}/dense_h/kernel": Part(f"{name}.weight_hh_{end}"),
            f"{path}/dense_h/bias": Part(biases),
        }
    rules = {}
    for index, gate in enumerate(("i", "f_?", "g", "o")):  # `if` is no name for an NNX attribute
        rules[f"{path}/i{gate}/kernel"] = Part(f"{name}.weight_ih_{end}", index, 4)
        rules[f"{path}/h{gate}/kernel"] = Part(f"{name}.weight_hh_{end}", index, 4)
        rules[f"{path}/h{gate}/bias"] = Part(biases, index, 4)
    return rules
