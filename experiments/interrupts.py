"""Signals that ask a run to stop: it goes on until its state is saved, in all its processes."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """A context in which the first SIGTERM or Ctrl-C is noted; the second one acts as ever.

    Attributes:
      requested: whether to stop.
    """

    def __init__(self) -> None:
        """Nothing has been asked yet."""
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        """Takes the signals over."""
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        """Gives the signals back."""
        self._restore()

    def stops_at(self, step: int) -> bool:
        """Whether to stop after so many steps."""
        del step
        return self.requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Preemptions:
    """A context for several processes: a SIGTERM to one of them stops all, at the same step.

    JAX has taken that signal over when the processes joined. Ctrl-C counts as one.
    """

    def __init__(self) -> None:
        """No step has been taken yet."""
        self._asked = 0

    def __enter__(self) -> Preemptions:
        """Takes Ctrl-C over."""
        self._before = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        return self

    def __exit__(self, *error: object) -> None:
        """Gives Ctrl-C back."""
        signal.signal(signal.SIGINT, self._before)

    def stops_at(self, step: int) -> bool:
        """Whether to stop after so many steps; all processes must ask at the same ones."""
        # JAX sets the stop at one more than the number that any process has asked for last, of
        # which none may be left out: the steps before a restart are asked for too. Orbax asks the
        # same, for the step that it saves.
        asked = range(self._asked + 1, step + 1)
        self._asked = step
        return any([multihost_utils.reached_preemption_sync_point(i) for i in asked])
