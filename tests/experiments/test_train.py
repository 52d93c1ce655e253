"""Whole runs: recorded, interrupted at any point and gone on with, stopped where they fail."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import records, report
from experiments.boards import Board
from experiments.checkpoints import Checkpoints
from experiments.command_line import ConfigError, parse
from experiments.config import VARIANTS
from experiments.datasets import DataError
from experiments.datasets.digits import digits
from experiments.interrupts import Interrupts
from experiments.items.resume import like_the_last_states
from experiments.train import load, main
from experiments.trainer import Trainer
from tests.experiments import processes
from tests.experiments.test_config import CONFIGS
from tests.experiments.test_records import on_disk

DIGITS = "--config=configs/digits.py"
TINY = ["--config.steps=4", "--config.steps_per_eval=2", "--config.steps_per_call=1"]
TINY += ["--config.unroll=false", "--config.batch_size=8", "--config.seeds=2"]
TINY += ["--config.task.widths=(4,8)"]

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled programs, for the processes of one worker."""
    return tmp_path_factory.mktemp("cache")


def metrics(workdir):
    """All but the times."""
    lines = records.read_metrics(workdir)
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


def assert_same_outcome(arguments, workdir, other):
    """The same metrics and the same last state, bit for bit."""
    assert metrics(workdir) == metrics(other)
    config, like = parse(arguments).config, like_the_last_states(arguments)
    with Checkpoints(workdir) as one, Checkpoints(other) as another:
        assert one.latest() == another.latest() == config.steps
        jax.tree.map(np.testing.assert_array_equal, one.restore(like), another.restore(like))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_leaves_a_record(variant, tmp_path, capsys):
    assert main([f"{DIGITS}:{variant}", *TINY, f"--workdir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out.startswith("run: test_error ")
    lines = records.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert np.isfinite(line["loss"]).all()
        assert len(line["test_error"]) == 2
        assert line["epoch"] == line["step"] * 8 / 1437
        assert line["norms"]["Conv_1/kernel"]["step"][0] > 0


def test_an_interrupted_run_ends_as_one_that_was_not(cache, tmp_path):
    """Killed while it trains, killed again, then asked to stop between two evaluations."""
    smoke = (f"{DIGITS}:smoke", "--config.steps=20", "--config.steps_per_eval=4")
    smoke += ("--config.evals_per_save=1", "--config.steps_per_call=2")
    whole = processes.run(*smoke, f"--workdir={tmp_path / 'whole'}", cache=cache)
    assert whole.returncode == 0, whole.stderr
    again = (*smoke, f"--workdir={tmp_path / 'again'}")
    for end_at, status in (("SIGKILL:2", -9), ("SIGKILL:10", -9), ("SIGTERM:14", 0)):
        done = processes.run(*again, cache=cache, end_at=end_at)
        assert done.returncode == status, done.stderr
    assert "going on from step 8" in done.stderr
    assert done.stdout.startswith("stopped; the same command goes on: ")
    last = processes.run(*again, cache=cache)
    assert last.returncode == 0, last.stderr
    assert "going on from step 14" in last.stderr
    assert (
        last.stdout.split(" after ")[0]
        == whole.stdout.replace("whole", "again").split(" after ")[0]
    )
    assert_same_outcome(smoke, tmp_path / "whole", tmp_path / "again")
    steps = [line["step"] for line in records.read_metrics(tmp_path / "again")]
    assert steps == [4, 8, 12, 16, 20]
    # A device for each of the two seeds, though this machine has one CPU.
    assert records.read_about(tmp_path / "whole")["devices"][0]["mesh"]["seeds"] == 2
    runs = [str(tmp_path / name) for name in ("whole", "again")]
    assert report.main([*runs, f"--out={tmp_path / 'report'}"]) == 0


def test_other_devices_go_on_with_a_run(cache, tmp_path):
    """Begun on eight, in parts, and ended on four: as on one, to rounding, and with a trace."""
    arguments = [f"{DIGITS}:weight_norm", *TINY, "--config.steps=8", "--config.evals_per_save=1"]
    assert main([*arguments, f"--workdir={tmp_path / 'one'}"]) == 0
    run = [*arguments, f"--workdir={tmp_path / 'run'}", "--config.mesh.tensor=2"]
    begun = processes.run(*run, "--config.mesh.data=4", cache=cache, end_at="SIGTERM:3")
    assert begun.returncode == 0, begun.stderr
    assert main([*run, "--config.mesh.fsdp=2"]) == 0
    devices = records.read_about(tmp_path / "run")["devices"]
    assert [some["mesh"] for some in devices] == [
        {"seeds": 1, "data": 4, "fsdp": 1, "tensor": 2},
        {"seeds": 1, "data": 1, "fsdp": 2, "tensor": 2},
    ]
    assert [some["step"] for some in devices] == [0, 3]
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "run"), strict=True):
        np.testing.assert_allclose(other["test_loss"], one["test_loss"], rtol=1e-4)
    assert report.main([str(tmp_path / "run"), f"--out={tmp_path / 'report'}"]) == 0
    table = (tmp_path / "report/table.md").read_text()
    assert "; 8 devices, from step 3 on: 4 devices; " in table


OTHERS = [path for path in CONFIGS if path.stem != "digits"]  # which is done above


LONGER = [f"{DIGITS}:plain", *TINY, "--config.steps=8", "--config.evals_per_save=1"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run from its begin to its end, and one that was asked to stop at step 6."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        assert main([*LONGER, f"--workdir={folder / 'whole'}"]) == 0
        patch.setattr(Interrupts, "stops_at", lambda self, step: step >= 6)
        assert main([*LONGER, f"--workdir={folder / 'begun'}"]) == 0
    return folder


@pytest.fixture
def begun(stopped, tmp_path):
    """A copy of the one that was asked to stop."""
    shutil.copytree(stopped / "begun", tmp_path / "begun")
    return tmp_path / "begun"


def test_a_second_process_is_refused_and_the_first_not_disturbed(begun, stopped, capsys):
    arguments = [*LONGER, f"--workdir={begun}"]
    with records.opened(parse(arguments)):
        before = on_disk(begun)
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {begun} is in use by process {os.getpid()} on ")
        assert error.count("\n") == 1
        assert on_disk(begun) == before
    assert main(arguments) == 0
    assert_same_outcome(LONGER, begun, stopped / "whole")


def test_a_run_goes_on_from_the_checkpoint_before_one_that_is_damaged(begun, stopped, capfd):
    """Of bits alone, which Orbax does not see; and with the last line of the metrics cut off."""
    (data,) = (begun / "checkpoints/6/state/ocdbt.process_0/d").iterdir()
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    metrics = begun / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-99])
    assert main([*LONGER, f"--workdir={begun}"]) == 0
    err = capfd.readouterr().err
    assert f"{metrics}: the last line, 3, was cut off and is left out" in err
    assert "going on from an earlier step than 6: " in err
    assert "going on from step 4" in err
    assert "Traceback" not in err
    assert_same_outcome(LONGER, begun, stopped / "whole")


@pytest.mark.parametrize("damage", ["line", "checkpoints"])
def test_a_run_that_cannot_go_on_is_left_as_it_is(damage, begun, capsys):
    if damage == "line":
        metrics = begun / "metrics.jsonl"
        first, second, third = metrics.read_text().splitlines(keepends=True)
        metrics.write_text(first + second[:40] + "\n" + third)
        text = f"error: {metrics} cannot be read: line 2 is damaged ("
    else:
        for step in (4, 6):
            (begun / f"checkpoints/{step}/state/_METADATA").unlink()
        text = f"error: {begun} cannot be resumed: the checkpoint {begun}/checkpoints/6 cannot"
    before = on_disk(begun)
    assert main([*LONGER, f"--workdir={begun}"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith(text)
    after = on_disk(begun)
    assert {name: x for name, x in after.items() if name != "run.lock"} == {
        name: x for name, x in before.items() if name != "run.lock"
    }


LIMITED = """
import resource, sys
from experiments.train import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_is_told_and_the_run_goes_on_later(begun, stopped, tmp_path):
    """Files of a limited size stand in for the disk."""
    arguments = [*LONGER, f"--workdir={begun}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, *arguments],
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert re.search(r"^error: .* cannot be written: .*File too large", done.stderr, re.MULTILINE)
    assert "free space on the disk" in done.stderr
    assert main(arguments) == 0
    assert_same_outcome(LONGER, begun, stopped / "whole")


@pytest.mark.parametrize(
    ("workdir", "text"),
    [
        ("x" * 300, "cannot be made: [Errno 36] File name too long"),
        ("", "--workdir= is empty: name a directory, or leave the flag out"),
        ("~nobody-9/run", "--workdir=~nobody-9/run: there is no such home directory"),
        ("file/run", "cannot be made: [Errno 20] Not a directory"),
    ],
    ids=["long", "empty", "no home", "in a file"],
)
def test_directories_that_cannot_be(workdir, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.train.load", lambda config: digits())
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("")
    where = workdir and (workdir if workdir.startswith("~") else f"{tmp_path}/{workdir}")
    assert main([f"{DIGITS}:plain", f"--workdir={where}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert text in error


def test_the_home_directory_stands_for_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse([DIGITS, "--workdir=~/run"]).workdir == tmp_path / "run"


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_every_smoke_variant_trains_is_killed_resumes_and_reports(path, cache, data_dir, tmp_path):
    arguments = (f"--config={path}:smoke", f"--config.data_dir={data_dir}")
    whole = processes.run(*arguments, f"--workdir={tmp_path / 'whole'}", cache=cache)
    assert whole.returncode == 0, whole.stderr
    arguments += (f"--workdir={tmp_path / 'run'}",)
    killed = processes.run(*arguments, cache=cache, end_at="SIGKILL:3")
    assert killed.returncode == -9, killed.stderr
    done = processes.run(*arguments, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "going on from step 2" in done.stderr
    assert_same_outcome(arguments, tmp_path / "whole", tmp_path / "run")
    steps = [line["step"] for line in records.read_metrics(tmp_path / "run")]
    assert steps == list(range(2, steps[-1] + 1, 2))
    assert report.main([str(tmp_path / "run"), f"--out={tmp_path / 'report'}"]) == 0
    assert (tmp_path / "report/curves.png").stat().st_size > 5000
    if "vae" in path.stem or "draw" in path.stem:
        pictures = {file.name for file in (tmp_path / "run/pictures").iterdir()}
        assert pictures == {"samples.png", "reconstructions.png"}
    if "cifar10" in path.stem:
        about = records.read_about(tmp_path / "run")
        assert about["data"]["CIFAR-10"].startswith("not the published files")


def test_a_finished_run_is_left_alone_and_another_one_refused(tmp_path, capsys):
    arguments = [f"{DIGITS}:plain", *TINY, f"--workdir={tmp_path}"]
    assert main(arguments) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert main([*arguments, "--config.seed=1"]) == 2
    assert "holds a different run:\n  config.seed: 0 there, 1 here" in capsys.readouterr().err


def test_the_command_line_learns_digits(cache, tmp_path):
    """As a user runs it: another process, the whole way to a low test error."""
    done = processes.run(
        *(f"{DIGITS}:weight_norm", "--config.steps=120", "--config.seeds=1"),
        f"--workdir={tmp_path}",
        cache=cache,
    )
    assert done.returncode == 0, done.stderr
    text = "Conv_2/kernel   (3, 3, 32, 32)  float32  32 neurons, norm over axes (0, 1, 2)"
    assert text in done.stderr
    assert "step 120 of 120: loss" in done.stderr  # a line per evaluation: this is no terminal
    assert f"(seeds: 1); records in {tmp_path}" in done.stdout
    assert records.read_metrics(tmp_path)[-1]["test_error"][0] < 0.12


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    arguments = [f"{DIGITS}:plain", *TINY, "--config.optimizer.learning_rate=1e30"]
    assert main([*arguments, f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    step = re.search(r"the loss or the update of seed 0 is not finite at step ([24]); ", error)
    assert "Conv_1/kernel" in error
    assert "Lower --config.optimizer.learning_rate" in error
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest() or 0) < int(step.group(1))


@pytest.mark.parametrize("argument", ["--help", f"{DIGITS}:plian"])
def test_help_and_errors(argument, capsys):
    status = main([argument])
    out, err = capsys.readouterr()
    if argument == "--help":
        assert status == 0
        assert "\n  steps_per_call: steps in one call" in out
    else:
        assert status == 2
        assert err.startswith(f"error: {DIGITS}:plian: unknown variant 'plian'")


def test_help_for_a_config_file_has_the_fields_of_its_task(capsys):
    assert main(["--config=configs/mnist_draw.py", "--help"]) == 0
    assert "\n  glimpses: steps in which an image is read and drawn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--config.batch_size=1438", "batch_size must be at most 1437, the number of training"),
        ("--config.train_examples=2000", "train_examples must be at most 1437, got 2000"),
        ("--config.test_examples=361", "test_examples must be at most 360, got 361"),
        (
            "--config.mesh.data=64",
            "mesh.data · mesh.fsdp · mesh.tensor must be at most 8, the number of devices, got 64",
        ),
    ],
)
def test_more_than_there_is(argument, text, tmp_path, capsys):
    assert main([f"{DIGITS}:plain", argument, f"--workdir={tmp_path / 'run'}"]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_had(tmp_path, capsys, monkeypatch):
    def refuse(folder):
        raise DataError(f"no network: {folder}")

    monkeypatch.setattr("experiments.tasks.images.mnist", refuse)
    assert main(["--config=configs/mnist_vae.py:smoke", f"--workdir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == "error: no network: data\n"
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named_with_its_extra():
    hide = "import importlib.util as util; find = util.find_spec; "
    hide += "util.find_spec = lambda name: None if name == 'tqdm' else find(name); "
    command = [sys.executable, "-c", f"{hide}import experiments.train"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: the experiments need tqdm: pip install '.[experiments]' in a clone of wnjax\n"
    )


def test_only_the_digits_need_scikit_learn(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main([f"{DIGITS}:smoke", f"--workdir={tmp_path}"]) == 2
    assert "error: the digits come with scikit-learn: pip install" in capsys.readouterr().err
    run = parse(["--config=configs/cifar10.py:smoke", f"--config.data_dir={data_dir}"])
    assert len(load(run.config).train["images"]) == 180


def test_examples_for_validation_are_the_last_ones_for_training(tmp_path):
    arguments = [f"{DIGITS}:plain", *TINY, "--config.train_examples=100", f"--workdir={tmp_path}"]
    arguments += ["--config.validation_examples=20", "--config.test_examples=20"]
    data, whole = load(parse(arguments).config), digits().train["images"]
    np.testing.assert_array_equal(data.train["images"], whole[:80])
    np.testing.assert_array_equal(data.validation["images"], whole[80:100])
    assert main(arguments) == 0
    last = records.read_metrics(tmp_path)[-1]
    assert last["epoch"] == 4 * 8 / 80
    trainer, like = Trainer(parse(arguments).config), like_the_last_states(arguments)
    with Checkpoints(tmp_path) as checkpoints:
        states = checkpoints.restore(like)
    for seed, error in enumerate(last["validation_error"]):
        state = jax.tree.map(lambda x, seed=seed: x[seed], states)
        sums = [trainer.evaluate(state, data.validation, jnp.int32(i))["error"] for i in range(3)]
        np.testing.assert_allclose(sum(sums) / 20, error)


def test_profile_and_tensorboard(tmp_path):
    arguments = [f"{DIGITS}:plain", *TINY, "--config.profile=(1,2)", "--config.tensorboard=true"]
    arguments += ["--config.steps_per_call=2"]  # a profile has whole calls
    assert main([*arguments, f"--workdir={tmp_path}"]) == 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    events = list((tmp_path / "tensorboard").iterdir())
    assert b"test_error" in events[0].read_bytes()


def test_tensorboard_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match="needs a package: pip install tensorboardX"):
        Board(tmp_path)


def test_a_state_that_is_being_saved_may_be_used_up(tmp_path):
    """Saving goes on in the background while the buffers are overwritten in place."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {
        "w": jnp.zeros((1000, 1000), jnp.float32),
        "key": jax.random.key_data(jax.random.key(1)),
    }
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(3):
            checkpoints.save(step, state)
            state = overwrite(overwrite(state))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 2
        restored = checkpoints.restore(state)
    np.testing.assert_array_equal(restored["w"], 4)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_records_hold_what_is_needed_to_run_again(tmp_path):
    arguments = [f"{DIGITS}:plain", *TINY, f"--workdir={tmp_path}"]
    main(arguments)
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["arguments"] == arguments
    assert about["variant"] == "plain"
    assert about["config"]["task"]["widths"] == [4, 8]
    assert about["config"]["task_name"] == "Digits"
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", about["commit"])
