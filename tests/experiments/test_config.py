"""Every config file parses; every mistake is told, with the right spelling where one is near."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from experiments.config import Config, ConfigError, Norm, parse

CONFIGS = sorted(Path("configs").glob("*.py"))
DIGITS = "--config=configs/digits.py"


def variants(path):
    """The variants that a config file lists at its top."""
    line = re.search(r"^Variants: (.*)$", path.read_text(), re.MULTILINE).group(1)
    return re.findall(r"\w+(?=,|$| \()", line)


CASES = [f"--config={path}:{variant}" for path in CONFIGS for variant in variants(path)]


def test_configs_are_found():
    assert {"plain", "weight_norm", "batch_norm"} <= {case.split(":")[1] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_every_variant_parses(case):
    assert isinstance(parse([case]).config, Config)


def test_defaults_and_overrides():
    config, workdir = parse([DIGITS])
    assert (config.norm, workdir) == (Norm.WEIGHT_NORM, Path("runs/digits/weight_norm"))
    config, workdir = parse(
        [
            f"{DIGITS}:plain",
            "--config.norm=batch_norm",
            "--config.widths=(4,8)",
            "--config.learning_rate=1",
            "--config.steps",
            "40",
            "--config.unroll=false",
            "--workdir=some/where",
        ]
    )
    assert (config.norm, config.widths, config.learning_rate) == (Norm.BATCH_NORM, (4, 8), 1.0)
    assert (config.steps, config.unroll, workdir) == (40, False, Path("some/where"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--config=FILE is missing, such as --config=configs/digits.py"),
        (["--config"], "Missing value for flag --config"),
        (["--config=configs/none.py"], "No such file or directory: 'configs/none.py'"),
        ([f"{DIGITS}:plian"], "unknown variant 'plian'; did you mean plain? There are: plain, we"),
        ([DIGITS, "--config.stpes=3"], "unknown flag --config.stpes; did you mean --config.steps?"),
        ([DIGITS, "--confg.steps=3"], "unknown flag --confg.steps; did you mean --config.steps?"),
        ([DIGITS, "--wrokdir=x"], "unknown flag --wrokdir; did you mean --workdir?"),
        ([DIGITS, "--qqq=3"], "unknown flag --qqq. There are: --config, --workdir, --config.norm"),
        ([DIGITS, "--config.steps=abc"], "--config.steps=abc: invalid literal for int()"),
        ([DIGITS, "--config.steps=1.5"], "--config.steps=1.5: invalid literal for int()"),
        ([DIGITS, "--config.steps"], "Missing value for flag --config.steps"),
        ([DIGITS, "--config.norm=wn"], "--config.norm=wn: value should be one of <plain|weight_no"),
        ([DIGITS, "--config.steps=-3"], "steps must be positive, got -3"),
        ([DIGITS, "--config.steps=30"], "steps must be a multiple of steps_per_chunk, got 30 and"),
        ([DIGITS, "--config.learning_rate=nan"], "learning_rate must be positive, got nan"),
        ([DIGITS, "--config.momentum=1"], "momentum must lie in [0, 1), got 1.0"),
        ([DIGITS, "--config.seed=-1"], "seed must not be negative or beyond 31 bits, got -1"),
        ([DIGITS, "--config.seed=5000000000"], "seed must not be negative or beyond 31 bits"),
        (["--config=README.md"], "(README.md, line 3)"),
        ([DIGITS, "--config.widths=()"], "widths must be one or more positive ints, got ()"),
        ([DIGITS, "--config.widths=(1,'a')"], "widths must be one or more positive ints, got (1,"),
        ([DIGITS, "config.steps=3"], "leftover arguments ['config.steps=3']: fields are set by --"),
        ([DIGITS, "plain"], "leftover arguments ['plain']"),
        (["--config.steps=20", DIGITS], "Found --config.steps=20 in argv before a value for --co"),
    ],
)
def test_mistakes_on_the_command_line(arguments, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        parse(arguments)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            "return Config(nrom=Norm.PLAIN)",
            "unexpected keyword argument 'nrom'; did you mean norm?",
        ),
        ("c = Config(norm=Norm.PLAIN); c.stpes = 3; return c", "did you mean steps?"),
        ("return Config()", "missing 1 required keyword-only argument: 'norm'"),
        ("return Config(norm='plain')", "norm must be of type Norm, got 'plain'"),
        ("return Config(norm=Norm.PLAIN, steps=40.0)", "steps must be of type int, got 40.0"),
        ("pass", "get_config must return a Config, got None"),
    ],
)
def test_mistakes_in_a_config_file(body, text, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(f"from experiments.config import *\ndef get_config():\n    {body}\n")
    with pytest.raises(ConfigError, match=re.escape(text)):
        parse([f"--config={file}"])


def test_every_field_is_documented():
    documented = re.findall(r"^  (\w+): ", inspect.cleandoc(Config.__doc__), re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(Config)]
