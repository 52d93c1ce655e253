"""The schema of every experiment, and how it is read from a config file and the command line."""

# No `from __future__ import annotations`: ml_collections reads the types of the fields.
import dataclasses
import difflib
import enum
import inspect
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from absl import flags
from ml_collections import config_flags


class Norm(enum.Enum):
    """What normalizes the hidden layers."""

    PLAIN = "plain"
    WEIGHT_NORM = "weight_norm"
    WEIGHT_NORM_INIT = "weight_norm_init"  # with gains and biases from a minibatch
    BATCH_NORM = "batch_norm"
    MEAN_ONLY = "mean_only"  # batch normalization of means
    WEIGHT_NORM_MEAN_ONLY = "weight_norm_mean_only"  # both, initialized from a minibatch

    @property
    def of_weights(self) -> bool:
        """Whether weights are normalized."""
        return "weight_norm" in self.value

    @property
    def from_data(self) -> bool:
        """Whether gains and biases are initialized from a minibatch."""
        return self in (Norm.WEIGHT_NORM_INIT, Norm.WEIGHT_NORM_MEAN_ONLY)

    @property
    def of_activations(self) -> Literal["batch", "mean_only"] | None:
        """What normalizes the outputs of layers."""
        if self is Norm.BATCH_NORM:
            return "batch"
        return "mean_only" if "mean_only" in self.value else None


@dataclasses.dataclass(slots=True, kw_only=True)
class Config:
    """One training run.

    Attributes:
      norm: what normalizes the layers: plain, weight_norm, weight_norm_init, batch_norm, mean_only
        or weight_norm_mean_only.
      widths: output channels of the 3x3 convolutions; all but the first halve the image.
      learning_rate: of stochastic gradient descent, constant.
      momentum: of the same; 0 for none.
      batch_size: images a step.
      steps: training steps; a multiple of steps_per_chunk.
      steps_per_chunk: steps compiled into one program; the test error is taken after each chunk.
      unroll: write the steps of a chunk out instead of looping over them. Compiling takes
        longer, but XLA's convolutions on a CPU are several times slower inside a loop.
      init_images: images behind data-dependent initialization, for the variants that have it.
      seeds: networks trained side by side, from seed on upwards.
      seed: of the first network: its initialization and its order of images.
    """

    norm: Norm
    widths: tuple[int, ...] = (16, 32, 32)
    learning_rate: float = 0.1
    momentum: float = 0.9
    batch_size: int = 64
    steps: int = 400
    steps_per_chunk: int = 20
    unroll: bool = False
    init_images: int = 500
    seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values, also after the command line has changed them."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(field.type, type):
                continue  # a generic type, whose values are checked below
            kinds = (int, float) if field.type is float else (field.type,)
            if not isinstance(value, kinds):
                raise TypeError(
                    f"{field.name} must be of type {field.type.__name__}, got {value!r}"
                )
        positive = "learning_rate", "batch_size", "steps", "steps_per_chunk", "init_images", "seeds"
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.widths or not all(isinstance(w, int) and w > 0 for w in self.widths):
            raise ValueError(f"widths must be one or more positive ints, got {self.widths}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        if not 0 <= self.seed < 2**31 - self.seeds:
            raise ValueError(f"seed must not be negative or beyond 31 bits, got {self.seed}")
        if self.steps % self.steps_per_chunk:
            raise ValueError(
                f"steps must be a multiple of steps_per_chunk, got {self.steps} and "
                f"{self.steps_per_chunk}"
            )


class ConfigError(ValueError):
    """The command line or a config file is wrong; the message says where and what to do."""


class Run(NamedTuple):
    """What to train and where to put the results."""

    config: Config
    workdir: Path


_DEFAULTS = ", ".join(
    f"{field.name}={field.default}"
    for field in dataclasses.fields(Config)
    if field.default is not dataclasses.MISSING
)
USAGE = f"""\
usage: python -m experiments.train --config=FILE[:VARIANT] [--config.FIELD=VALUE ...]
           [--workdir=DIR]

DIR is runs/<name of the file>/<norm> unless given.

{inspect.cleandoc(Config.__doc__ or "")}

Where the file says nothing else: {_DEFAULTS}"""

_Choice = TypeVar("_Choice", bound=enum.Enum)


def choose(choices: type[_Choice], name: str) -> _Choice:
    """The member of an enum with the value `name`, for the variants of config files.

    Raises:
      ValueError: if there is none; the message names the nearest and lists all.
    """
    values = [choice.value for choice in choices]
    if name not in values:
        raise ValueError(f"unknown variant {name!r}{_hint(name, values)}")
    return choices(name)


def parse(arguments: Sequence[str]) -> Run:
    """Reads a command line: `--config=FILE[:VARIANT] [--config.FIELD=VALUE ...] [--workdir=DIR]`.

    Raises:
      ConfigError: for an unknown field, variant, flag or file, a bad value, or anything
        that is left over.
    """
    values = flags.FlagValues()
    argv = ["experiments.train", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "Where the results go.", flag_values=values)
    _check_names(arguments)
    try:
        leftover = values(argv)[1:]
        config = _validated(values.config)
    except (flags.Error, TypeError, ValueError, AttributeError, OSError, SyntaxError) as error:
        raise ConfigError(_explain(error)) from error
    if leftover:
        raise ConfigError(f"leftover arguments {leftover}: fields are set by --config.FIELD=VALUE")
    file = Path(config_flags.get_config_filename(values["config"]).split(":")[0])
    default = Path("runs") / file.stem / config.norm.value
    return Run(config, Path(values.workdir) if values.workdir else default)


def _validated(config: Any) -> Config:
    """A new config, so that its checks see what the command line has set."""
    if isinstance(config, Config):
        return dataclasses.replace(config)
    getattr(config, "norm", None)  # what stands for a file that cannot be read says so now
    raise TypeError(f"get_config must return a Config, got {config!r}")


def _check_names(arguments: Sequence[str]) -> None:
    """Refuses misspelled flags and fields before absl does, which suggests nothing."""
    fields = [field.name for field in dataclasses.fields(Config)]
    known = ["config", "workdir", *(f"config.{field}" for field in fields)]
    names = [arg.lstrip("-").split("=")[0] for arg in arguments if arg.startswith("-")]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown flag --{name}{_hint(name, known, prefix='--')}")
    if "config" not in names:
        raise ConfigError("--config=FILE is missing, such as --config=configs/digits.py")


def _explain(error: BaseException) -> str:
    """The innermost message of an error; absl and ml_collections wrap it in tracebacks."""
    first = message = str(error).split("\n", maxsplit=1)[0]
    while inner := error.__cause__ or error.__context__:
        error, message = inner, str(inner).strip().split("\n")[-1].strip() or message
    if unknown := re.search(r"(?:keyword argument|has no attribute) '(\w+)'", message):
        name = unknown.group(1)
        message += _hint(name, [field.name for field in dataclasses.fields(Config)])
    flag = re.match(r"flag (--[\w.]+=\S*?):? ", first)
    return f"{flag.group(1)}: {message}" if flag else message


def _hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known := list(known), n=1)
    guess = f"; did you mean {prefix}{near[0]}?" if near else "."
    return f"{guess} There are: {', '.join(prefix + choice for choice in known)}"
