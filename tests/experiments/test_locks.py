"""One process for one run directory."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from experiments import records
from experiments.locks import NAME, LockError, hold
from tests.experiments.test_records import run

HOLDER = """
import sys, time
from pathlib import Path
from experiments.locks import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_one_is_refused_and_told_of_the_first(tmp_path):
    holder = rf"process {os.getpid()} on {socket.gethostname()} since \d\d\d\d-\d\d-\d\d \d\d:"
    with hold(tmp_path):
        for _ in range(2):
            with pytest.raises(LockError, match=f"is in use by {holder}"), hold(tmp_path):
                pytest.fail("it is held twice")
    with hold(tmp_path):  # which was freed
        pass


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LockError, match=f"process {other.pid} on "), hold(tmp_path):
            pytest.fail("it is held twice")
        other.send_signal(signal.SIGKILL)
        other.wait()
        with hold(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / NAME).read_text()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path):
        assert "run.lock cannot be locked" in caplog.text
        assert "no other process trains in" in caplog.text


def test_a_directory_of_something_else_gets_no_lock(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(records.RecordError, match="holds no run"), records.opened(run(tmp_path)):
        pytest.fail("it was opened")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
