"""Run directories: what was run, on what, and its metrics; and how metrics are written out.

run.json        the resolved config and what of it the command line set, package versions, Python,
                device, the commit of the source, on how many devices which steps were taken, and
                the length of the run in steps
metrics.jsonl   one JSON object a line, for every evaluation: step, epoch, seconds,
                seconds_per_step, a list over the seeds for every metric, and for every weight
                its norms
shared          a number by which several processes know that they share the directory
checkpoints/    the last states
digests.json    sums of their bits, by which damage is found
pictures/       what the task draws after the last step
profile/        of the steps that --config.profile names
tensorboard/    the metrics once more, if --config.tensorboard is set
outcome.txt     the last and the best evaluation, when all is done
run.lock        the process that trains here, or the last one that did
damaged/        checkpoints that could not be gone on from

A directory without run.json holds no run yet. Files that are written at once are whole or as they
were, whenever the process ends.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import locks
from experiments.cluster import is_first
from experiments.command_line import Run
from experiments.config import Config
from experiments.logs import log

PACKAGES = ("wnjax", "jax", "jaxlib", "flax", "optax", "chex", "numpy")
COMPARED = ("config", "versions", "device", "data")  # what makes a run the same run
# What run.json must have, by its dotted name.
FIELDS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("config", "versions", "device", "data"), dict),
    **{"devices": list, "arguments": list},
    **dict.fromkeys(("metric", "variant", "commit"), str),
    **{"config.steps": int, "config.published": (int, float), "config.optimizer": dict},
    "config.optimizer.learning_rate": (int, float),
    **dict.fromkeys(("device.platform", "device.kind", "device.machine"), str),
    **dict.fromkeys(("versions.python", "versions.jax", "versions.flax", "versions.optax"), str),
}
# What is there when a process was killed before it had made a run.
BEGUN = {"run.json.part", "metrics.jsonl", locks.NAME}
# What changes no numbers, or only their rounding.
NOT_COMPARED = "data_dir|evals_per_save|profile|tensorboard|published|mesh.*|cluster.*"


class RecordError(Exception):
    """A run directory cannot be used; the message says why and what to do."""


class NoMetricsError(RecordError):
    """A run has not come to its first evaluation."""


@contextmanager
def opened(run: Run) -> Iterator[None]:
    """Makes the directory of a run, unless it is there, and keeps other processes out of it.

    Raises:
      RecordError: if it holds another run, or anything else. Nothing is changed then.
      LockError: if another process trains there.
    """
    _make(run.workdir)
    with ExitStack() as stack:
        with writing(run.workdir / locks.NAME):
            stack.enter_context(locks.hold(run.workdir))
        create(run)
        yield


def create(run: Run) -> None:
    """Makes the directory of a run, unless it is there.

    Raises:
      RecordError: if it holds another run, or anything else. Nothing is changed then.
    """
    workdir, about = run.workdir, about_run(run.config)
    _make(workdir)
    if os.path.lexists(workdir / "run.json"):
        _check_same(workdir, read_about(workdir), about)
        return
    with writing(workdir / "metrics.jsonl"):
        (workdir / "metrics.jsonl").write_text("")
    about |= {"variant": run.variant, "arguments": list(run.arguments), "commit": commit()}
    _write_about(workdir, {**about, "devices": []})  # with which the directory holds a run


def _make(workdir: Path) -> None:
    """Makes a directory, unless it is there and holds a run, or the beginning of one."""
    try:
        if workdir.exists() and not workdir.is_dir():
            raise RecordError(f"{workdir} is not a directory; choose another --workdir")
        workdir.mkdir(parents=True, exist_ok=True)
        files = {file.name: file for file in workdir.iterdir()}
        is_begun = files.keys() <= BEGUN and (
            "metrics.jsonl" not in files or not files["metrics.jsonl"].stat().st_size
        )
    except OSError as error:
        raise RecordError(f"{workdir} cannot be made: {error}; choose another --workdir") from error
    if "run.json" not in files and not is_begun:
        raise RecordError(_no_run(workdir))


def check_shared(workdir: Path, number: int, seconds: float) -> None:
    """Waits until this process of several sees a number that the first one has written there.

    Raises:
      RecordError: if it does not in so many seconds.
    """
    if jax.process_count() == 1:
        return
    file, deadline = workdir / "shared", time.monotonic() + seconds
    if is_first():
        with writing(file):
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


def recorded(workdir: Path, steps_per_eval: int) -> int:
    """The last step up to which the metrics have every evaluation; 0 if the first one lacks.

    Raises:
      RecordError: as for `read_lines`.
    """
    steps, last = {line["step"] for line in read_lines(workdir)}, 0
    while last + steps_per_eval in steps:
        last += steps_per_eval
    return last


def go_on(workdir: Path, step: int, mesh: Mapping[str, int]) -> float:
    """Drops the metrics of later steps, and a line that was cut off while it was written.

    Notes that steps from here on are taken on this mesh, if those before were not.

    Returns:
      The seconds that the run had taken at the last evaluation that is left.

    Raises:
      RecordError: if a file is damaged or cannot be written. It is as it was then.
    """
    about, here = read_about(workdir), {"mesh": dict(mesh), "processes": jax.process_count()}
    lines = read_lines(workdir, ("step", "seconds"))
    kept = [line for line in lines if line["step"] <= step]
    if dropped := len(lines) - len(kept):
        log.info("%d evaluations after step %d are dropped and done again", dropped, step)
    devices = [one for one in about["devices"] if one["step"] < step]
    if not devices or {k: devices[-1][k] for k in here} != here:
        devices.append({"step": step, **here})
    _write_about(workdir, {**about, "devices": devices})
    write_whole(workdir / "metrics.jsonl", "".join(json.dumps(values) + "\n" for values in kept))
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
    write_whole(workdir / "outcome.txt", f"{outcome}\n")


def read_outcome(workdir: Path) -> str:
    """The line of a finished run."""
    return (workdir / "outcome.txt").read_text().strip()


def _write_about(workdir: Path, about: dict[str, Any]) -> None:
    write_whole(workdir / "run.json", json.dumps(about, indent=2) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Writes a file that is whole, or as it was, whenever the process or the machine ends.

    Raises:
      RecordError: if it cannot be written.
    """
    part = file.with_name(f"{file.name}.part")
    with writing(file):
        with part.open("w") as opened_part:
            opened_part.write(text)
            opened_part.flush()
            os.fsync(opened_part.fileno())
        part.replace(file)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """What writes a file.

    Raises:
      RecordError: if it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{file} cannot be written: {error.strerror or error}. What was recorded before is "
            "kept: free space on the disk, or make the directory writable, and the same command "
            "goes on"
        ) from error


def append(workdir: Path, metrics: dict[str, Any]) -> None:
    """Adds a line to the metrics.

    Raises:
      RecordError: if it cannot be written.
    """
    with writing(workdir / "metrics.jsonl"), (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def read_about(workdir: Path) -> dict[str, Any]:
    """The content of run.json.

    Raises:
      RecordError: if there is none, or none that can be read.
    """
    file = workdir / "run.json"
    try:
        about: Any = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise RecordError(_no_run(workdir)) from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{file} cannot be read: {error}; {_REMEDY}") from error
    check_about(about, str(file))
    return dict(about)


_REMEDY = "put a copy of it back, or choose another directory"


def check_about(about: Any, source: str) -> None:
    """Refuses what is no content of run.json; `source` is what the message calls it.

    Raises:
      RecordError: naming the first field that lacks or is of another type.
    """
    if not isinstance(about, dict):
        raise RecordError(f"{source} must hold an object, not {about!r:.50}; {_REMEDY}")
    for name, kind in FIELDS.items():
        value: Any = about
        for key in name.split("."):
            value = value.get(key)
        if not isinstance(value, kind):
            raise RecordError(
                f"{source} has no {name}, or a wrong one ({value!r:.50}); it is damaged, or no run "
                f"of this program: {_REMEDY}"
            )
    keys = {"step", "mesh", "processes"}
    if not all(isinstance(one, dict) and keys <= one.keys() for one in about["devices"]):
        raise RecordError(f"{source} has wrong devices ({about['devices']!r:.50}); {_REMEDY}")


def _no_run(workdir: Path) -> str:
    return f"{workdir} holds no run (it has no run.json); choose another directory"


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of the metrics.

    Raises:
      NoMetricsError: if there are none.
      RecordError: as for `read_lines`.
    """
    lines = read_lines(workdir)
    if not lines:
        raise NoMetricsError(f"{workdir} has no metrics yet")
    return lines


def read_lines(workdir: Path, needed: Sequence[str] = ("step",)) -> list[dict[str, Any]]:
    """The lines of the metrics, without a last one that was cut off. There may be none.

    Raises:
      RecordError: if the file cannot be read, or a line before the last one is damaged: it is no
        JSON, or a number that is needed lacks.
    """
    file, lines = workdir / "metrics.jsonl", []
    try:
        texts = file.read_bytes().rstrip(b"\n").split(b"\n")
    except OSError as error:
        raise RecordError(f"{file} cannot be read: {error}; {_REMEDY}") from error
    for number, text in enumerate(texts if texts != [b""] else [], start=1):
        try:
            line = json.loads(text)
            if not all(isinstance(line[name], int | float) for name in needed):
                raise TypeError(f"{' and '.join(needed)} must be numbers")
        except (ValueError, TypeError, LookupError) as error:
            if number == len(texts) and text.startswith(b"{"):
                log.warning("%s: the last line, %d, was cut off and is left out", file, number)
                break
            raise RecordError(
                f"{file} cannot be read: line {number} is damaged ({error!r}). Put a copy of the "
                "file back; or cut the file before that line, and the same command of "
                "experiments.train does what is missing again, if a checkpoint before it is left"
            ) from error
        lines.append(line)
    return lines


def mean_and_std(values: np.ndarray, decimals: int) -> str:
    """A mean over seeds as text, with the standard deviation where there are several."""
    values = np.asarray(values, np.float64)
    mean = f"{np.mean(values):.{decimals}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else mean
