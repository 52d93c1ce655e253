"""Training in processes of its own, which a signal may end.

With END_AT=SIGNAL:STEP in its environment, a process sends itself the signal after that step,
as soon as the checkpoint before it is whole, if there is one.
"""

import os
import signal
import subprocess
import sys

from experiments import train
from experiments.places import read_place


def run(*arguments, cache, end_at=None, timeout=300):
    """The finished process; `cache` is a directory for compiled programs."""
    process = start("tests.experiments.processes", arguments, cache, END_AT=end_at or "")
    return finished(process, timeout)


def run_two(module, *commands, cache, end_at=None, timeout=120):
    """Two finished processes of four devices each, of which the second may be ended.

    There is a command line for both, or one for each.
    """
    place, port = read_place("local:2x4"), 20_000 + os.getpid() % 10_000
    ends = ("", end_at or "")
    processes = [
        start(module, commands[i % len(commands)], cache, END_AT=ends[i], **place.local(i, port))
        for i in range(2)
    ]
    return [finished(process, timeout) for process in processes]


def start(module, arguments, cache, **environment):
    """A process that runs."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **environment,
    }
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def finished(process, timeout):
    """The same process at its end, with what it has printed."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def end_at(name, step):
    """Sends the signal from within the loop, right after a step was given to the device."""
    steps, enter = train.Programs.steps, train.Checkpoints.__enter__
    taken, saving = [0], []

    def counted(self, states):
        result = steps(self, states)
        taken[0] = taken[0] or int(train.cluster.fetch(result[1])[0]) - self.config.call_steps
        taken[0] += self.config.call_steps
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
