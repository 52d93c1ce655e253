"""What a leaf of a Flax tree is called in PyTorch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from wnjax._axes.decisions import first_patterns

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

    Raises:
      TypeError: if a name is no string.
      ValueError: if there is no such part.

    >>> from wnjax.pytorch import Part
    >>> Part("lstm.weight_ih_l0", 1, 4)  # the forget gate
    Part(name='lstm.weight_ih_l0', index=1, count=4)
    """

    name: str | tuple[str, ...]
    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not isinstance(self.name, str | tuple) or not all(
            isinstance(n, str) for n in self.names
        ):
            raise TypeError(f"Part: name must be a string or a tuple of strings, got {self.name!r}")
        if not 0 <= self.index < self.count:
            raise ValueError(f"Part: there is no part {self.index} of {self.count}, from 0 on")

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return (self.name,) if isinstance(self.name, str) else self.name


Names: TypeAlias = Mapping[str, str | Part | None] | Callable[[str], str | Part | None]


def parts_of(given: Names | None, paths: Sequence[str]) -> list[Part | None]:
    """What PyTorch calls every leaf; None for one that it does not have.

    Raises:
      ValueError: if a pattern matches no leaf or never applies, or has no such group.
      TypeError: if a name is neither a string, nor a `Part`, nor None.
    """
    if callable(given):
        return [_part(given(path), path) for path in paths]
    given = given or {}
    firsts = first_patterns(given, paths, "names")
    return [
        Part(_translated(path)) if first is None else _part(given[first], path, first)
        for path, first in zip(paths, firsts, strict=True)
    ]


def _part(name: Any, path: str, pattern: str | None = None) -> Part | None:
    if name is None:
        return None
    if not isinstance(name, str | Part):
        raise TypeError(f"names: {path} must be given a string, a Part or None, got {name!r}")
    part = Part(name) if isinstance(name, str) else name
    if pattern is None:
        return part
    return dataclasses.replace(
        part, name=tuple(_expanded(each, pattern, path) for each in part.names)
    )


def _expanded(template: str, pattern: str, path: str) -> str:
    """A rule's name for a path. Its last part is translated if it comes from the path."""
    match = re.fullmatch(pattern, path)
    try:
        name = match.expand(template) if match else path
    except (re.error, IndexError) as error:
        raise ValueError(f"names: {template!r} for {pattern!r}: {error}") from error
    is_of_path = "\\" in re.split("[./]", template)[-1]
    return _translated(name) if is_of_path else name.replace("/", ".")


def _translated(path: str) -> str:
    *modules, last = path.replace("/", ".").split(".")
    return ".".join([*modules, PARAMETERS.get(last, last)])


def without_collections(paths: Sequence[str]) -> list[str]:
    """The paths inside of `params` and `batch_stats`, if the tree is Flax's `variables`."""
    return [path.partition("/")[2] if path.split("/")[0] in COLLECTIONS else path for path in paths]


def lstm(
    path: str, name: str, *, layer: int = 0, reverse: bool = False, fused: bool = False
) -> dict[str, Part]:
    """The `names` of an LSTM cell's leaves: rules to be merged into others.

    Flax has one bias where PyTorch has two: it gets their sum, and on the way back the first gets
    all of it, the second zeros. (Two biases learn twice as fast as their sum.)

    Args:
      path: of the Flax cell, `LSTMCell` or `OptimizedLSTMCell`, of Linen or NNX; or a regular
        expression for it, whose groups `name` may use.
      name: of the `torch.nn.LSTM`; `""` if it is the module itself.
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
    name = f"{name}." if name else ""
    biases = (f"{name}bias_ih_{end}", f"{name}bias_hh_{end}")
    if fused:
        return {
            f"{path}/dense_i/kernel": Part(f"{name}weight_ih_{end}"),
            f"{path}/dense_h/kernel": Part(f"{name}weight_hh_{end}"),
            f"{path}/dense_h/bias": Part(biases),
        }
    rules = {}
    for index, gate in enumerate(("i", "f_?", "g", "o")):  # `if` is no name for an NNX attribute
        rules[f"{path}/i{gate}/kernel"] = Part(f"{name}weight_ih_{end}", index, 4)
        rules[f"{path}/h{gate}/kernel"] = Part(f"{name}weight_hh_{end}", index, 4)
        rules[f"{path}/h{gate}/bias"] = Part(biases, index, 4)
    return rules
