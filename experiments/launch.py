"""Launches runs anywhere: python -m experiments.launch --config=FILE --on=PLACE [--run].

Prints the commands, or with --run runs them. PLACE is
  local                  this machine: one process
  local:2x4              this machine: 2 processes of 4 virtual CPU devices each, as on a cluster
  configs/launch/*.yaml  a SkyPilot task file: TPUs and GPUs of a cloud
  configs/launch/*.sh    a script for Slurm's sbatch
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.apart import train_apart
from experiments.command_line import ConfigError
from experiments.config import Config, Mesh
from experiments.interrupts import Interrupts
from experiments.logs import log, log_to_stderr
from experiments.placement import check_devices, groups
from experiments.places import Place, read_place
from experiments.records import has_outcome
from experiments.sweep import Entry, entries, joined

USAGE = f"""\
usage: python -m experiments.launch --config=FILE[:VARIANT] --on=PLACE [--sweep] [--bucket=NAME]
           [--config.FIELD=VALUE ...] [--workdir=DIR] [--run]

{__doc__}
Every run is checked before anything is printed or run: a mistake never gets to a cluster. --sweep
takes the runs of the file's sweep, one after the other. The devices of a place are all used, by
--config.mesh.data and by seeds, unless --config.mesh.FIELD says how. NAME is a Google Cloud bucket,
made if there is none, that the machines of a task file see as /results, where DIR goes.
What SkyPilot's commands cost is asked before anything is rented; its package is an extra:
pip install 'skypilot[gcp]'."""
RESULTS = "/results"  # where task files mount the bucket
UNSAFE = set(" \t\n*?[]'\"\\$`&;|<>~#!")  # which a shell would change in $OVERRIDES
PORT = 8476


class Launch(NamedTuple):
    """One run at one place: the arguments of experiments.train, and the commands for it."""

    entry: Entry
    place: Place
    bucket: str  # where task files put the results; empty if nothing says so

    @property
    def environment(self) -> dict[str, str]:
        """What task files and scripts ask for."""
        named, *others = self.entry.arguments
        run = {"CONFIG": named.removeprefix("--config="), "WORKDIR": str(self.entry.run.workdir)}
        overrides = [one for one in others if not one.startswith("--workdir=")]
        return {**run, "OVERRIDES": " ".join(overrides)}

    def sky(self) -> list[str]:
        """SkyPilot's command: a managed job, which goes on after preemptions, or a cluster."""
        task = self.place.task
        is_managed = task["resources"].get("use_spot", False)
        environment = {**self.environment, "BUCKET": self.bucket or "NAME"}
        return [
            *(["sky", "jobs", "launch"] if is_managed else ["sky", "launch"]),
            *(["--detach-run"] if is_managed else [f"--cluster={task['name']}"]),
            *(word for pair in environment.items() for word in ("--env", "=".join(pair))),
            self.place.name,
        ]

    def gcloud(self) -> list[str]:
        """The command for all hosts of a TPU that is there, with this project in ~/wnjax."""
        task = self.place.task
        zone = [*str(task["resources"].get("infra", "")).split("/"), "", ""][2] or "ZONE"
        train = shlex.join([".venv/bin/python", *self.entry.words()[1:]])
        return [
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", task["name"], f"--zone={zone}"),
            *("--worker=all", f"--command=cd wnjax && {train} > train.log 2>&1"),
        ]

    def commands(self) -> dict[str, str]:
        """By what it is for, each command as a shell takes it."""
        train = self.entry.command()
        if self.place.name == "local":
            return {"here": train}
        if self.place.processes:
            lines = [
                f"{_assignments(self.place.local(index, PORT))} {train}"
                for index in range(self.place.processes)
            ]
            return {"here": " &\n".join(lines)}
        if not self.place.task:
            name = shlex.quote(self.place.name)
            return {"Slurm": f"{_assignments(self.environment)} sbatch {name}", "each task": train}
        found = {"SkyPilot": shlex.join(self.sky())}
        if str(self.place.task["resources"]["accelerators"]).startswith("tpu"):
            found["gcloud"] = shlex.join(self.gcloud())
        return {**found, "each host": train}


def launches(arguments: Sequence[str]) -> list[Launch]:
    """The runs that a command line names, each of them parsed.

    Raises:
      ConfigError: for any mistake in the command line, the config file, its sweep or the place.
    """
    ours: dict[str, str] = {}
    others = []
    for argument in joined(arguments):
        name, _, value = argument.removeprefix("--").partition("=")
        if name in ("on", "bucket", "sweep") and argument.startswith("--"):
            if (name == "sweep") == bool(value):
                raise ConfigError(f"{argument}: --sweep takes no value; --on and --bucket need one")
            ours[name] = value
        else:
            others.append(argument)
    if "on" not in ours:
        raise ConfigError("--on=PLACE is missing, such as --on=configs/launch/tpu-v5e-8.yaml")
    place = read_place(ours["on"])
    if "bucket" in ours and not place.task:
        raise ConfigError(f"--bucket is for task files; --on={place.name} takes --workdir=DIR")
    bucket = ours.get("bucket") or str(place.task.get("envs", {}).get("BUCKET", ""))
    found = entries(others) if "sweep" in ours else [Entry.of(others)]
    return [Launch(_fit(entry, place), place, bucket) for entry in found]


def _fit(entry: Entry, place: Place) -> Entry:
    """The same run on the devices of a place."""
    if not place.devices:
        return entry
    config, workdir = entry.run.config, entry.run.workdir
    added = [f"--config.cluster.devices={place.devices}"]
    if place.is_cluster:
        added.append("--config.cluster.start=on")
    is_set = any(argument.startswith("--config.mesh.") for argument in entry.arguments)
    if not is_set and config.mesh.size == 1:
        added.append(f"--config.mesh.data={_data_axis(config, place)}")
    if place.task and (workdir.is_absolute() or ".." in workdir.parts):
        raise ConfigError(f"--workdir={workdir} must be a directory of the bucket: without / or ..")
    named, *rest = entry.arguments
    rest = [argument for argument in rest if not argument.startswith("--workdir=")]
    folder = Path(RESULTS, workdir) if place.task else workdir
    arguments = [named, *rest, *added, f"--workdir={folder}"]
    if unsafe := [argument for argument in arguments if UNSAFE & set(argument)]:
        raise ConfigError(f"arguments must be without spaces and signs of the shell: {unsafe}")
    found = Entry.of(arguments)
    check_devices(found.run.config, place.devices, is_cluster=place.is_cluster)
    return found


def _data_axis(config: Config, place: Place) -> int:
    """Over how many devices to split batches, so that most of the place's are used."""

    def used(data: int) -> int:
        return data * groups(Mesh(data=data), config.seeds, place.devices)

    common = math.gcd(config.batch_size, place.devices)  # five of a TPU's eight make no mesh
    sizes = [n for n in range(1, common + 1) if common % n == 0]
    best = max(sizes, key=lambda n: (used(n), -n))
    if used(best) == place.devices:
        return best
    text = (
        f"{place.name}: batches of {config.batch_size} and {config.seeds} seeds use {used(best)} "
        f"of {place.devices} devices"
    )
    if place.is_cluster:
        nearest = max(1, round(config.batch_size / place.devices)) * place.devices
        raise ConfigError(
            f"{text}, and in several processes all must take part; for example with "
            f"--config.batch_size={nearest} or --config.seeds={place.devices}"
        )
    log.warning("%s", text)
    return best


def execute(found: Sequence[Launch]) -> list[str]:
    """Runs all, one after the other; returns the commands that failed, or did not finish here.

    SIGTERM and Ctrl-C are passed on to the processes that run here, which save their state, and
    end all.

    Raises:
      ConfigError: if a program for them is missing.
    """
    unfinished = []
    with Interrupts() as interrupts:
        for launch in found:
            status = 1 if interrupts.requested else run(launch, interrupts)
            is_here = launch.place.processes > 0
            if status or (is_here and not has_outcome(launch.entry.run.workdir)):
                unfinished.append(launch.entry.command())
    return unfinished


def run(launch: Launch, interrupts: Interrupts) -> int:
    """Runs one; returns an exit status.

    Raises:
      ConfigError: if a program for it is missing.
    """
    place = launch.place
    if place.processes:
        return run_here(launch, interrupts)
    if place.task and not launch.bucket:
        raise ConfigError("--bucket=NAME is missing: where the results go, of all hosts")
    command = launch.sky() if place.task else ["sbatch", place.name]
    environment = {} if place.task else launch.environment
    if shutil.which(command[0]) is None:
        how = "pip install 'skypilot[gcp]'" if place.task else "run this where Slurm is"
        raise ConfigError(f"there is no program {command[0]} here: {how}")
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


def run_here(launch: Launch, interrupts: Interrupts) -> int:
    """Runs the processes of one run side by side; returns an exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environments = [launch.place.local(index, port) for index in range(launch.place.processes)]
    patience = 2 * launch.entry.run.config.cluster.timeout
    statuses = train_apart(launch.entry.arguments, interrupts, environments, patience)
    return int(any(statuses))


def _assignments(environment: Mapping[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status."""
    log_to_stderr()
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        found = launches([argument for argument in arguments if argument != "--run"])
        if "--run" not in arguments:
            for launch in found:
                print(*(f"# {k}\n{text}" for k, text in launch.commands().items()), sep="\n")
            return 0
        unfinished = execute(found)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if unfinished:
        print(f"{len(unfinished)} of {len(found)} did not finish:", *unfinished, sep="\n  ")
    return int(bool(unfinished))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
