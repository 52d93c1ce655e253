"""The metrics for TensorBoard, where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.command_line import ConfigError
from experiments.programs import Metrics, Norms


class Board:
    """A context that writes event files; without a directory it writes nothing."""

    def __init__(self, workdir: Path | None):
        """Opens the event files in `workdir`.

        Raises:
          ConfigError: if tensorboardX is not installed.
        """
        self._writer: Any = None
        if workdir is None:
            return
        try:
            from tensorboardX import SummaryWriter  # noqa: PLC0415 - an extra: imported only where it is asked for
        except ImportError as error:
            raise ConfigError(
                "tensorboard=True needs a package: pip install tensorboardX"
            ) from error
        self._writer = SummaryWriter(str(workdir / "tensorboard"))

    def __enter__(self) -> Board:
        """Nothing more is opened."""
        return self

    def __exit__(self, *error: object) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()

    def write(self, step: int, metrics: Metrics, norms: Norms) -> None:
        """The means over the seeds."""
        if self._writer is None:
            return
        for name, values in metrics.items():
            self._writer.add_scalar(name, np.mean(values), step)
        for path, one in norms.items():
            for name, values in one.items():
                self._writer.add_scalar(f"norms/{path}/{name}", np.mean(values), step)
