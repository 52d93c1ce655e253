"""The processes that train together: how they find one another, and do the same or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.config import Cluster, Start
from experiments.logs import log

ADDRESS = "JAX_COORDINATOR_ADDRESS"
COUNT, INDEX = "WNJAX_PROCESS_COUNT", "WNJAX_PROCESS_ID"  # which JAX does not read by itself
COUNTS = COUNT, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"  # by whom processes are started


class ClusterError(Exception):
    """The processes cannot train together; the message says why and what to do."""


def join(cluster: Cluster) -> None:
    """Finds the other processes, as `cluster` says. JAX must not have been used before.

    On TPUs, under Slurm and under Open MPI the environment says who they are. Elsewhere it is said
    by JAX_COORDINATOR_ADDRESS (host:port of the first process), WNJAX_PROCESS_COUNT and
    WNJAX_PROCESS_ID. When one of them ends or does not answer, JAX ends all others.

    Raises:
      ClusterError: if they are not found.
    """
    if cluster.start is Start.OFF:
        if others := [f"{name}={os.environ[name]}" for name in COUNTS if _count(name) > 1]:
            raise ClusterError(
                f"this process is one of several ({others[0]}), which would each train alone: set "
                "--config.cluster.start=on and --config.cluster.devices"
            )
        return
    names = {"num_processes": COUNT, "process_id": INDEX}
    said = {key: os.environ[name] for key, name in names.items() if name in os.environ}
    times = ("initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds")
    arguments: dict[str, Any] = dict.fromkeys(times, cluster.timeout)
    # Said before, since JAX ends the process if they do not come.
    log.info(
        "looking for the other processes, for %d s%s; if they do not come: were all started, and "
        "can they reach the first one's port?",
        cluster.timeout,
        f" (as {said}, the first one at {os.environ.get(ADDRESS)})" if said else "",
    )
    try:
        arguments |= {key: int(value) for key, value in said.items()}
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        is_alone = not said and "coordinator_address" in str(error)
        if cluster.start is Start.AUTO and is_alone:
            return  # cluster.devices tells whether there should be others
        raise ClusterError(
            f"the other processes were not found: {error}. The environment must be that of a TPU, "
            f"Slurm or Open MPI, or have {ADDRESS}, {COUNT} and {INDEX}; a single process needs "
            "--config.cluster.start=off"
        ) from error


def _count(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


@contextmanager
def together() -> Iterator[None]:
    """What every process does for itself: if one of them fails, all do.

    Raises:
      ClusterError: if another process failed.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = np.flatnonzero(_gather(np.array(error is not None)))
    if error is not None:
        raise error
    if failed.size:
        raise ClusterError(f"process {failed[0]} failed; what it printed says why")


@contextmanager
def ending_with_others() -> Iterator[None]:
    """Ends this process at once where what it computes with others fails, as when one has ended.

    Otherwise it would wait for them to end in order. On a TPU or GPU it may hear nothing of the
    end of another one; then JAX ends it after `cluster.timeout`, and says so.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(
            f"error: process {jax.process_index()} cannot go on: {error}\nIf another process has "
            "ended: started again, all of them go on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(os.EX_TEMPFAIL)


def check_same(values: Mapping[str, Any]) -> None:
    """Stops all processes if they have different values: arrays, or anything for JSON, by name.

    Raises:
      ClusterError: naming the first that differs, and the process.
    """
    if jax.process_count() == 1:
        return
    mine = np.stack([np.frombuffer(_digest(value), np.uint32) for value in values.values()])
    differ = np.argwhere((all_of := _gather(mine)) != all_of[0])
    if differ.size:
        process, number, _ = differ[0]
        raise ClusterError(
            f"{list(values)[number]}: process {process} has another value than process 0. All must "
            "have the same command line, packages and data"
        )


def _digest(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        about = json.dumps([value.shape, value.dtype.str]).encode()
        return hashlib.sha256(about + np.ascontiguousarray(value).tobytes()).digest()
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()


def of_first(x: Any) -> Any:
    """The number of the first process, in all."""
    return _gather(np.asarray(x))[0].item()


def fetch(tree: Any) -> Any:
    """The arrays as whole NumPy arrays, in every process; all of them must call this."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(whole, tree))


def _gather(x: np.ndarray) -> np.ndarray:
    """Those of all processes, along a new first axis."""
    if jax.process_count() == 1:
        return x[np.newaxis]
    return np.asarray(multihost_utils.process_allgather(x))
