"""experiments.train in processes of its own, one or several side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from experiments.interrupts import Interrupts
from experiments.logs import log

SAVING = 600.0  # seconds within which a run has saved its state


def train_apart(
    arguments: Sequence[str],
    interrupts: Interrupts,
    environments: Sequence[Mapping[str, str]] = ({},),
    patience: float = 0.0,
) -> list[int]:
    """Runs a process for each environment; returns their exit statuses.

    What `interrupts` notes goes to all of them, which save their state and end. If one fails, the
    others have `patience` seconds to end by themselves.
    """
    command = [sys.executable, "-m", "experiments.train", *arguments]
    # In a session of its own a process does not get the terminal's Ctrl-C as well.
    processes = [
        subprocess.Popen(command, env={**os.environ, **one}, start_new_session=True)
        for one in environments
    ]
    try:
        return _wait(processes, interrupts, patience)
    finally:
        for process in processes:  # which have no terminal that would end them
            process.kill()
            process.wait()


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], interrupts: Interrupts, patience: float
) -> list[int]:
    is_told, deadline = False, float("inf")
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if interrupts.requested and not is_told:
            is_told, deadline = True, time.monotonic() + SAVING
            for process in processes:
                process.terminate()
        failed = [i for i, process in enumerate(processes) if process.returncode]
        if failed and len(processes) > 1 and deadline > time.monotonic() + patience:
            deadline = time.monotonic() + patience
            status = processes[failed[0]].returncode
            log.error("process %d ended with %s, and all others end", failed[0], _text(status))
        if time.monotonic() > deadline:
            log.error("a process has not ended by itself")
            break
    return [-signal.SIGKILL if p.returncode is None else p.returncode for p in processes]


def _text(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
