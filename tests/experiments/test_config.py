"""Every config file parses; every mistake is told, with the right spelling where one is near."""

import dataclasses
import inspect
import re
from pathlib import Path

import numpy as np
import optax
import pytest

from experiments.command_line import ConfigError, fields, parse, usage
from experiments.config import Config, Optimizer, Update
from experiments.networks.layers import ActivationNorm
from experiments.tasks.classification import Digits

CONFIGS = sorted(Path("configs").glob("*.py"))
DIGITS = "--config=configs/digits.py"


def variants(path):
    """The variants that a config file lists at its top."""
    text = re.search(r"^Variants: (.*?)\n\"\"\"", path.read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(r"\w+", text.group(1))


CASES = [f"--config={path}:{variant}" for path in CONFIGS for variant in variants(path)]


def test_configs_are_found():
    names = {"char_lm", "cifar10", "cifar10_vae", "digits", "mnist_draw", "mnist_vae"}
    assert names == {path.stem for path in CONFIGS}
    assert len(CASES) > 30


@pytest.mark.parametrize("case", CASES)
def test_every_variant_parses(case):
    assert isinstance(parse([case]).config, Config)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_file_lists_all_its_variants_and_says_how_to_run_it(path):
    with pytest.raises(ConfigError) as error:
        parse([f"--config={path}:nonesuch"])
    listed = str(error.value).split("There are: ")[1].split(", ")
    assert sorted(listed) == sorted(variants(path))
    for part in ("Run:", "Expect:", "Time:"):
        assert f"\n{part} " in path.read_text()
    command = re.search(r"^Run: +python -m experiments.train (.*)$", path.read_text(), re.MULTILINE)
    parse(command.group(1).split())


def test_defaults_and_overrides():
    config, workdir, variant, _ = parse([DIGITS])
    assert (config.weight_norm, workdir) == (True, Path("runs/digits/default"))
    assert variant == "default"
    run = parse(
        [
            "--config.norm=batch",  # before the file as well as after it
            f"{DIGITS}:plain",
            "--config.task.widths=(4,8)",
            "--config.optimizer.learning_rate=1",
            "--config.optimizer.name=adam",
            "--config.steps",
            "40",
            "--config.unroll=false",
            "--workdir=some/where",
        ]
    )
    config = run.config
    assert (config.norm, config.task.widths) == (ActivationNorm.BATCH, (4, 8))
    assert (config.optimizer.learning_rate, config.optimizer.name) == (1.0, Update.ADAM)
    assert (config.steps, config.unroll) == (40, False)
    assert (run.workdir, run.variant) == (Path("some/where"), "plain")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--config=FILE is missing, such as --config=configs/digits.py"),
        (["--config.steps=3"], "--config=FILE is missing, such as --config=configs/digits.py"),
        (["--config"], "Missing value for flag --config"),
        (["--config=configs/none.py"], "No such file or directory: 'configs/none.py'"),
        (["--config=configs/digts.py:plain"], "'configs/digts.py'; did you mean configs/digits.py"),
        (["--config", "configs/digts.py"], "'configs/digts.py'; did you mean configs/digits.py?"),
        (["--config=digits.py"], "'digits.py'; did you mean configs/digits.py? There are: config"),
        (["--config=configs/digits"], "'configs/digits'; did you mean configs/digits.py?"),
        (["--config=configs"], "Is a directory: 'configs'. There are: configs/char_lm.py, confi"),
        ([f"--config={'x' * 300}.py"], "No such file or directory: 'xxx"),
        (["--config="], "Path to config file is an empty string."),
        ([DIGITS, "--workdir="], "--workdir= is empty: name a directory, or leave the flag out"),
        ([DIGITS, "--config.data_dir="], "--config.data_dir= is empty: name a directory, or"),
        ([DIGITS, "--config.data_dir=~nobody-9"], "data_dir=~nobody-9: there is no such home dir"),
        ([f"{DIGITS}:plian"], "unknown variant 'plian'; did you mean plain? There are: plain, we"),
        ([DIGITS, "--config.stpes=3"], "unknown flag --config.stpes; did you mean --config.steps?"),
        ([DIGITS, "--confg.steps=3"], "unknown flag --confg.steps; did you mean --config.steps?"),
        (
            [DIGITS, "--config.optimizer.learning_rat=3"],
            "did you mean --config.optimizer.learning_rate?",
        ),
        ([DIGITS, "--config.task.glimpses=3"], "unknown flag --config.task.glimpses"),
        ([DIGITS, "--wrokdir=x"], "unknown flag --wrokdir; did you mean --workdir?"),
        ([DIGITS, "--qqq=3"], "unknown flag --qqq. There are: --config, --workdir, --config.task"),
        ([DIGITS, "--config.steps=abc"], "--config.steps=abc: invalid literal for int()"),
        ([DIGITS, "--config.steps=1.5"], "--config.steps=1.5: invalid literal for int()"),
        ([DIGITS, "--config.steps"], "Missing value for flag --config.steps"),
        ([DIGITS, "--config.norm=wn"], "--config.norm=wn: value should be one of <none|batch|me"),
        ([DIGITS, "--config.steps=-3"], "steps must be positive, got -3"),
        ([DIGITS, "--config.steps=30"], "steps must be a multiple of steps_per_eval, got 30 and"),
        ([DIGITS, "--config.steps_per_call=3"], "steps_per_eval must be a multiple of steps_per_c"),
        ([DIGITS, "--config.optimizer.learning_rate=nan"], "learning_rate must be positive, got"),
        ([DIGITS, "--config.optimizer.momentum=1"], "momentum must lie in [0, 1), got 1.0"),
        ([DIGITS, "--config.optimizer.late_momentum=0.5"], "late_momentum needs optimizer.decay"),
        ([DIGITS, "--config.optimizer.clip=-1"], "optimizer.clip must not be negative, got -1.0"),
        ([DIGITS, "--config.ema_decay=1"], "ema_decay must lie in [0, 1), got 1.0"),
        (
            [DIGITS, "--config.mesh.data=3"],
            "batch_size must be a multiple of mesh.data · mesh.fsdp, got 64 and 3",
        ),
        ([DIGITS, "--config.mesh.tensor=0"], "mesh.tensor must be positive, got 0"),
        ([DIGITS, "--config.profile=(5,2)"], "profile must be two steps in order, got (5, 2)"),
        ([DIGITS, "--config.seed=-1"], "seed must not be negative or beyond 31 bits, got -1"),
        ([DIGITS, "--config.seed=5000000000"], "seed must not be negative or beyond 31 bits"),
        (["--config=README.md"], "(README.md, line 3)"),
        ([DIGITS, "--config.task.widths=()"], "task.widths must be one or more positive ints, got"),
        ([DIGITS, "--config.task.widths=(1,'a')"], "widths must be one or more positive ints, got"),
        (
            ["--config=configs/cifar10.py", "--config.task.widths=(1,2)"],
            "task.widths must be 3 positive ints, got (1, 2)",
        ),
        (
            ["--config=configs/cifar10.py", "--config.task.dropout=1"],
            "task.dropout must lie in [0, 1), got 1.0",
        ),
        (
            ["--config=configs/mnist_vae.py", "--config.norm=batch"],
            "norm must be one of none for this task, got batch",
        ),
        (
            ["--config=configs/char_lm.py", "--config.task.heads=3"],
            "task.width must be a multiple of task.heads, got 128 and 3",
        ),
        ([DIGITS, "config.steps=3"], "leftover arguments ['config.steps=3']: fields are set by --"),
        ([DIGITS, "plain"], "leftover arguments ['plain']"),
    ],
)
def test_mistakes_on_the_command_line(arguments, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        parse(arguments)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            "return Config(task=Digits(), nrom=1)",
            "unexpected keyword argument 'nrom'; did you mean norm?",
        ),
        ("c = Config(task=Digits()); c.stpes = 3; return c", "did you mean steps?"),
        ("return Config()", "missing 1 required keyword-only argument: 'task'"),
        ("return Config(task='digits')", "task must be of type Task, got 'digits'"),
        ("return Config(task=Digits(), steps=40.0)", "steps must be of type int, got 40.0"),
        ("pass", "get_config must return a Config, got None"),
        ("return Confg()", "name 'Confg' is not defined"),
        ("import nonesuch", "No module named 'nonesuch'"),
    ],
)
def test_mistakes_in_a_config_file(body, text, tmp_path):
    file = tmp_path / "config.py"
    imports = "from experiments.config import *\nfrom experiments.tasks.classification import *\n"
    file.write_text(f"{imports}def get_config():\n    {body}\n")
    with pytest.raises(ConfigError, match=re.escape(text)):
        parse([f"--config={file}"])


TASKS = sorted({type(parse([case]).config.task) for case in CASES}, key=str)


@pytest.mark.parametrize("schema", [Config, Optimizer, *TASKS], ids=lambda x: x.__name__)
def test_every_field_is_documented(schema):
    documented = re.findall(r"^  (\w+): ", inspect.cleandoc(schema.__doc__), re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(schema)]


def test_help_lists_the_fields_of_the_task():
    assert "\n  widths: output channels of the 3x3 convolutions" in usage(Digits)
    assert "\n  steps_per_eval: steps between evaluations" in usage()


def test_fields_have_dotted_names():
    config = Config(task=Digits(widths=(3,)))
    assert fields(config)["task.widths"] == (3,)
    assert fields(config)["optimizer.momentum"] == 0.9


@pytest.mark.usefixtures("standard_promotion")
def test_the_optimizer_of_the_paper():
    """Adam, the rate falling linearly and β₁ changing at once, against Adam written out."""
    made = Optimizer(
        name=Update.ADAM, learning_rate=0.1, momentum=0.9, late_momentum=0.5, decay_from=3
    ).make(6)
    w = np.float32(1.0)
    state = made.init(w)
    expected, mean, square = 1.0, 0.0, 0.0
    for step in range(6):
        g = 0.5 + step
        updates, state = made.update(np.float32(g), state, w)
        w = optax.apply_updates(w, updates)
        b1 = 0.9 if step < 3 else 0.5
        rate = 0.1 * (1 if step < 3 else (6 - step) / 3)
        mean, square = b1 * mean + (1 - b1) * g, 0.999 * square + 0.001 * g * g
        corrected = mean / (1 - b1 ** (step + 1))
        expected -= rate * corrected / (np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
        np.testing.assert_allclose(w, expected, rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_clipping():
    made = Optimizer(name=Update.SGD, learning_rate=1.0, momentum=0.0, clip=1.0).make(1)
    g = np.array([3.0, 4.0], np.float32)
    updates, _ = made.update(g, made.init(g), g)
    np.testing.assert_allclose(updates, [-0.6, -0.8], rtol=1e-6)
