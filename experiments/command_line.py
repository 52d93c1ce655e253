"""How an experiment is named on a command line, and what is said of mistakes."""

import dataclasses
import difflib
import enum
import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from absl import flags
from ml_collections import config_flags

from experiments.config import Cluster, Config, Mesh, Optimizer


class ConfigError(ValueError):
    """The command line or a config file is wrong; the message says where and what to do."""


class Run(NamedTuple):
    """What to train and where to put the results."""

    config: Config
    workdir: Path
    variant: str
    arguments: tuple[str, ...]  # that say so


def usage(task: type | None = None) -> str:
    """What --help prints; with the fields of a task, where a config file names one."""
    parts = [f"Config\n{inspect.cleandoc(Config.__doc__ or '')}"]
    for name, part in (("optimizer", Optimizer), ("mesh", Mesh), ("cluster", Cluster)):
        parts.append(f"config.{name}\n{inspect.cleandoc(part.__doc__ or '')}")
    if task:
        parts.append(f"config.task: {task.__name__}\n{inspect.cleandoc(task.__doc__ or '')}")
    defaults = ", ".join(
        f"{field.name}={field.default}"
        for field in dataclasses.fields(Config)
        if field.default is not dataclasses.MISSING
    )
    return (
        "usage: python -m experiments.train --config=FILE[:VARIANT] [--config.FIELD=VALUE ...]\n"
        "           [--workdir=DIR]\n\n"
        "DIR is runs/<name of the file>/<variant> unless given. A run that was interrupted goes "
        "on\nwhere its last checkpoint is.\n\n" + "\n\n".join(parts) + "\n\n"
        f"Where the file says nothing else: {defaults}"
    )


_T = TypeVar("_T")
# What a config file with mistakes in it, or a bad value for a field, may raise.
MISTAKES = (
    *(flags.Error, TypeError, ValueError, AttributeError, LookupError, NameError),
    *(ImportError, OSError, SyntaxError),
)


def choose(choices: Mapping[str, _T], name: str) -> _T:
    """What belongs to `name`, for the variants of config files.

    Raises:
      ValueError: if there is none; the message names the nearest and lists all.
    """
    if name not in choices:
        raise ValueError(f"unknown variant {name!r}{hint(name, choices)}")
    return choices[name]


def parse(arguments: Sequence[str]) -> Run:
    """Reads a command line: `--config=FILE[:VARIANT] [--config.FIELD=VALUE ...] [--workdir=DIR]`.

    Raises:
      ConfigError: for an unknown field, variant, flag or file, a bad value, or anything
        that is left over.
    """
    named, others = _split(arguments)
    _check_file(named)
    _check_names(arguments, _read(named)[0] if named else None)
    config, leftover, values = _read([*named, *others])  # ml_collections wants the file first
    if leftover:
        raise ConfigError(f"leftover arguments {leftover}: fields are set by --config.FIELD=VALUE")
    name, _, variant = config_flags.get_config_filename(values["config"]).partition(":")
    variant = variant or "default"
    default = str(Path("runs", Path(name).stem, variant))
    if "://" in (workdir := default if values.workdir is None else values.workdir):
        raise ConfigError(
            f"--workdir={workdir} must be a directory; mount the bucket, and give its mount point"
        )
    folder("--config.data_dir", config.data_dir)
    return Run(config, folder("--workdir", workdir), variant, tuple(arguments))


def folder(flag: str, text: str) -> Path:
    """The path that a flag names, with the home directory in place of ~.

    Raises:
      ConfigError: if it is empty, as that of a shell variable that is not set, or there is no such
        home directory.
    """
    if not text:
        raise ConfigError(f"{flag}= is empty: name a directory, or leave the flag out")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{flag}={text}: there is no such home directory") from error


def _check_file(named: Sequence[str]) -> None:
    """Refuses a config file that is not there; the message names the nearest that is."""
    name = re.sub("^-+config(=|$)", "", named[-1]) if named else ""
    file = name.partition(":")[0]
    if not file or os.path.isfile(file):
        return  # whatever else is wrong is found where the file is read
    what = "Is a directory" if os.path.isdir(file) else "No such file or directory"
    places = {Path(file), Path(file).parent, Path("configs")}
    known = {str(path) for place in places if os.path.isdir(place) for path in place.glob("*.py")}
    raise ConfigError(f"--config={name}: {what}: '{file}'{hint(file, sorted(known))}")


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that name the config file, and those that set fields or flags."""
    for i, argument in enumerate(arguments):
        if argument.lstrip("-").partition("=")[0] == "config":
            end = i + 1 if "=" in argument else i + 2
            return list(arguments[i:end]), [*arguments[:i], *arguments[end:]]
    return [], list(arguments)


def _read(arguments: Sequence[str]) -> tuple[Config, list[str], flags.FlagValues]:
    values = flags.FlagValues()
    argv = ["experiments.train", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "Where the results go.", flag_values=values)
    try:
        leftover = values(argv)[1:]
        return _validated(values.config), leftover, values
    except MISTAKES as error:
        raise ConfigError(_explain(error)) from error


def _validated(config: Any) -> Config:
    """A new config, so that its checks see what the command line has set."""
    if isinstance(config, Config):
        names = "task", "optimizer", "mesh", "cluster"
        parts = {name: dataclasses.replace(getattr(config, name)) for name in names}
        return dataclasses.replace(config, **parts)
    getattr(config, "task", None)  # what stands for a file that cannot be read says so now
    raise TypeError(f"get_config must return a Config, got {config!r}")


def fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """From the dotted name of every field to its value."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        found |= fields(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def _check_names(arguments: Sequence[str], config: Config | None) -> None:
    """Refuses misspelled flags and fields before absl does, which suggests nothing."""
    known = ["config", "workdir"]
    if config is not None:
        known += [f"config.{name}" for name in fields(config)]
    names = [arg.lstrip("-").split("=")[0] for arg in arguments if arg.startswith("-")]
    for name in names:
        if name not in known and (config is not None or not name.startswith("config.")):
            raise ConfigError(f"unknown flag --{name}{hint(name, known, prefix='--')}")
    if "config" not in names:
        raise ConfigError("--config=FILE is missing, such as --config=configs/digits.py")


def _explain(error: BaseException) -> str:
    """The innermost message of an error; absl and ml_collections wrap it in tracebacks."""
    first = message = str(error).split("\n", maxsplit=1)[0]
    while inner := error.__cause__ or error.__context__:
        error, message = inner, str(inner).strip().split("\n")[-1].strip() or message
    if unknown := re.search(r"(?:keyword argument|has no attribute) '(\w+)'", message):
        name = unknown.group(1)
        message += hint(name, [field.name for field in dataclasses.fields(Config)])
    flag = re.match(r"flag (--[\w.]+=\S*?):? ", first)
    return f"{flag.group(1)}: {message}" if flag else message


def hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message on an unknown name: the nearest that there is, and all."""
    near = difflib.get_close_matches(name, known := list(known), n=1)
    guess = f"; did you mean {prefix}{near[0]}?" if near else "."
    return f"{guess} There are: {', '.join(prefix + choice for choice in known)}"


def shell_value(value: Any) -> str:
    """A field's value as it is written on a command line."""
    return str(value.value) if isinstance(value, enum.Enum) else str(value).replace(" ", "")
