"""The work list for an accelerator: rehearsed as a whole, and whatever may happen to an item."""

import json
import os
import time

import pytest

from experiments import accelerator, report
from experiments.accelerator import ITEMS, Item
from experiments.command_line import parse
from experiments.items import training

# One item of each kind of work: the others differ from these in their arguments alone.
REHEARSED = ("numerics", "cost_mlp", "cost_bandwidth", "resume", "draw")
REHEARSED += ("cifar10_50_plain", "cifar10_200_weight_norm_mean_only")
FAILING = "tests.experiments.failing_items"


def main(tmp_path, *arguments, items=ITEMS):
    paths = [f"--out={tmp_path / 'out'}", f"--results={tmp_path / 'results'}"]
    return accelerator.main([*paths, f"--data_dir={tmp_path}", *arguments], items)


def about():
    return {"platform": "gpu", "kind": "NVIDIA H100 80GB HBM3", "versions": {"jax": "0.11.2"}}


@pytest.fixture
def device(monkeypatch):
    """A device that is asked for nothing."""
    monkeypatch.setattr(accelerator, "probe", about)


def test_the_rehearsal(tmp_path, data_dir, monkeypatch, capsys):
    """Every kind of item at its smallest size; reports read the files."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    chosen = f"--items={','.join(REHEARSED)}"
    # More minutes than it takes: on a busy machine nothing is left out.
    status = main(tmp_path, "--rehearsal", chosen, f"--data_dir={data_dir}", "--minutes=60")
    log = (tmp_path / "out/log.txt").read_text()
    assert status == 0, log
    table = capsys.readouterr().out
    assert table.count("measured") == len(REHEARSED), log
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert {"log.txt", "table.txt"} < set(files)
    for group in sorted({item.group for item in ITEMS}):
        file = tmp_path / "out" / f"{group}.json"
        assert report.main([str(file), f"--out={tmp_path / 'report'}"]) == 0
        text = capsys.readouterr().out
        items = [record["item"] for record in json.loads(file.read_text())]
        assert all(item in text for item in items), text
    numerics = json.loads((tmp_path / "out/numerics.json").read_text())[0]["result"]
    assert numerics["passed"]
    assert not numerics["failed"]
    resume = json.loads((tmp_path / "out/resume.json").read_text())[0]["result"]
    assert resume["runs"]["default"]["is_same"]


def test_the_groups_fit_into_the_files_that_may_come_back():
    groups = {item.group for item in ITEMS}
    assert len(groups) + len(("log.txt", "table.txt")) <= 8
    assert len({item.name for item in ITEMS}) == len(ITEMS)


@pytest.mark.parametrize("item", training.RUNS)
def test_every_training_item_parses_and_is_of_its_size(item):
    for arguments in training.RUNS[item].values():
        config = parse(arguments).config
        epochs = config.steps * config.batch_size / {100: 50_000, 128: 59_904}[config.batch_size]
        assert epochs == {"cifar10_50": 50, "cifar10_200": 200}.get(
            item[: item.rfind("0") + 1], 100
        )
        assert config.optimizer.decay_from in (config.steps // 2, -1)
        assert config.call_steps == config.steps_per_eval  # whole epochs


def test_items_that_crash_hang_or_leave_nothing_cost_only_themselves(tmp_path, device, capsys):
    names = ("crashes", "hangs", "dies", "works")
    items = [Item(name, "failing", FAILING, 8 if name == "hangs" else 60) for name in names]
    assert main(tmp_path, "--minutes=30", items=items) == 1
    table = capsys.readouterr().out
    assert "failed with status 1: see log.txt" in table
    assert "ended after 12 s, its limit" in table
    assert "failed with status 0: see log.txt" in table
    assert "on purpose" in (tmp_path / "out/log.txt").read_text()
    (record,) = json.loads((tmp_path / "out/failing.json").read_text())
    assert (record["item"], record["device"]) == ("works", about())
    assert is_gone(int((tmp_path / "child").read_text()))


def is_gone(pid):
    """Whether a process has ended; one that nobody waited for may be left as a zombie."""
    for _ in range(50):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    os.kill(pid, 9)
    return False


def test_without_time_an_item_is_left_out_and_shorter_ones_are_done(tmp_path, device, capsys):
    items = [Item("works", "failing", FAILING, 3600), Item("short", "failing", FAILING, 30)]
    assert main(tmp_path, "--minutes=2", items=items) == 0
    assert "no time: it needs 3600 s" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "out/failing.json").read_text())
    assert record["item"] == "short"
    assert record["result"]["seconds"] == 30 * accelerator.PATIENCE - accelerator.MARGIN


def test_results_are_collected_once_for_each_device(tmp_path, device, capsys):
    items = [Item("works", "failing", FAILING, 60)]
    assert main(tmp_path, "--minutes=5", items=items) == 0
    assert main(tmp_path, f"--collect={tmp_path / 'out'}") == 0
    (file,) = (tmp_path / "results/nvidia-h100-80gb-hbm3").iterdir()
    assert file.name == "works.json"
    assert str(file) in capsys.readouterr().out
    assert main(tmp_path, "--minutes=5", items=items) == 0
    assert "done before" in capsys.readouterr().out


def test_rehearsals_and_empty_folders_are_not_collected(tmp_path, device, capsys):
    items = [Item("works", "failing", FAILING, 60)]
    assert main(tmp_path, "--minutes=5", "--rehearsal", items=items) == 0
    assert main(tmp_path, f"--collect={tmp_path / 'out'}") == 2
    assert "holds results of a rehearsal: works" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(tmp_path, f"--collect={tmp_path / 'empty'}") == 2
    assert "holds no results of experiments.accelerator" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


RECORD = {"item": "works", "rehearsal": False, "device": {"kind": "H100"}, "result": {}}


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00\x80",
        b"",
        b"3",
        b"[3]",
        b'{"item": "works"}',
        *(json.dumps([{k: x for k, x in RECORD.items() if k != name}]).encode() for name in RECORD),
    ],
)
def test_a_damaged_file_is_told_before_anything_is_measured_or_taken(
    content, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(accelerator, "probe", lambda: pytest.fail("it began"))
    file = tmp_path / "out/failing.json"
    file.parent.mkdir()
    (tmp_path / "out/a.json").write_text(json.dumps([RECORD]))
    file.write_bytes(content)
    for argument in ("--minutes=5", f"--collect={tmp_path / 'out'}"):
        assert main(tmp_path, argument, items=[Item("works", "failing", FAILING, 60)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {file} holds no results of experiments.accelerator: ")
    assert file.read_bytes() == content
    assert not (tmp_path / "results").exists()


def test_directories_that_cannot_be(tmp_path, device, capsys):
    (tmp_path / "file").write_text("")
    for argument, text in (
        (f"--out={tmp_path / 'file'}", "file cannot be written: File exists"),
        (f"--out={tmp_path / ('x' * 300)}", "cannot be written: File name too long"),
        ("--out=", "--out= is empty: name a directory"),
        ("--data_dir=~nobody-9", "--data_dir=~nobody-9: there is no such home directory"),
        ("--collect=", "--collect= is empty"),
        (f"--collect={tmp_path / 'none'}", "none holds no results of experiments.accelerator"),
    ):
        assert main(tmp_path, argument, items=[]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert text in error


def test_without_a_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "PROBE", "raise SystemExit('none here')")
    assert main(tmp_path, items=[]) == 2
    assert capsys.readouterr().err == "error: JAX finds no device:\nnone here\n\n"


def test_a_misspelled_item_is_told(tmp_path, device, capsys):
    with pytest.raises(SystemExit):
        main(tmp_path, "--items=numeric")
    assert "unknown items numeric; there are: numerics, cost_mlp" in capsys.readouterr().err


def test_a_file_of_something_else_is_not_reported(tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"a": 1}')
    assert report.main([str(tmp_path / "other.json")]) == 2
    assert "holds no results of experiments.accelerator" in capsys.readouterr().err
