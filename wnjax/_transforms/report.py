"""What `data_init` reports of a leaf."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.core


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Initialized:
    """What `data_init` did to a leaf; the leaves of its report. May be returned from `jit`.

    Attributes:
      action: "initialized" (gain and bias), "scale only" (there is no bias), "bias" (of such a
        weight), or "skipped".
      detail: the path of the bias, or of the weight that it is the bias of; or why it was skipped.
      samples: how many numbers stood behind every moment, masked ones included.
      constant: how many neurons are constant on the minibatch; they kept their gain.
      not_finite: how many neurons have moments that are not finite; they kept gain and bias.
    """

    action: str = dataclasses.field(metadata={"static": True})
    detail: str = dataclasses.field(default="", metadata={"static": True})
    samples: int = dataclasses.field(default=0, metadata={"static": True})
    constant: Any = 0
    not_finite: Any = 0

    def describe(self) -> str:
        """All of it in one line."""
        if self.action == "skipped":
            return f"no: {self.detail}"
        counts = ((self.constant, "constant"), (self.not_finite, "without finite moments"))
        kept = "".join(
            f", {known_count(n):,} neurons {what}" for n, what in counts if known_count(n)
        )
        if self.action == "bias":
            return f"bias of {self.detail}{kept}"
        bias = f" with {self.detail}" if self.detail else ""
        return f"{self.action}{bias}, {self.samples:,} samples a neuron{kept}"


def known_count(number: Any) -> int:
    """The value of a count; 0 inside `jit` and other transformations, where it has none yet."""
    return 0 if isinstance(number, jax.core.Tracer) else int(number)
