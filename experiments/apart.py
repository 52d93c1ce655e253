"""experiments.train in processes of its own, one or several side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from experiments.interrupts import Interrupts
from experiments.logs import log


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
    is_told, deadline = False, float("inf")
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if interrupts.requested and not is_told:
            is_told = True
            for process in processes:
                process.terminate()
        failed = [i for i, process in enumerate(processes) if process.returncode]
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + patience
            if len(processes) > 1:
                status = processes[failed[0]].returncode
                log.error("process %d ended with %s, and all others end", failed[0], _text(status))
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
    return [process.wait() for process in processes]


def _text(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
