"""On which devices a run computes: its seeds, their batches and their weights, spread over them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.command_line import ConfigError
from experiments.config import Config, Start
from experiments.config import Mesh as MeshSizes

AXES = "seeds", "data", "fsdp", "tensor"
BATCH = PartitionSpec(("data", "fsdp"))  # of the examples of a batch
# Of the last axis of a weight, its neurons. With the batch split over (data, fsdp), 2 each, and
# kernels of convolutions by fan-in over fsdp and by neurons over tensor, XLA gets gradients wrong,
# by 2 to 5 percent: those of a plain network under jit, with jax 0.10.2 and with 0.12.0.
WEIGHT = (("fsdp", "tensor"),)
MeshAxes = str | tuple[str, ...] | None  # of one axis of an array


def claim_devices(config: Config) -> None:
    """Sees to it that there are the devices that a config asks for.

    On a CPU, a process by itself makes as many as a network is to be spread over, for every seed:
    small convolutions keep one core busy alone. That works until JAX is used for the first time; a
    process that has used it keeps its devices. Settings of JAX or XLA that say how many there are
    come first.

    Raises:
      ConfigError: if there are others than `cluster.devices`, fewer than a network needs, or if
        some would have nothing to do in one of several processes.
    """
    settings: Any = jax.config
    is_said = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if settings.jax_num_cpu_devices < 0 and not is_said and config.cluster.start is Start.OFF:
        settings.update("jax_num_cpu_devices", config.seeds * config.mesh.size)
    count, processes = jax.device_count(), jax.process_count()
    if config.cluster.devices not in (0, count):
        raise ConfigError(
            f"cluster.devices={config.cluster.devices} are expected and {count} were found, in "
            f"{processes} processes, {jax.local_device_count()} of them in this one"
        )
    if processes > 1 and config.cluster.start is Start.OFF:  # a TPU of several hosts
        raise ConfigError(
            f"{processes} processes must know of one another: set --config.cluster.start=on and "
            f"--config.cluster.devices={count}"
        )
    check_devices(config, count, is_cluster=processes > 1)


def check_devices(config: Config, count: int, *, is_cluster: bool) -> None:
    """Refuses fewer devices than a network needs, and such as have no work in several processes.

    Raises:
      ConfigError: with the numbers.
    """
    if config.mesh.size > count:
        raise ConfigError(
            f"mesh.data · mesh.fsdp · mesh.tensor must be at most {count}, the number of devices, "
            f"got {config.mesh.size}"
        )
    used = groups(config.mesh, config.seeds, count) * config.mesh.size
    if is_cluster and used < count:
        raise ConfigError(
            f"{config.seeds} seeds with mesh.data · mesh.fsdp · mesh.tensor = {config.mesh.size} "
            f"use {used} of {count} devices, which must all take part in several processes"
        )


def groups(sizes: MeshSizes, seeds: int, count: int) -> int:
    """How many groups of devices, each with a mesh for its share of the seeds, there are."""
    if sizes.batch_parts > 1 and sizes.tensor > 1:
        return 1  # XLA aborts on groups of these, with jax 0.10.2 and 0.12.0
    return max(n for n in range(1, seeds + 1) if seeds % n == 0 and n * sizes.size <= count)


def make_mesh(config: Config) -> Mesh:
    """The seeds spread evenly over as many devices as there are, with `config.mesh` for each."""
    sizes = config.mesh
    number = groups(sizes, config.seeds, jax.device_count())
    shape = number, sizes.data, sizes.fsdp, sizes.tensor
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def layout(mesh: Mesh, tree: Any, rules: Mapping[str, tuple[MeshAxes, ...]]) -> Any:
    """The sharding of every array in a tree; their first axis is that of the seeds.

    Args:
      mesh: of `make_mesh`.
      tree: arrays, or their `jax.ShapeDtypeStruct`s: parameters, or anything with arrays of
        the same paths and shapes in it, such as the state of an optimizer.
      rules: from regular expressions, matched against the end of the slash path of a weight, to
        mesh axes for its own. Without a rule, an array of two axes or more is split by its last
        one, as `WEIGHT` says. An axis is split by as many of them as divide it evenly, the
        first ones first; so g stays whole along its fan-in axes, of size 1.

    Raises:
      ValueError: if a rule has more axes than the array that it matches.
    """

    def sharding(path: Any, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = re.sub(r"(?<=kernel)/(g|log_g|v)$", "", name)
        names = next(
            (axes for rule, axes in rules.items() if re.search(f"(^|/)({rule})$", name)),
            WEIGHT if x.ndim > 2 else (),
        )
        if len(names) >= x.ndim:
            raise ValueError(f"{name}: the rule {names} has more axes than its shape {x.shape[1:]}")
        axes = [()] * (x.ndim - 1 - len(names)) + [_as_tuple(one) for one in names]
        spec = [_dividing(mesh, *pair) for pair in zip(axes, x.shape[1:], strict=True)]
        return NamedSharding(mesh, PartitionSpec("seeds", *spec))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _dividing(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The first ones of the mesh axes, as many as split a size evenly together."""
    while size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes
