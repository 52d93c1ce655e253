"""A language model of the sources of Python's standard library, byte by byte."""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.datasets import Data
from experiments.datasets.text import python_sources
from experiments.networks.layers import ActivationNorm
from experiments.networks.transformer import Transformer
from experiments.tasks import Batch, Measures, Task, check_positive

VOCABULARY = 256  # bytes


@dataclasses.dataclass(slots=True, kw_only=True)
class CharLm(Task):
    """The standard library's sources, and a small decoder-only transformer.

    Attributes:
      layers: blocks of attention and two dense layers.
      width: features of the residual stream.
      heads: attention heads of a block.
      hidden: features between the two dense layers.
      length: bytes that are seen at once.
      dropout: share of the outputs of attention and of dense layers dropped, in training.
    """

    metric: ClassVar[str] = "bits_per_byte"
    norms: ClassVar[tuple[ActivationNorm, ...]] = (ActivationNorm.NONE, ActivationNorm.LAYER)
    # The outputs of a block are added to what it was given, block after block.
    init_std: ClassVar[dict[str, float]] = {r".*/out/kernel": 0.3, r"Dense_\d*[13579]/kernel": 0.3}
    # Heads, and the features between the two dense layers, are shared out: what comes in is whole.
    layouts: ClassVar[dict[str, tuple[str | None, ...]]] = {
        r"(query|key|value)/kernel": (None, "tensor", "fsdp"),
        r"(query|key|value)/bias": ("tensor", "fsdp"),
        r"out/kernel": ("tensor", None, "fsdp"),
        r"Dense_\d*[13579]/kernel": ("tensor", "fsdp"),
    }

    layers: int = 4
    width: int = 128
    heads: int = 4
    hidden: int = 512
    length: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Checks the values."""
        check_positive(self, "layers", "width", "heads", "hidden", "length")
        if self.width % self.heads:
            raise ValueError(
                f"task.width must be a multiple of task.heads, got {self.width} and {self.heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"task.dropout must lie in [0, 1), got {self.dropout}")

    def data(self, folder: Path) -> Data:
        """Pieces of text; every tenth file is for testing."""
        del folder  # it comes with Python
        return python_sources(self.length)

    def network(self, norm: ActivationNorm, dtype: Any) -> nn.Module:
        """The transformer, with layer norm before attention and dense layers, or without."""
        return Transformer(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            hidden=self.hidden,
            vocabulary=VOCABULARY,
            length=self.length,
            layer_norm=norm is ActivationNorm.LAYER,
            dropout=self.dropout,
            dtype=dtype,
        )

    def inputs(self, batch: Batch) -> jax.Array:
        """All bytes but the last."""
        return batch["tokens"][:, :-1].astype(jnp.int32)

    def measures(self, outputs: jax.Array, batch: Batch) -> Measures:
        """Cross entropy of the next byte, the mean over a piece: in nats, and in bits."""
        labels = batch["tokens"][:, 1:].astype(jnp.int32)
        logits = outputs.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(-1)
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}
