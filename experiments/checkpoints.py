"""Checkpoints of a run: written in the background by Orbax, the last two kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

KEPT = 2

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells there of every step that it takes


class Checkpoints:
    """Those of one run; a context, which waits for what is still being written."""

    def __init__(self, workdir: Path):
        """Opens the checkpoints in `workdir`, of which there may be none."""
        self._checkpointer = ocp.training.Checkpointer(
            (workdir / "checkpoints").resolve(),
            # Whenever it is asked; by default what is asked while it still writes is left out.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(KEPT),
            cleanup_tmp_directories=True,  # of a run that was killed while it wrote
        )
        self._saved = self.latest()

    def __enter__(self) -> Checkpoints:
        """Nothing more is opened."""
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for what is still being written."""
        self._checkpointer.close()

    def latest(self) -> int | None:
        """The step of the last whole checkpoint."""
        last = self._checkpointer.latest
        return None if last is None else int(last.step)

    def save(self, step: int, state: Any) -> None:
        """Begins to write a state; it may be used up, or changed in place, at once."""
        if step != self._saved:
            self._checkpointer.save_async(step, state)
            self._saved = step

    def restore(self, like: Any) -> Any:
        """The last state, with the structure, shapes, dtypes and shardings of `like`."""
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        return self._checkpointer.load(None, abstract)
