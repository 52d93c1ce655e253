"""Run directories are never overwritten by another run, and say what was run."""

import dataclasses
import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import records
from experiments.command_line import Run, parse
from experiments.config import Config, Mesh, Optimizer
from experiments.networks.layers import ActivationNorm
from experiments.tasks.classification import Digits

CONFIG = Config(task=Digits(), steps=40)


def run(workdir, config=CONFIG):
    return Run(config, Path(workdir), "plain", ("--config=configs/digits.py:plain",))


def test_a_record_comes_back(tmp_path):
    one = run(tmp_path / "a" / "run")
    records.create(one)
    records.append(one.workdir, {"step": 1, "loss": [0.5]})
    records.append(one.workdir, {"step": 2, "loss": [0.25]})
    about = records.read_about(one.workdir)
    config = about["config"]
    assert config["norm"] == "none"
    assert config["optimizer"] == dataclasses.asdict(CONFIG.optimizer) | {"name": "sgd"}
    assert config["task"] == {"widths": [16, 32, 32]}
    assert config["task_name"] == "Digits"
    assert {"wnjax", "jax", "flax", "optax", "python"} <= set(about["versions"])
    assert about["device"]["platform"] == "cpu"
    assert about["arguments"] == ["--config=configs/digits.py:plain"]
    assert [line["step"] for line in records.read_metrics(one.workdir)] == [1, 2]


def test_the_same_run_is_gone_on_with(tmp_path):
    for step in (1, 2):
        records.create(run(tmp_path))
        records.append(tmp_path, {"step": step})
    assert len(records.read_metrics(tmp_path)) == 2


def test_rewinding_drops_what_comes_later(tmp_path):
    records.create(run(tmp_path))
    for step in (10, 20, 30):
        records.append(tmp_path, {"step": step, "seconds": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "sec')  # the process was killed here
    assert records.go_on(tmp_path, 20, {}) == 2.0
    assert [line["step"] for line in records.read_metrics(tmp_path)] == [10, 20]
    assert records.go_on(tmp_path, 0, {}) == 0.0
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_when_a_run_is_finished(tmp_path):
    assert not records.is_finished(run(tmp_path))
    records.create(run(tmp_path))
    records.append(tmp_path, {"step": 40})
    assert not records.is_finished(run(tmp_path))  # pictures and a checkpoint may be missing
    records.finish(tmp_path, "error 0.1")
    assert records.is_finished(run(tmp_path))
    assert records.read_outcome(tmp_path) == "error 0.1"
    assert not records.is_finished(run(tmp_path, dataclasses.replace(CONFIG, seed=1)))


def test_another_run_is_refused_and_kept(tmp_path):
    records.create(run(tmp_path))
    records.append(tmp_path, {"step": 1})
    optimizer = Optimizer(learning_rate=1.0)
    other = dataclasses.replace(CONFIG, norm=ActivationNorm.BATCH, optimizer=optimizer)
    with pytest.raises(
        records.RecordError,
        match=r"holds a different run:\n  config.norm: none there, batch here\n"
        r"  config.optimizer.learning_rate: 0.1 there, 1.0 here\nChoose another --workdir",
    ):
        records.create(run(tmp_path, other))
    assert len(records.read_metrics(tmp_path)) == 1


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch):
    version = records.metadata.version

    def of_others(package):
        if package == "wnjax":
            raise records.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(records.metadata, "version", of_others)
    assert records.versions()["wnjax"] == "not installed"
    assert records.versions()["jax"] == jax.__version__


def test_another_version_is_another_run(tmp_path):
    records.create(run(tmp_path))
    about = records.read_about(tmp_path)
    about["versions"]["jax"] = "0.0.1"
    (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(records.RecordError, match=r"versions.jax: 0.0.1 there"):
        records.create(run(tmp_path))


def test_what_changes_no_number_may_be_another(tmp_path):
    records.create(run(tmp_path))
    others = {"data_dir": "elsewhere", "evals_per_save": 7, "profile": (1, 3)}
    config = dataclasses.replace(CONFIG, **others, tensorboard=True, published=0.5)
    records.create(run(tmp_path, config))
    assert records.read_about(tmp_path)["config"]["evals_per_save"] == 1  # as it was begun


def test_other_devices_may_go_on_and_leave_a_trace(tmp_path):
    one, eight = {"seeds": 1, "data": 1}, {"seeds": 1, "data": 8}
    records.create(run(tmp_path))
    for step, mesh in ((0, one), (10, eight), (30, eight), (40, one), (30, one)):  # killed after 40
        records.go_on(tmp_path, step, mesh)
    config = dataclasses.replace(CONFIG, mesh=Mesh(data=8), batch_size=64)
    config.cluster.devices = 8
    records.create(run(tmp_path, config))
    assert records.read_about(tmp_path)["devices"] == [
        {"step": 0, "mesh": one, "processes": 1},
        {"step": 10, "mesh": eight, "processes": 1},
        {"step": 30, "mesh": one, "processes": 1},
    ]


@pytest.mark.parametrize(("platform", "same"), [("cpu", False), ("tpu", True)])
def test_the_host_of_an_accelerator_may_be_another(platform, same, tmp_path):
    records.create(run(tmp_path))
    about = records.read_about(tmp_path)
    here, there = (
        {**about, "device": {"platform": platform, "kind": "v5e", "machine": machine}}
        for machine in ("24 cores", "112 cores")
    )
    assert (records._compared(here) == records._compared(there)) == same


def test_the_commit_does_not_make_it_another_run(tmp_path, monkeypatch):
    records.create(run(tmp_path))
    monkeypatch.setattr(records, "commit", lambda: "another")
    records.create(run(tmp_path))


def test_other_directories_and_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(records.RecordError, match=r"holds no run \(it has no run.json\)"):
        records.create(run(tmp_path))
    with pytest.raises(records.RecordError, match="is not a directory; choose another"):
        records.create(run(tmp_path / "notes.txt"))
    with pytest.raises(records.RecordError, match=r"cannot be made: .*; choose another"):
        records.create(run(tmp_path / "notes.txt" / "run"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("run.json", None, "holds no run"),
        ("run.json", "{", "run.json cannot be read: "),
        ("run.json", "{}", "run.json has no config"),
        ("metrics.jsonl", None, "metrics.jsonl cannot be read: "),
        ("metrics.jsonl", "{\n{}", "metrics.jsonl cannot be read: line 1 is damaged"),
        ("metrics.jsonl", "{", "has no metrics yet"),  # cut off while it was written
        ("metrics.jsonl", "", "has no metrics yet"),
    ],
)
def test_what_cannot_be_read(file, content, text, tmp_path):
    if content is not None:
        (tmp_path / file).write_text(content)
    read = records.read_about if file == "run.json" else records.read_metrics
    with pytest.raises(records.RecordError, match=text):
        read(tmp_path)


def on_disk(folder):
    """By name, the content of every file: what is left where the process is killed."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def states_on_disk(folder, work):
    """All that another process may find on the disk while `work` goes on, from line to line."""
    found = []

    def look(frame, event, argument):
        if folder.is_dir() and (state := on_disk(folder)) not in found[-1:]:
            found.append(state)
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        work()
    finally:
        sys.settrace(before)
    return found


def a_short_life(workdir):
    """All that a run writes itself, with a part that is done twice."""
    with records.opened(run(workdir)):
        records.go_on(workdir, 0, {"seeds": 1})
        records.note_length(workdir, 40)
        for step in (20, 40):
            records.append(workdir, {"step": step, "seconds": 1.0, "long": "x" * 20_000})
        records.go_on(workdir, 20, {"seeds": 1})
        records.append(workdir, {"step": 40, "seconds": 1.0})
        records.finish(workdir, "error 0.1")


def test_a_process_that_is_killed_anywhere_leaves_what_the_same_command_goes_on_with(
    tmp_path, monkeypatch
):
    """Between any two writes, the creation included."""
    about = records.about_run(CONFIG)
    monkeypatch.setattr(records, "about_run", lambda config: dict(about))  # it writes nothing
    monkeypatch.setattr(records, "commit", lambda: "0123")
    whole = tmp_path / "whole"
    states = states_on_disk(whole, lambda: a_short_life(whole))
    expected = on_disk(whole)
    expected.pop("run.lock")
    assert len(states) > 15
    assert {} in states  # the directory alone
    assert any(state.keys() == {"run.lock"} for state in states)
    assert any(state.get("run.json.part") == b"" for state in states)
    for number, state in enumerate(states):
        again = tmp_path / str(number)
        again.mkdir()
        for name, content in state.items():
            (again / name).write_bytes(content)
        done = records.is_finished(run(again))
        assert done == (state.get("outcome.txt") == b"error 0.1\n")
        if "run.json" in state:
            steps = [line["step"] for line in records.read_lines(again)]
            assert steps in ([], [20], [20, 40]), state.keys()
        a_short_life(again)
        found = on_disk(again)
        assert {name: found[name] for name in expected} == expected, state.keys()


def test_a_process_that_is_killed_while_it_makes_a_run(tmp_path, capfd):
    """By a signal, right before the run is there."""
    command = (
        "import os, signal, sys; from pathlib import Path; from experiments import train; "
        "Path.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL); train.main(sys.argv[1:])"
    )
    arguments = ["--config=configs/digits.py:smoke", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", command, *arguments], check=False)
    assert done.returncode == -signal.SIGKILL
    left = {file.name for file in (tmp_path / "run").iterdir()}
    assert left == {"run.lock", "metrics.jsonl", "run.json.part"}
    with records.opened(parse(arguments)):
        assert records.read_about(tmp_path / "run")["variant"] == "smoke"


DAMAGED = {
    "a number": b"3",
    "null": b"null",
    "a list": b"[]",
    "binary": b"\xff\xfe\x00\x80" * 9,
    "empty": b"",
}


@pytest.mark.parametrize("content", [*DAMAGED, "a directory"])
def test_a_damaged_run_json_is_told_and_kept(content, tmp_path):
    records.create(run(tmp_path))
    file = tmp_path / "run.json"
    file.unlink()
    if content == "a directory":
        file.mkdir()
    else:
        file.write_bytes(DAMAGED[content])
    for use in (records.read_about, lambda workdir: records.create(run(workdir))):
        with pytest.raises(records.RecordError, match=r"run\.json .*put a copy of it back"):
            use(tmp_path)
    assert not records.is_finished(run(tmp_path))
    assert file.is_dir() or file.read_bytes() == DAMAGED[content]


@pytest.mark.parametrize("name", [*records.FIELDS, "device"])
def test_a_run_json_that_lacks_a_field_is_told(name, tmp_path):
    records.create(run(tmp_path))
    about = records.read_about(tmp_path)
    *path, last = name.split(".")
    part = about
    for key in path:
        part = part[key]
    for change in (lambda: part.update({last: None}), lambda: part.pop(last)):
        change()
        (tmp_path / "run.json").write_text(json.dumps(about))
        with pytest.raises(records.RecordError, match=rf"run\.json has no {name}, or a wrong one"):
            records.read_about(tmp_path)


def lines(*steps):
    return [json.dumps({"step": step, "seconds": step / 10}).encode() for step in steps]


@pytest.mark.parametrize(
    "damage", [b'{"step": 40, "sec', b'{"step": 4\x00\x00', b"{}", b'{"step": null}', b"\xff\xfe{"]
)
def test_a_damaged_line_of_metrics_is_named_and_nothing_is_dropped(damage, tmp_path):
    records.create(run(tmp_path))
    file = tmp_path / "metrics.jsonl"
    one, _, three = lines(20, 40, 60)
    file.write_bytes(b"\n".join([one, damage, three, b""]))
    before = on_disk(tmp_path)
    for use in (
        records.read_metrics,
        lambda workdir: records.go_on(workdir, 60, {}),
        lambda workdir: records.recorded(workdir, 20),
    ):
        with pytest.raises(records.RecordError, match=r"metrics\.jsonl cannot be read: line 2 is"):
            use(tmp_path)
    assert on_disk(tmp_path) == before


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_last_line_that_was_cut_off_is_left_out_and_told(end, tmp_path, caplog):
    records.create(run(tmp_path))
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\n".join([*lines(20, 40), b'{"step": 60, "sec']) + end)
    assert [line["step"] for line in records.read_metrics(tmp_path)] == [20, 40]
    assert f"{file}: the last line, 3, was cut off and is left out" in caplog.text
    assert records.recorded(tmp_path, 20) == 40


@pytest.mark.parametrize("content", [None, "a directory", b"\xff\xfe\x00\x80"])
def test_metrics_that_cannot_be_read(content, tmp_path):
    records.create(run(tmp_path))
    file = tmp_path / "metrics.jsonl"
    file.unlink()
    if content == "a directory":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    for use in (records.read_metrics, lambda workdir: records.go_on(workdir, 0, {})):
        with pytest.raises(records.RecordError, match=r"metrics\.jsonl cannot be read: "):
            use(tmp_path)


def test_the_last_step_without_a_gap(tmp_path):
    records.create(run(tmp_path))
    assert records.recorded(tmp_path, 20) == 0
    for steps, last in (((20, 40, 60), 60), ((20, 60), 20), ((40, 60), 0)):
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines(*steps)))
        assert records.recorded(tmp_path, 20) == last


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is full is Linux's")
def test_a_full_disk_is_told_and_loses_nothing(tmp_path):
    records.create(run(tmp_path))
    records.append(tmp_path, {"step": 20, "seconds": 1.0})
    before = on_disk(tmp_path)
    for name in ("run.json", "metrics.jsonl", "outcome.txt"):
        (tmp_path / f"{name}.part").symlink_to("/dev/full")
    writes = {
        "run.json": lambda: records.note_length(tmp_path, 40),
        "metrics.jsonl": lambda: records.write_whole(tmp_path / "metrics.jsonl", "x"),
        "outcome.txt": lambda: records.finish(tmp_path, "error 0.1"),
    }
    for name, write in writes.items():
        with pytest.raises(
            records.RecordError, match=rf"{name} cannot be written: No space left on device\. "
        ):
            write()
        (tmp_path / f"{name}.part").unlink()
    assert on_disk(tmp_path) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(records.RecordError, match=r"cannot be written: .*free space on the disk"):
        records.append(tmp_path / "full", {"step": 40})


def test_a_directory_that_cannot_be_made_or_written(tmp_path, monkeypatch):
    with pytest.raises(records.RecordError, match=r"cannot be made: .*File name too long"):
        records.create(run(tmp_path / ("x" * 300)))
    assert not records.is_finished(run(tmp_path / ("x" * 300)))
    records.create(run(tmp_path))
    opens = Path.open

    def read_only(self, mode="r", *others, **options):
        if mode not in ("r", "rb"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opens(self, mode, *others, **options)

    monkeypatch.setattr(Path, "open", read_only)
    with (
        pytest.raises(records.RecordError, match=r"run\.lock cannot be written: Permission denied"),
        records.opened(run(tmp_path)),
    ):
        pytest.fail("it was opened")
