"""One process trains in one directory: a lock that the operating system frees when it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.logs import log

NAME = "run.lock"


class LockError(Exception):
    """Another process trains in the directory; the message says which one and what to do."""


@contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keeps other processes out of a directory until the context, or this process, ends.

    The lock is one of the file `run.lock`, which says who holds it. The file stays when the lock
    is freed: a process that has opened the file may be about to lock it.

    Raises:
      LockError: if another process holds the lock.
      OSError: if the file cannot be written.
    """
    file = workdir / NAME
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise LockError(
                f"{workdir} is in use by {holder}: wait for it, end it, or choose another "
                f"--workdir. If its machine is lost and nothing trains there, delete {file}"
            ) from None
        except OSError as error:  # of a file system without locks
            log.warning(
                "%s cannot be locked (%s): see to it that no other process trains in %s",
                *(file, error, workdir),
            )
        lock.seek(0)
        lock.truncate()
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        lock.flush()
        yield
