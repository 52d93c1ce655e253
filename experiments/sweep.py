"""Runs a config file's sweep: python -m experiments.sweep --config=configs/digits.py [--run].

`def sweep()` in a config file yields a dict for every run: fields by their dotted names, and
"variant". All of them are checked before anything is printed or run. Without --run the commands
are printed, one a line. With it they are run one after the other; finished runs are skipped, those
that were interrupted go on, and one that fails does not stop the others. SIGTERM and Ctrl-C are
passed on to the run, which saves its state, and end the sweep.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from experiments import records
from experiments.apart import train_apart
from experiments.command_line import MISTAKES, ConfigError, Run, folder, parse, shell_value
from experiments.interrupts import Interrupts
from experiments.logs import log, log_to_stderr

USAGE = f"""\
usage: python -m experiments.sweep --config=FILE[:VARIANT] [--config.FIELD=VALUE ...]
           [--workdir=DIR] [--run]

{__doc__}
VARIANT leaves that variant's runs; it may be a pattern, such as '*_short'. FIELD=VALUE holds for
all runs, in place of what the sweep says of the field. Results go to
DIR/<variant>-<field>=<value>-..., DIR being runs/<name of the file>."""


class Entry(NamedTuple):
    """One run of a sweep, and the arguments of experiments.train that say so."""

    run: Run
    arguments: list[str]  # the config file first

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Entry:
        """The run of a command line.

        Raises:
          ConfigError: if it does not parse.
        """
        run = parse(arguments)
        return cls(run, sorted(arguments, key=lambda one: not one.startswith("--config=")))

    def words(self) -> list[str]:
        """The whole command."""
        return ["python", "-m", "experiments.train", *self.arguments]

    def command(self) -> str:
        """The whole command, as a shell takes it."""
        return shlex.join(self.words())


def entries(arguments: Sequence[str]) -> list[Entry]:
    """The runs of the sweep that a command line names, each of them parsed.

    Raises:
      ConfigError: if the file has no sweep, or for the first run that does not parse, or if two
        runs are the same.
    """
    arguments = joined(arguments)
    named = [argument for argument in arguments if argument.startswith("--config=")]
    if len(named) != 1:
        raise ConfigError("--config=FILE is missing, such as --config=configs/digits.py")
    name, _, only = named[0].removeprefix("--config=").partition(":")
    folders = [a.removeprefix("--workdir=") for a in arguments if a.startswith("--workdir=")]
    common = [a for a in arguments if a not in named and not a.startswith("--workdir=")]
    where = folder("--workdir", folders[-1]) if folders else Path("runs", Path(name).stem)
    found = [_entry(name, changes, common, where) for changes in _sweep(name, only)]
    directories = [entry.run.workdir for entry in found]
    if twice := {str(one) for one in directories if directories.count(one) > 1}:
        raise ConfigError(f"the sweep of {name} has a run twice: {', '.join(sorted(twice))}")
    return found


def joined(arguments: Sequence[str]) -> list[str]:
    """--flag=VALUE for each --flag VALUE."""
    found: list[str] = []
    for argument in arguments:
        if argument.startswith("-"):
            found.append(f"--{argument.lstrip('-')}")
        elif found and found[-1].startswith("-") and "=" not in found[-1]:
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def _sweep(name: str, only: str) -> Iterable[Mapping[str, Any]]:
    parse([f"--config={name}"])  # says what is wrong with a file that cannot be read
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise ConfigError(f"{name} has no sweep: add `def sweep()`, which yields dicts of fields")
    try:
        chosen = [x for x in module.sweep() if fnmatchcase(x.get("variant", ""), only or "*")]
    except MISTAKES as error:
        raise ConfigError(f"the sweep of {name} must yield dicts of fields: {error!r}") from error
    if not chosen:
        raise ConfigError(f"the sweep of {name} has no run of the variant {only!r}")
    return chosen


def _entry(name: str, changes: Mapping[str, Any], common: Sequence[str], where: Path) -> Entry:
    set_for_all = {argument.partition("=")[0] for argument in common}
    fields = {
        field: shell_value(value)
        for field, value in changes.items()
        if field != "variant" and f"--config.{field}" not in set_for_all
    }
    variant = changes.get("variant", "")
    short = [f"{field.rsplit('.', maxsplit=1)[-1]}={value}" for field, value in fields.items()]
    workdir = where / "-".join([variant or "default", *short])
    arguments = [
        f"--config={name}:{variant}" if variant else f"--config={name}",
        *(f"--config.{field}={value}" for field, value in fields.items()),
        *common,
        f"--workdir={workdir}",
    ]
    return Entry.of(arguments)


def execute(sweep: Sequence[Entry]) -> list[str]:
    """Runs all, each in a process of its own; returns the commands that did not finish.

    A run that was finished before says so and ends. The processes alone use JAX: an accelerator
    may serve one process at a time.
    """
    unfinished = []
    with Interrupts() as interrupts:
        for i, entry in enumerate(sweep, start=1):
            status = 0
            if not interrupts.requested:
                log.info("%d of %d: %s", i, len(sweep), entry.command())
                status = train_apart(entry.arguments, interrupts)[0]
            if status or not records.has_outcome(entry.run.workdir):
                log.info("%d of %d: not finished (exit status %d)", i, len(sweep), status)
                unfinished.append(entry.command())
    return unfinished


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status."""
    log_to_stderr()
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    try:
        sweep = entries([argument for argument in arguments if argument != "--run"])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "--run" not in arguments:
        print("\n".join(entry.command() for entry in sweep))
        return 0
    if failed := execute(sweep):
        print(f"{len(failed)} of {len(sweep)} runs did not finish:", *failed, sep="\n  ")
        return 1
    print(f"all {len(sweep)} runs are finished")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
