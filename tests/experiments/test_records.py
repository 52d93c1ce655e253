"""Run directories are never overwritten by another run, and say what was run."""

import dataclasses
import json

import pytest

from experiments import records
from experiments.config import Config, Norm

CONFIG = Config(norm=Norm.PLAIN)


def test_a_record_comes_back(tmp_path):
    records.create(tmp_path / "a" / "run", CONFIG)
    records.append(tmp_path / "a" / "run", {"step": 1, "loss": [0.5]})
    records.append(tmp_path / "a" / "run", {"step": 2, "loss": [0.25]})
    about = records.read_about(tmp_path / "a" / "run")
    assert about["config"] | {"norm": Norm.PLAIN, "widths": (16, 32, 32)} == dataclasses.asdict(
        CONFIG
    )
    assert {"wnjax", "jax", "flax", "optax", "python"} <= set(about["versions"])
    assert about["device"]["platform"] == "cpu"
    assert [line["step"] for line in records.read_metrics(tmp_path / "a" / "run")] == [1, 2]


def test_the_same_run_is_begun_anew(tmp_path):
    for _ in range(2):
        records.create(tmp_path, CONFIG)
        records.append(tmp_path, {"step": 1})
    assert len(records.read_metrics(tmp_path)) == 1


def test_another_run_is_refused_and_kept(tmp_path):
    records.create(tmp_path, CONFIG)
    records.append(tmp_path, {"step": 1})
    other = dataclasses.replace(CONFIG, norm=Norm.BATCH_NORM, learning_rate=1.0)
    with pytest.raises(
        records.RecordError,
        match=r"holds a different run:\n  config.learning_rate: 0.1 there, 1.0 here\n"
        r"  config.norm: plain there, batch_norm here\nChoose another --workdir",
    ):
        records.create(tmp_path, other)
    assert len(records.read_metrics(tmp_path)) == 1


def test_another_version_is_another_run(tmp_path):
    records.create(tmp_path, CONFIG)
    about = records.read_about(tmp_path)
    about["versions"]["jax"] = "0.0.1"
    (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(records.RecordError, match=r"versions.jax: 0.0.1 there"):
        records.create(tmp_path, CONFIG)


def test_other_directories_and_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(records.RecordError, match=r"holds no run \(it has no run.json\)"):
        records.create(tmp_path, CONFIG)
    with pytest.raises(records.RecordError, match="is not a directory; choose another"):
        records.create(tmp_path / "notes.txt", CONFIG)
    with pytest.raises(records.RecordError, match=r"cannot be made: .*Not a directory"):
        records.create(tmp_path / "notes.txt" / "run", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("run.json", None, "holds no run"),
        ("run.json", "{", "run.json cannot be read: "),
        ("run.json", "{}", "run.json has no config"),
        ("metrics.jsonl", None, "metrics.jsonl cannot be read: "),
        ("metrics.jsonl", "{", "metrics.jsonl cannot be read: "),
        ("metrics.jsonl", "", "has no metrics yet"),
    ],
)
def test_what_cannot_be_read(file, content, text, tmp_path):
    if content is not None:
        (tmp_path / file).write_text(content)
    read = records.read_about if file == "run.json" else records.read_metrics
    with pytest.raises(records.RecordError, match=text):
        read(tmp_path)
