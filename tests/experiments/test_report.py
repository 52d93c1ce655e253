"""The table and the picture, from records with known numbers."""

import numpy as np
import pytest
from PIL import Image

from experiments import records, report
from experiments.config import Config, Norm


@pytest.fixture
def runs(tmp_path):
    """A plain run that reaches the goal, and one twice as slow of which one seed does not."""
    errors = {Norm.PLAIN: ([0.5, 0.05], [0.04, 0.03]), Norm.WEIGHT_NORM: ([0.5, 0.02], [0.5, 0.06])}
    for norm, (first, second) in errors.items():
        run = tmp_path / norm.value
        records.create(run, Config(norm=norm, seeds=2))
        for step, per_seed in ((20, [first[0], second[0]]), (40, [first[1], second[1]])):
            line = {"step": step, "loss": [1.0, 0.5], "test_error": per_seed}
            seconds = 0.01 if norm is Norm.PLAIN else 0.02
            records.append(run, {**line, "seconds": step * seconds, "seconds_per_step": seconds})
    return [tmp_path / "plain", tmp_path / "weight_norm"]


def test_table(runs):
    lines = report.table([report.read(run, run.name) for run in runs]).splitlines()
    header, plain, weight_norm = (" ".join(lines[i].split()) for i in (0, 2, 3))
    assert header == "run steps test error % steps to 5% ms a step of plain"
    # Errors of 5 and 3 %: mean 4, std √2. The goal is reached at step 40 and at step 20.
    assert plain == "plain 40 4.00 ± 1.41 30 10.0 (10.0 to 10.0) 1.00"
    assert weight_norm == "weight_norm 40 4.00 ± 2.83 reached by 1 of 2 20.0 (20.0 to 20.0) 2.00"


def test_table_without_a_plain_run(runs):
    line = report.table([report.read(runs[1], "slow")]).splitlines()[-1]
    assert line.split()[-1] == "-"


def test_picture_and_where_it_is(runs, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    assert report.main([*map(str, runs), f"--out={out}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"curves: {out}"
    with Image.open(out) as picture:
        assert picture.size == (1200, 480)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_a_directory_without_a_run(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no run (it has no run.json)\n"


def test_names_are_as_short_as_they_can_be():
    a, b, other = (report.Path(path) for path in ("a/plain", "b/plain/", "b/other"))
    assert report.short_names([a, other]) == ["plain", "other"]
    assert report.short_names([a, b]) == ["a/plain", "b/plain"]


def test_a_picture_of_another_kind_is_refused(runs, capsys):
    with pytest.raises(SystemExit):
        report.main([str(runs[0]), "--out=curves.svg"])
    assert "--out must be a file that ends in .png, got curves.svg" in capsys.readouterr().err
