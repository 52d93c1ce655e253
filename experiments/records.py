"""Run directories: what was run, on what, and its metrics; and how metrics are written out.

run.json        the resolved config and what of it the command line set, package versions, Python,
                device, the commit of the source, on how many devices which steps were taken, and
                the length of the run in steps
metrics.jsonl   one JSON object a line, for every evaluation: step, epoch, seconds,
                seconds_per_step, a list over the seeds for every metric, and for every weight
                its norms
shared          a number by which several processes know that they share the directory
checkpoints/    the last states
pictures/       what the task draws after the last step
profile/        of the steps that --config.profile names
tensorboard/    the metrics once more, if --config.tensorboard is set
outcome.txt     the last and the best evaluation, when all is done
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.cluster import is_first
from experiments.command_line import Run
from experiments.config import Config

PACKAGES = ("wnjax", "jax", "jaxlib", "flax", "optax", "chex", "numpy")
COMPARED = ("config", "versions", "device", "data")  # what makes a run the same run
# What changes no numbers, or only their rounding.
NOT_COMPARED = "data_dir|evals_per_save|profile|tensorboard|published|mesh.*|cluster.*"


class RecordError(Exception):
    """A run directory cannot be used; the message says why and what to do."""


class NoMetricsError(RecordError):
    """A run has not come to its first evaluation."""


def create(run: Run) -> None:
    """Makes the directory of a run, unless it is there.

    Raises:
      RecordError: if it holds another run, or anything else. Nothing is changed then.
    """
    workdir, about = run.workdir, about_run(run.config)
    if workdir.exists() and not workdir.is_dir():
        raise RecordError(f"{workdir} is not a directory; choose another --workdir")
    if workdir.is_dir() and any(workdir.iterdir()):
        _check_same(workdir, read_about(workdir), about)
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "metrics.jsonl").write_text("")
        about |= {"variant": run.variant, "arguments": list(run.arguments), "commit": commit()}
        _write_about(workdir, {**about, "devices": []})
    except OSError as error:
        raise RecordError(f"{workdir} cannot be made: {error}; choose another --workdir") from error


def check_shared(workdir: Path, number: int, seconds: float) -> None:
    """Waits until this process of several sees a number that the first one has written there.

    Raises:
      RecordError: if it does not in so many seconds.
    """
    if jax.process_count() == 1:
        return
    file, deadline = workdir / "shared", time.monotonic() + seconds
    if is_first():
        file.write_text(str(number))
    while not (file.exists() and file.read_text() == str(number)):
        if time.monotonic() > deadline:
            raise RecordError(
                f"{workdir} is not seen by all processes: give a --workdir that all machines share"
            )
        time.sleep(0.1)  # a file system of many machines may take a while


def about_run(config: Config) -> dict[str, Any]:
    """What makes a run what it is, as JSON gives it back."""
    device = jax.devices()[0]
    about: dict[str, Any] = {
        "config": {**dataclasses.asdict(config), "task_name": type(config.task).__name__},
        "versions": versions(),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        },
        "data": config.task.provenance(Path(config.data_dir).expanduser()),
        "metric": config.task.metric,
    }
    plain: dict[str, Any] = json.loads(json.dumps(about, default=_enum_value))
    return plain


def versions() -> dict[str, str]:
    """Those of the packages, and of Python."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def version(package: str) -> str:
    """The version of a package; "not installed" also for wnjax in a checkout on the path."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit of the source, with a mark if it was changed since; "unknown" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _enum_value(x: Any) -> Any:
    if isinstance(x, enum.Enum):
        return x.value
    raise TypeError(f"{x!r} cannot be recorded")


def _check_same(workdir: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    old, new = _compared(there), _compared(here)
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


def flat(about: dict[str, Any]) -> dict[str, Any]:
    """By its dotted name, every value that tells runs, or processes of one, apart."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        parts = (walk(f"{prefix}.{name}", inner) for name, inner in value.items())
        return {name: inner for part in parts for name, inner in part.items()}

    return {k: v for part in COMPARED for k, v in walk(part, about.get(part, {})).items()}


def _compared(about: dict[str, Any]) -> dict[str, Any]:
    found = flat(about)
    if about.get("device", {}).get("platform") != "cpu":
        found.pop("device.machine", None)  # the host of an accelerator computes nothing
    return {k: v for k, v in found.items() if not re.fullmatch(f"config.({NOT_COMPARED})", k)}


def go_on(workdir: Path, step: int, mesh: Mapping[str, int]) -> float:
    """Drops the metrics of later steps, and a line that was cut off while it was written.

    Notes that steps from here on are taken on this mesh, if those before were not.

    Returns:
      The seconds that the run had taken at the last evaluation that is left.
    """
    about, here = read_about(workdir), {"mesh": dict(mesh), "processes": jax.process_count()}
    devices = [one for one in about["devices"] if one["step"] < step]
    if not devices or {k: devices[-1][k] for k in here} != here:
        devices.append({"step": step, **here})
    _write_about(workdir, {**about, "devices": devices})
    file, kept = workdir / "metrics.jsonl", []
    for line in file.read_text().splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            break
        if values["step"] <= step:
            kept.append(values)
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(values) + "\n" for values in kept))
    part.replace(file)  # whole, or as it was
    return float(kept[-1]["seconds"]) if kept else 0.0


def note_length(workdir: Path, length: int) -> None:
    """Notes how many steps the run takes in all; fewer than its config says if time is short."""
    _write_about(workdir, {**read_about(workdir), "length": length})


def is_finished(run: Run) -> bool:
    """Whether the directory holds this very run, with all its steps."""
    try:
        about = read_about(run.workdir)
    except RecordError:
        return False
    same = _compared(about) == _compared(about_run(run.config))
    return same and has_outcome(run.workdir)


def has_outcome(workdir: Path) -> bool:
    """Whether a run in this directory was marked as finished."""
    return (workdir / "outcome.txt").is_file()


def finish(workdir: Path, outcome: str) -> None:
    """Marks a run as finished, in one line of text."""
    (workdir / "outcome.txt").write_text(f"{outcome}\n")


def read_outcome(workdir: Path) -> str:
    """The line of a finished run."""
    return (workdir / "outcome.txt").read_text().strip()


def _write_about(workdir: Path, about: dict[str, Any]) -> None:
    part = workdir / "run.json.part"
    part.write_text(json.dumps(about, indent=2) + "\n")
    part.replace(workdir / "run.json")


def append(workdir: Path, metrics: dict[str, Any]) -> None:
    """Adds a line to the metrics.

    Raises:
      RecordError: if it cannot be written.
    """
    try:
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
    except OSError as error:
        raise RecordError(f"{workdir / 'metrics.jsonl'} cannot be written: {error}") from error


def read_about(workdir: Path) -> dict[str, Any]:
    """The content of run.json.

    Raises:
      RecordError: if there is none, or none that can be read.
    """
    try:
        about: dict[str, Any] = json.loads((workdir / "run.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise RecordError(
            f"{workdir} holds no run (it has no run.json); choose another directory"
        ) from None
    except json.JSONDecodeError as error:
        raise RecordError(f"{workdir / 'run.json'} cannot be read: {error}") from error
    if "config" not in about:
        raise RecordError(f"{workdir / 'run.json'} has no config; it is no run of this program")
    return about


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of the metrics.

    Raises:
      NoMetricsError: if there are none.
      RecordError: if the file is not there, or a line is no JSON.
    """
    file = workdir / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise RecordError(f"{file} cannot be read: {error}") from error
    if not lines:
        raise NoMetricsError(f"{workdir} has no metrics yet")
    return lines


def mean_and_std(values: np.ndarray, decimals: int) -> str:
    """A mean over seeds as text, with the standard deviation where there are several."""
    values = np.asarray(values, np.float64)
    mean = f"{np.mean(values):.{decimals}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else mean
