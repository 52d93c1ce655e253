"""Run directories: what was run, on what, and its metrics; and how metrics are written out.

run.json        the resolved config, package versions, Python and device
metrics.jsonl   one JSON object a line: step, seconds, and a list over the seeds for
                every metric
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.config import Config

PACKAGES = ("wnjax", "jax", "jaxlib", "flax", "optax", "chex", "numpy")


class RecordError(Exception):
    """A run directory cannot be used; the message says why and what to do."""


def create(workdir: Path, config: Config) -> None:
    """Makes a run directory with an empty metrics file; one of the same run is begun anew.

    Raises:
      RecordError: if `workdir` holds another run, or anything else. Nothing is changed then.
    """
    about = about_run(config)
    if workdir.exists() and not workdir.is_dir():
        raise RecordError(f"{workdir} is not a directory; choose another --workdir")
    if workdir.is_dir() and any(workdir.iterdir()):
        _check_same(workdir, read_about(workdir), about)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"{workdir} cannot be made: {error}") from error
    (workdir / "run.json").write_text(json.dumps(about, indent=2) + "\n")
    (workdir / "metrics.jsonl").write_text("")


def about_run(config: Config) -> dict[str, Any]:
    """What makes a run what it is, as JSON gives it back."""
    device = jax.devices()[0]
    about = {
        "config": dataclasses.asdict(config),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        },
    }
    about["versions"]["python"] = platform.python_version()
    plain: dict[str, Any] = json.loads(json.dumps(about, default=_enum_value))
    return plain


def _enum_value(x: Any) -> Any:
    if isinstance(x, enum.Enum):
        return x.value
    raise TypeError(f"{x!r} cannot be recorded")


def _check_same(workdir: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    old, new = _flatten(there), _flatten(here)
    changed = [
        f"\n  {name}: {old.get(name)} there, {new.get(name)} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise RecordError(
            f"{workdir} holds a different run:{''.join(changed)}\n"
            "Choose another --workdir, or delete that directory"
        )


def _flatten(about: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{part}.{name}": value for part, values in about.items() for name, value in values.items()
    }


def append(workdir: Path, metrics: dict[str, Any]) -> None:
    """Adds a line to the metrics."""
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def read_about(workdir: Path) -> dict[str, Any]:
    """The content of run.json.

    Raises:
      RecordError: if there is none, or none that can be read.
    """
    try:
        about: dict[str, Any] = json.loads((workdir / "run.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise RecordError(f"{workdir} holds no run (it has no run.json)") from None
    except json.JSONDecodeError as error:
        raise RecordError(f"{workdir / 'run.json'} cannot be read: {error}") from error
    if "config" not in about:
        raise RecordError(f"{workdir / 'run.json'} has no config; it is no run of this program")
    return about


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of the metrics.

    Raises:
      RecordError: if there are none, or one is no JSON.
    """
    file = workdir / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise RecordError(f"{file} cannot be read: {error}") from error
    if not lines:
        raise RecordError(f"{workdir} has no metrics yet")
    return lines


def mean_and_std(values: np.ndarray, decimals: int) -> str:
    """A mean over seeds as text, with the standard deviation where there are several."""
    mean = f"{np.mean(values):.{decimals}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else mean
