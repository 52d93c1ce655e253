"""Sweeps: every entry parses, commands are whole, failures do not stop the others."""

import shlex
import subprocess
import sys
import time

import pytest

from experiments import records, sweep, train
from experiments.checkpoints import Checkpoints
from experiments.command_line import ConfigError, parse
from tests.experiments.test_config import CONFIGS

SWEEPS = [path for path in CONFIGS if "def sweep" in path.read_text()]
RUNS = {
    "char_lm": 24,
    "cifar10": 41,
    "digits": 9,
    "cifar10_vae": 6,
    "mnist_draw": 4,
    "mnist_vae": 12,
}
FILE = """\
from experiments.config import Config
from experiments.tasks.classification import Digits

def get_config(variant="a"):
    return Config(task=Digits(widths=(2,)), steps=2, steps_per_eval=2, batch_size=8)

def sweep():
    for seed in (0, 1):
        yield {"variant": "a", "seed": seed}
    yield {"variant": "b", "optimizer.learning_rate": 0.5}
"""

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(FILE)
    return file


@pytest.mark.parametrize("path", SWEEPS, ids=str)
def test_every_entry_of_every_sweep_parses(path):
    found = sweep.entries([f"--config={path}"])
    assert len(found) == RUNS[path.stem]
    for entry in found:
        python, dash, module, *arguments = shlex.split(entry.command())
        assert (python, dash, module) == ("python", "-m", "experiments.train")
        assert parse(arguments).config == entry.run.config


def test_there_are_sweeps():
    assert {path.stem for path in SWEEPS} == RUNS.keys()


def test_commands_are_printed_and_nothing_is_run(file, capsys, tmp_path):
    assert sweep.main([f"--config={file}", f"--workdir={tmp_path / 'out'}"]) == 0
    prefix = f"python -m experiments.train --config={file}"
    assert capsys.readouterr().out.splitlines() == [
        f"{prefix}:a --config.seed=0 --workdir={tmp_path}/out/a-seed=0",
        f"{prefix}:a --config.seed=1 --workdir={tmp_path}/out/a-seed=1",
        f"{prefix}:b --config.optimizer.learning_rate=0.5 "
        f"--workdir={tmp_path}/out/b-learning_rate=0.5",
    ]
    assert not (tmp_path / "out").exists()


def test_one_variant_and_fields_for_all(file):
    found = sweep.entries([f"--config={file}:a", "--config.batch_size=4"])
    assert [entry.run.config.seed for entry in found] == [0, 1]
    assert {entry.run.config.batch_size for entry in found} == {4}
    assert str(found[0].run.workdir) == "runs/small/a-seed=0"


def test_fields_for_all_come_before_what_the_sweep_says(file):
    (found,) = sweep.entries([f"--config={file}:b", "--config.optimizer.learning_rate", "2"])
    assert found.run.config.optimizer.learning_rate == 2
    assert str(found.run.workdir) == "runs/small/b"
    with pytest.raises(ConfigError, match="has a run twice: runs/small/a"):
        sweep.entries(["--config", f"{file}:a", "--config.seed=7"])
    with pytest.raises(ConfigError, match="learning_rate=: could not convert"):
        sweep.entries([f"--config={file}:b", "--config.optimizer.learning_rate", ""])
    with pytest.raises(ConfigError, match=r"leftover arguments \['b'\]"):
        sweep.entries([f"--config={file}", "--config.seed=7", "b"])
    (found,) = sweep.entries(["-config", f"{file}:b", "--workdir", "some/where"])
    assert str(found.run.workdir) == "some/where/b-learning_rate=0.5"


def test_finished_runs_are_left_alone_and_failures_reported(file, tmp_path, capsys, monkeypatch):
    """The second of three fails once."""
    ran, broken = [], ["a-seed=1"]

    def in_this_process(arguments, interrupts):
        name = parse(arguments).workdir.name
        ran.append(name)
        return [2 if name in broken else train.main(arguments)]

    monkeypatch.setattr(sweep, "train_apart", in_this_process)
    arguments = [f"--config={file}", f"--workdir={tmp_path / 'out'}", "--run"]
    assert sweep.main(arguments) == 1
    out = capsys.readouterr().out
    assert "1 of 3 runs did not finish:\n  python -m experiments.train" in out
    assert "--config.seed=1" in out.split("did not finish:")[1]
    assert ran == ["a-seed=0", "a-seed=1", "b-learning_rate=0.5"]
    first = (tmp_path / "out/a-seed=0/outcome.txt").stat().st_mtime_ns
    broken.clear()
    assert sweep.main(arguments) == 0
    assert (tmp_path / "out/a-seed=0/outcome.txt").stat().st_mtime_ns == first
    assert "all 3 runs are finished" in capsys.readouterr().out
    assert records.read_metrics(tmp_path / "out/a-seed=1")[-1]["step"] == 2


def test_a_sweep_that_is_asked_to_stop_saves_its_run(file, tmp_path):
    """As a scheduler does it: SIGTERM to the sweep alone, while its first run trains."""
    file.write_text(FILE.replace("steps=2, steps_per_eval=2", "steps=10**6, steps_per_eval=2"))
    workdir = tmp_path / "out/a-seed=0"
    command = [sys.executable, "-W", "ignore", "-m", "experiments.sweep", f"--config={file}:a"]
    command += [f"--workdir={tmp_path / 'out'}", "--run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        metrics = workdir / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.count("\n  python -m experiments.train ") == 2  # what is to be run still
    assert f"stopped; the same command goes on: {workdir}" in out
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() >= 2


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('"seed": seed', '"sede": seed', "unknown flag --config.sede; did you mean --config.seed?"),
        ('"seed": seed', '"steps": -1', "steps must be positive, got -1"),
        ('"seed": seed', '"seed": 3', "has a run twice: "),
        ("def sweep", "def swep", "has no sweep: add `def sweep()`"),
        ("in (0, 1)", "in sedes", "must yield dicts of fields: NameError"),
        ('yield {"variant": "b", "optimizer.learning_rate": 0.5}', "yield 3", "must yield dicts"),
    ],
)
def test_a_mistake_anywhere_stops_before_anything_runs(old, new, text, file, capsys):
    file.write_text(FILE.replace(old, new))
    out = file.parent / "out"
    assert sweep.main([f"--config={file}", f"--workdir={out}", "--run"]) == 2
    assert text in capsys.readouterr().err
    assert not out.exists()


def test_an_unknown_variant_or_no_file(file):
    with pytest.raises(ConfigError, match="has no run of the variant 'c'"):
        sweep.entries([f"--config={file}:c"])
    with pytest.raises(ConfigError, match="--config=FILE is missing"):
        sweep.entries([])


def test_directories_of_a_sweep(file, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (first, *_) = sweep.entries([f"--config={file}", "--workdir=~/out"])
    assert first.run.workdir == tmp_path / "out/a-seed=0"
    assert sweep.main([f"--config={file}", "--workdir=", "--run"]) == 2
    assert "error: --workdir= is empty: name a directory" in capsys.readouterr().err
    assert sweep.main([f"--config={file.parent / 'smal.py'}"]) == 2
    assert f"did you mean {file}?" in capsys.readouterr().err


def test_help(capsys):
    assert sweep.main(["--help"]) == 0
    assert "--run" in capsys.readouterr().out
