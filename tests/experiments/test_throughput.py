"""The throughput of two loops, measured on a small network."""

import json

import pytest

from experiments import throughput

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_both_loops_are_timed(capsys, monkeypatch):
    monkeypatch.setattr(throughput, "SECONDS", 0.05)
    monkeypatch.setattr(throughput, "ROUNDS", 2)
    assert throughput.main(["--config=configs/digits.py:smoke"]) == 0
    *lines, numbers = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["plain loop", "trainer"]
    assert "times as fast" in lines[2]
    seconds = json.loads(numbers)["seconds"]
    assert {name: len(times) for name, times in seconds.items()} == {"plain loop": 2, "trainer": 2}
    assert min(map(min, seconds.values())) > 0


def test_mistakes_and_help(capsys):
    assert throughput.main(["--config=configs/none.py"]) == 2
    assert "No such file" in capsys.readouterr().err
    assert throughput.main(["--help"]) == 0
    assert "plain loop" in capsys.readouterr().out
