"""Measures on an accelerator what has not been measured there: python -m experiments.accelerator.

A list of work, in order of worth. Items that have a result for this device in
experiments/results/accelerator/ are left out; so are those that need more time than is left. Every
item runs in a process of its own, under a time limit, and its result is in DIR as soon as it is
there: one JSON file for each group of items, log.txt, and table.txt. With --collect a DIR that was
brought back is taken into experiments/results/accelerator/. `python -m experiments.report` reads
the files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from experiments.command_line import ConfigError, folder
from experiments.items.training import CIFAR10
from experiments.logs import log, log_to_stderr
from experiments.records import RecordError, commit, write_whole, writing

RESULTS = Path(__file__).parent / "results/accelerator"
PATIENCE = 1.5  # an item is ended after so many times the seconds that it should take
MARGIN = 5.0  # seconds for the item's start and its end
# Asked in a process of its own: a process that uses a device keeps its memory.
PROBE = """
import json, jax
from experiments.records import versions
device = jax.devices()[0]
print(json.dumps({"platform": device.platform, "kind": device.device_kind, "versions": versions()}))
"""


class Item(NamedTuple):
    """A piece of work.

    Attributes:
      name: of the item, and of its result.
      group: the file of the results.
      module: the program that measures it.
      seconds: that it should take on an H100, its start and compiling included.
    """

    name: str
    group: str
    module: str
    seconds: float

    def command(self, out: Path, seconds: float, options: argparse.Namespace) -> list[str]:
        """The process that measures it within so many seconds."""
        command = [sys.executable, "-m", self.module, self.name, f"--out={out}"]
        command += [f"--seconds={seconds:.1f}", f"--data_dir={options.data_dir}"]
        return command + ["--rehearsal"] * options.rehearsal


def _training(group: str, names: Sequence[str], seconds: float) -> list[Item]:
    return [Item(f"{group}_{x}", group, "experiments.items.training", seconds) for x in names]


def _costs(seconds: dict[str, float]) -> list[Item]:
    return [Item(f"cost_{x}", "cost", "experiments.items.cost", t) for x, t in seconds.items()]


ITEMS = [
    Item("numerics", "numerics", "experiments.items.numerics", 90),
    *_costs({"mlp": 100, "transformer": 85, "bandwidth": 25}),
    *_costs({"convpool": 80, "resnet50": 140, "gpt2": 130}),
    Item("resume", "resume", "experiments.items.resume", 90),
    Item("draw", "draw", "experiments.items.training", 300),
    *_training("cifar10_50", CIFAR10, 110),
    *_training("cifar10_200", ("weight_norm_mean_only", "plain", "weight_norm_init"), 320),
    *_training("cifar10_200", ("batch_norm", "mean_only"), 320),
]


class Outcome(NamedTuple):
    """What became of an item."""

    item: Item
    text: str
    seconds: float = 0.0
    is_failure: bool = False


def work(
    items: Sequence[Item], about: dict[str, Any], out: Path, options: argparse.Namespace
) -> list[Outcome]:
    """Does what is not done, one item after the other, as long as there is time."""
    end = time.monotonic() + 60 * options.minutes
    outcomes = []
    for item in items:
        left = end - time.monotonic()
        if (options.results / slug(about["kind"]) / f"{item.name}.json").is_file():
            outcomes.append(Outcome(item, "done before"))
        elif item.seconds > left:
            outcomes.append(Outcome(item, f"no time: it needs {item.seconds:.0f} s"))
        else:
            # How long an item takes elsewhere than on an H100 is not known: rehearsals may wait.
            limit = left if options.rehearsal else min(PATIENCE * item.seconds, left)
            outcomes.append(_do(item, limit, about, out, options))
        log.info("%s: %s", item.name, outcomes[-1].text)
    return outcomes


def _do(
    item: Item, limit: float, about: dict[str, Any], out: Path, options: argparse.Namespace
) -> Outcome:
    """Runs one item, and adds its result to the file of its group."""
    log.info("%s: at most %.0f s", item.name, limit)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, (out / "log.txt").open("a") as text:
        file = Path(folder) / "result.json"
        text.write(f"\n=== {item.name}\n")
        text.flush()
        status = run(item.command(file, max(limit - MARGIN, 1.0), options), limit, text)
        seconds = time.monotonic() - begin
        if status is None:
            return Outcome(item, f"ended after {limit:.0f} s, its limit", seconds, True)
        if status or not file.is_file():
            return Outcome(item, f"failed with status {status}: see log.txt", seconds, True)
        result = json.loads(file.read_text())
    # With the item, so that a result tells all by itself, in whatever file it is.
    record = {
        "item": item.name,
        "module": item.module,
        "rehearsal": options.rehearsal,
        "device": about,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "result": result,
    }
    _add(out / f"{item.group}.json", record)
    return Outcome(item, "measured", seconds)


def run(command: Sequence[str], limit: float, text: Any) -> int | None:
    """The exit status of a process, or None if it was ended, with all that it has started."""
    # In a session of its own, so that a signal reaches the processes that it starts as well.
    process = subprocess.Popen(command, stdout=text, stderr=text, start_new_session=True)
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _add(file: Path, record: dict[str, Any]) -> None:
    records = _read(file) if file.is_file() else []
    write_whole(file, json.dumps([*records, record]) + "\n")


def slug(kind: str) -> str:
    """The name of a device as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def probe(limit: float = 120.0) -> dict[str, Any]:
    """The device that JAX takes by default, and the versions.

    Raises:
      RecordError: if JAX cannot be started.
    """
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        raise RecordError(f"JAX finds no device within {limit:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise RecordError(f"JAX finds no device:\n{error.stderr}") from error
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for every item."""
    rows = [(o.item.name, f"{o.seconds:.0f}" if o.seconds else "", o.text) for o in outcomes]
    return str(tabulate(rows, ("item", "seconds", ""), disable_numparse=True))


def collect(folder: Path, results: Path) -> list[Path]:
    """Takes results that were brought back into the project; returns the files.

    Raises:
      RecordError: if the folder holds no result, a damaged file, or a result of a rehearsal.
        Nothing is taken then.
    """
    records = [record for file in sorted(folder.glob("*.json")) for record in _read(file)]
    if not records:
        raise RecordError(f"{folder} holds no results of experiments.accelerator")
    if rehearsed := [record["item"] for record in records if record["rehearsal"]]:
        raise RecordError(f"{folder} holds results of a rehearsal: {', '.join(rehearsed)}")
    files = []
    for record in records:
        file = results / slug(record["device"]["kind"]) / f"{record['item']}.json"
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps([record]) + "\n")
        files.append(file)
    return files


def _read(file: Path) -> list[dict[str, Any]]:
    """The results in a file.

    Raises:
      RecordError: if it is damaged, or holds something else.
    """
    try:
        content: list[dict[str, Any]] = json.loads(file.read_bytes())
        for record in content:
            _ = record["item"], record["rehearsal"], record["device"]["kind"], record["result"]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise RecordError(
            f"{file} holds no results of experiments.accelerator: {error!r}. Put a copy of it "
            "back, or move it away"
        ) from error
    return content


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m experiments.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--minutes", type=float, default=8.0, help="that all may take together (%(default)s)")
    add("--out", default="runs/accelerator", metavar="DIR")
    add("--data_dir", default="data", help="of CIFAR-10 and MNIST (%(default)s)")
    add("--rehearsal", action="store_true", help="all items at the smallest size, on any device")
    add("--items", help="the items to choose from, separated by commas; all unless given")
    add("--collect", metavar="DIR", help="take the results in DIR into the project")
    add("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str], items: Sequence[Item] = ITEMS) -> int:
    """Runs the command line and returns its exit status."""
    log_to_stderr()
    command_line = parser()
    options = command_line.parse_args(arguments)
    chosen = options.items.split(",") if options.items else [item.name for item in items]
    if unknown := set(chosen) - {item.name for item in items}:
        known = ", ".join(item.name for item in items)
        command_line.error(f"unknown items {', '.join(sorted(unknown))}; there are: {known}")
    try:
        for name in ("out", "data_dir"):
            setattr(options, name, folder(f"--{name}", getattr(options, name)))
        if options.collect is not None:
            taken = collect(folder("--collect", options.collect), options.results)
            print("\n".join(map(str, taken)))
            return 0
        return measure([item for item in items if item.name in chosen], options)
    except (ConfigError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure(items: Sequence[Item], options: argparse.Namespace) -> int:
    """Does the items, prints a table of them, and returns an exit status.

    Raises:
      RecordError: if there is no device, or --out cannot be written or holds something else.
    """
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    for group in {item.group for item in items}:
        if (file := options.out / f"{group}.json").exists():
            _read(file)  # so that nothing is measured in vain
    about = probe()
    log.info("%s, %s", about["kind"], about["versions"])
    with writing(options.out):
        outcomes = work(items, about, options.out, options)
        text = f"{about['kind']}\n{table(outcomes)}\n"
        (options.out / "table.txt").write_text(text)
    print(text)
    return 1 if any(outcome.is_failure for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
