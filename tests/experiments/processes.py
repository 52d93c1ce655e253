"""Training in a process of its own, which a signal may end.

With END_AT=SIGNAL:STEP in its environment, the process sends itself the signal after that step,
as soon as the checkpoint before it is whole, if there is one.
"""

import os
import signal
import subprocess
import sys

from experiments import train


def run(*arguments, cache, end_at=None, timeout=300):
    """The finished process; `cache` is a directory for compiled programs."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "END_AT": end_at or "",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.experiments.processes", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def end_at(name, step):
    """Sends the signal from within the loop, right after a step was given to the device."""
    steps, enter = train.Programs.steps, train.Checkpoints.__enter__
    taken, saving = [0], []

    def counted(self, states):
        result = steps(self, states)
        taken[0] = taken[0] or int(result[1][0]) - self.config.steps_per_call
        taken[0] += self.config.steps_per_call
        if taken[0] == step:
            for checkpoints in saving:
                checkpoints._checkpointer.wait()
            os.kill(os.getpid(), getattr(signal, name))
        return result

    train.Programs.steps = counted
    train.Checkpoints.__enter__ = lambda self: saving.append(self) or enter(self)


if __name__ == "__main__":
    if os.environ["END_AT"]:
        signal_name, at = os.environ["END_AT"].split(":")
        end_at(signal_name, int(at))
    sys.exit(train.main(sys.argv[1:]))
