"""Run directories are never overwritten by another run, and say what was run."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from experiments import records
from experiments.command_line import Run
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
