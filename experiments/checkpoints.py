"""Checkpoints of a run: written in the background by Orbax, the last two kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from experiments import records
from experiments.cluster import fetch, is_first, together
from experiments.logs import log

KEPT = 2
DIGESTS = "digests.json"  # by step, those of the arrays, which tell damage that Orbax does not see

# Orbax tells there of every step that it takes, and of errors that it raises as well.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class CheckpointError(Exception):
    """A checkpoint cannot be read or written; the message says which, why and what to do."""


class Checkpoints:
    """Those of one run; a context, which waits for what is still being written."""

    def __init__(self, workdir: Path):
        """Opens the checkpoints in `workdir`; there may be none.

        Raises:
          CheckpointError: if their directory cannot be made or read.
        """
        self.folder = (workdir / "checkpoints").resolve()
        with self._using("opened"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._checkpointer = ocp.training.Checkpointer(
                self.folder,
                # Whenever it is asked; by default what is asked while it still writes is left out.
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=ocp.training.preservation_policies.LatestN(KEPT),
                cleanup_tmp_directories=True,  # of a run that was killed while it wrote
            )
        self._saved = self.latest()
        self._digests = _read_digests(workdir / DIGESTS)

    def __enter__(self) -> Checkpoints:
        """Nothing more is opened."""
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for what is still being written.

        Raises:
          CheckpointError: if it cannot be written.
        """
        with self._using("written"):
            self._checkpointer.close()

    def steps(self) -> list[int]:
        """Those of all checkpoints, the last one at the end."""
        return [int(one.step) for one in self._checkpointer.checkpoints]

    def latest(self) -> int | None:
        """The step of the last checkpoint."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any) -> None:
        """Begins to write a state; it may be used up, or changed in place, at once.

        Raises:
          CheckpointError: if it, or the one before it, cannot be written.
        """
        if step != self._saved:
            with self._using("written"):
                self._write_digests(step, state)
                self._checkpointer.save_async(step, state)
            self._saved = step

    def restore(self, like: Any, step: int | None = None) -> Any:
        """A state, with the structure, shapes, dtypes and shardings of `like`.

        Args:
          like: arrays, or their `jax.ShapeDtypeStruct`s.
          step: the last one unless given.

        Raises:
          CheckpointError: if the checkpoint is damaged.
          ClusterError: if another process cannot restore its part.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        step = self.latest() if step is None else step
        with together():
            state = self._load(self.folder / str(step), abstract)
        digests = self._digests.get(str(step))  # none of checkpoints of older versions
        if digests is not None and digests != _digests(state):
            raise CheckpointError(
                f"the checkpoint {self.folder / str(step)} is damaged: its arrays are not those "
                "that were saved"
            )
        return state

    def _load(self, folder: Path, abstract: Any) -> Any:
        me = jax.process_index()
        # A process that waited in Orbax for one that fails would wait for ever.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
        )
        try:
            with ocp.Context(multiprocessing_options=alone):
                return ocp.load(folder, abstract, checkpointable_name="state")
        except Exception as error:  # of many types, according to the file that is damaged
            raise CheckpointError(
                f"the checkpoint {folder} cannot be restored: {_reason(error)}"
            ) from error

    def go_on_from(self, step: int) -> None:
        """Sets later checkpoints aside, in `damaged/`, so that their steps can be saved again."""
        later, aside = [one for one in self.steps() if one > step], self.folder.parent / "damaged"
        if later:
            with together(), self._using("set aside"):
                if is_first():
                    aside.mkdir(exist_ok=True)
                    for one in later:
                        number = sum(1 for _ in aside.glob(f"{one}.*"))
                        (self.folder / str(one)).rename(aside / f"{one}.{number}")
            self._checkpointer.reload()
        self._saved = step

    def _write_digests(self, step: int, state: Any) -> None:
        kept = map(str, {*self.steps(), self._saved})  # the last one may still be being written
        self._digests = {one: self._digests[one] for one in kept if one in self._digests}
        self._digests[str(step)] = _digests(state)
        if is_first():
            records.write_whole(self.folder.parent / DIGESTS, json.dumps(self._digests) + "\n")

    @contextmanager
    def _using(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            raise CheckpointError(
                f"a checkpoint in {self.folder} cannot be {what}: {_reason(error)}. The whole ones "
                "are kept: free space on the disk, or make the directory writable, and the same "
                "command resumes from the last one"
            ) from error


def _reason(error: BaseException) -> str:
    """What went wrong first, in one line."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    text = str(error).split("\n", maxsplit=1)[0].split(" [", maxsplit=1)[0]
    return f"{type(error).__name__}: {text if len(text) < 300 else '…' + text[-300:]}"


def _read_digests(file: Path) -> dict[str, list[int]]:
    """By step; none where there is no such file, or it is damaged."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        found = error
    if not isinstance(found, dict):
        log.warning("%s is damaged, and checkpoints are not compared with it: %r", file, found)
        return {}
    return found


def _digests(state: Any) -> list[int]:
    """For every array the sum of its bits, as unsigned ints; the same on any devices."""
    return [int(x) for x in fetch(_sums(jax.tree.leaves(state)))]


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    def total(x: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")  # of 8 bytes: two
        bits = jax.lax.bitcast_convert_type(x, unsigned)
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jnp.stack([total(x) for x in leaves])
