"""On which devices a run computes: its seeds are spread over them, and every batch split."""

from __future__ import annotations

import math
import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from experiments.command_line import ConfigError
from experiments.config import Config


def claim_devices(config: Config) -> None:
    """Sees to it that there are as many devices as every batch is to be split over.

    On a CPU, makes a device for every seed and share of a batch: small convolutions keep one core
    busy alone. That works until JAX is used for the first time; a process that has used it keeps
    its devices. Settings of JAX or XLA that say how many there are come first.

    Raises:
      ConfigError: if there are fewer.
    """
    settings: Any = jax.config
    is_said = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if settings.jax_num_cpu_devices < 0 and not is_said:
        settings.update("jax_num_cpu_devices", config.seeds * config.devices)
    if config.devices > jax.device_count():
        raise ConfigError(f"devices must be at most {jax.device_count()}, got {config.devices}")


def make_mesh(config: Config) -> Mesh:
    """The seeds spread evenly over as many devices as there are, every batch over `devices`."""
    most = jax.device_count() // config.devices
    groups = max(n for n in range(1, config.seeds + 1) if config.seeds % n == 0 and n <= most)
    shape = groups, config.devices
    return jax.make_mesh(
        shape, ("seeds", "data"), (AxisType.Auto,) * 2, devices=jax.devices()[: math.prod(shape)]
    )
