"""The table and the pictures, from records with known numbers."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import records, report
from experiments.command_line import Run
from experiments.config import Config, Optimizer
from experiments.tasks.classification import Digits
from experiments.tasks.language import CharLm


def write(workdir, variant, errors, seconds_per_step=0.01, **fields):
    """A run with an evaluation after 20 and after 40 steps, two epochs."""
    config = Config(task=Digits(), **{"steps": 40, **fields})
    arguments = (f"--config=configs/digits.py:{variant}", f"--workdir={workdir}")
    records.create(Run(config, workdir, variant, arguments))
    for i, per_seed in enumerate(errors, start=1):
        line = {"step": 20 * i, "epoch": float(i), "test_error": per_seed}
        times = {"seconds": 20 * i * seconds_per_step, "seconds_per_step": seconds_per_step}
        norms = {"Conv_0/kernel": {"v": [1.0 * i] * 2, "step": [0.1 / i] * 2}}
        records.append(workdir, {**line, **times, "norms": norms})
    return workdir


@pytest.fixture
def runs(tmp_path):
    """A plain run, and one that is twice as slow and ends with as many errors."""
    plain = write(tmp_path / "plain", "plain", [[0.5, 0.05], [0.03, 0.05]], published=0.0843)
    other = write(
        *(tmp_path / "weight_norm", "weight_norm", [[0.02, 0.04], [0.02, 0.06]]),
        seconds_per_step=0.02,
        weight_norm=True,
    )
    return [plain, other]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table(runs):
    lines = report.table(report.read_all(runs)).splitlines()
    header, plain, weight_norm = (cells(lines[i]) for i in (0, 2, 3))
    expected = "run, n, epochs, last test error (%), best, published, epochs to plain's last"
    assert ", ".join(header[:-1]) == expected
    # Errors of 3 and 5 %: mean 4, std √2; the best ones are 3 and 5, and 2 and 4.
    expected = ["plain", "2", "2", "4.00 ± 1.41", "4.00 ± 1.41", "8.43", "2"]
    assert plain == [*expected, "10.0 (10.0 to 10.0)"]
    expected = ["weight_norm", "2", "2", "4.00 ± 2.83", "3.00 ± 1.41", "-", "1"]
    assert weight_norm == [*expected, "20.0 (20.0 to 20.0)"]


def test_table_without_a_plain_run(runs):
    assert cells(report.table(report.read_all(runs[1:])).splitlines()[-1])[6] == "-"


def test_a_run_that_never_gets_there(runs, tmp_path):
    slow = write(tmp_path / "slow", "batch_norm", [[0.5, 0.5], [0.4, 0.4]])
    assert cells(report.table(report.read_all([*runs, slow])).splitlines()[-1])[6] == "never"


def test_files_and_what_is_kept(runs, tmp_path, capsys):
    out = tmp_path / "new" / "digits"
    assert report.main([*map(str, runs), f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"pictures and numbers: {out} (curves.png, norms.png)"
    assert (out / "table.md").read_text() in printed
    assert "x86_64" in printed or "CPU cores" in printed
    kept = json.loads((out / "results.json").read_text())
    assert kept["plain"]["command"] == (
        "python -m experiments.train --config=configs/digits.py:plain"
    )
    assert str(tmp_path) not in (out / "results.json").read_text()
    assert kept["plain"]["values"] == [[50.0, 5.0], [3.0, 5.0]]
    assert kept["weight_norm"]["seconds"] == [0.4, 0.8]
    assert {"commit", "device", "versions", "config"} <= set(kept["plain"])
    assert not (out / "learning_rates.png").exists()


@pytest.mark.parametrize("name", ["curves.png", "norms.png"])
def test_pictures(name, runs, tmp_path):
    report.main([*map(str, runs), f"--out={tmp_path}"])
    with Image.open(tmp_path / name) as picture:
        assert picture.size[0] > 800
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_learning_rates_are_drawn_where_there_are_several(tmp_path):
    found = [
        write(tmp_path / f"{rate}", "plain", [[0.1, 0.2]], optimizer=Optimizer(learning_rate=rate))
        for rate in (0.1, 0.3)
    ]
    assert report.main([*map(str, found), f"--out={tmp_path / 'report'}"]) == 0
    assert (tmp_path / "report/learning_rates.png").stat().st_size > 5000


def test_other_fields_make_another_line(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(report, "_save", lambda figure, out: lines.extend(figure.axes[0].lines))
    rates = [(0.1, 40), (0.3, 40), (0.3, 80)]
    found = []
    for rate, steps in rates:
        optimizer = Optimizer(learning_rate=rate)
        workdir = write(
            tmp_path / f"{rate}-{steps}", "plain", [[0.1, 0.3]], optimizer=optimizer, steps=steps
        )
        found.append(report.read(workdir, workdir.name))
    assert report.draw_learning_rates(found, tmp_path / "picture.png")
    points = [line.get_xydata().tolist() for line in lines if line.get_label() == "_nolegend_"]
    assert [[0.1, 20.0], [0.3, 20.0]] in points
    assert [[0.3, 20.0]] in points
    assert not report.draw_learning_rates(found[1:], tmp_path / "picture.png")


def test_runs_that_did_not_get_far(runs, tmp_path, capsys):
    """One stopped after its first evaluation, one before it."""
    begun = write(tmp_path / "begun", "batch_norm", [[0.5, 0.5]])
    empty = write(tmp_path / "empty", "mean_only", [])
    assert report.main([*map(str, [*runs, begun, empty]), f"--out={tmp_path / 'report'}"]) == 0
    out, err = capsys.readouterr()
    assert "| begun (step 20 of 40) |" in out
    assert "| plain " in out
    assert "left out: " in err
    assert "empty has no metrics yet" in err
    assert report.main([str(empty), f"--out={tmp_path / 'report'}"]) == 2
    assert "none of the runs has metrics yet" in capsys.readouterr().err


def test_the_best_plain_run_is_what_others_are_compared_with(runs, tmp_path):
    worse = write(tmp_path / "worse", "plain", [[0.6, 0.6], [0.5, 0.5]], seed=1)
    for order in ([worse, *runs], [*runs, worse]):
        lines = report.table(report.read_all(order)).splitlines()[2:]
        reached = {cells(line)[0]: cells(line)[6] for line in lines}
        assert reached == {"plain": "2", "weight_norm": "1", "worse": "never"}


def test_a_directory_without_a_run(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    text = f"error: {tmp_path} holds no run (it has no run.json); choose another directory\n"
    assert capsys.readouterr().err == text


def test_a_damaged_run_is_told(runs, tmp_path, capsys):
    about = (runs[0] / "run.json").read_bytes()
    metrics = (runs[0] / "metrics.jsonl").read_text()
    for name, content, text in (
        ("run.json", "[]", "run.json must hold an object, not []; put a copy of it back"),
        ("run.json", about.replace(b'"error"', b'"eror"').decode(), "do not fit: KeyError('eror')"),
        ("run.json", about.replace(b'"devices"', b'"dev"').decode(), "run.json has no devices"),
        ("metrics.jsonl", metrics.replace("test_error", "test"), "KeyError('test_error')"),
        ("metrics.jsonl", metrics.replace("norms", "norm"), "KeyError('norms') lacks or is wrong"),
        ("metrics.jsonl", "{" + metrics, "metrics.jsonl cannot be read: line 1 is damaged"),
    ):
        whole = (runs[0] / name).read_bytes()
        (runs[0] / name).write_text(content)
        assert report.main([*map(str, runs), f"--out={tmp_path / 'report'}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {runs[0]}")
        assert text in error
        (runs[0] / name).write_bytes(whole)
    assert not (tmp_path / "report").exists()


def test_where_a_report_cannot_go(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out, text in (
        (tmp_path / "file", "file cannot be written: "),
        (tmp_path / ("x" * 300), "File name too long"),
        ("", "--out= is empty: name a directory"),
    ):
        assert report.main([str(runs[0]), f"--out={out}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert text in error
    assert report.main([str(tmp_path / ("x" * 300))]) == 2
    assert "run.json cannot be read: [Errno 36] File name too long" in capsys.readouterr().err


def test_runs_with_different_metrics(runs, tmp_path, capsys):
    workdir = tmp_path / "text"
    records.create(Run(Config(task=CharLm()), workdir, "plain", ()))
    line = {"step": 1, "epoch": 1.0, "seconds": 1.0, "seconds_per_step": 1.0, "norms": {}}
    records.append(workdir, {**line, "test_bits_per_byte": [2.0]})
    assert report.main([str(runs[0]), str(workdir)]) == 2
    assert "runs have different metrics: bits_per_byte, error" in capsys.readouterr().err


def test_names_are_as_short_as_they_can_be():
    a, b, other = (report.Path(path) for path in ("a/plain", "b/plain/", "b/other"))
    assert report.short_names([a, other]) == ["plain", "other"]
    assert report.short_names([a, b]) == ["a/plain", "b/plain"]
    rates = [report.Path(f"{name}-learning_rate=0.1") for name in ("plain", "weight_norm")]
    assert report.short_names(rates) == ["plain", "weight_norm"]
    rates = [report.Path(f"plain-learning_rate={rate}") for rate in (0.1, 0.3)]
    assert report.short_names(rates) == ["learning_rate=0.1", "learning_rate=0.3"]
    assert report.short_names([other]) == ["other"]
