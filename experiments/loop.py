"""The training loop: steps, evaluations and checkpoints."""

from __future__ import annotations

import time
from pathlib import Path

import jax
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from experiments import records
from experiments.boards import Board
from experiments.checkpoints import Checkpoints
from experiments.cluster import fetch, is_first
from experiments.interrupts import Interrupts, Preemptions
from experiments.logs import log
from experiments.programs import Metrics, Norms, Programs
from experiments.trainer import State


class NotFiniteError(Exception):
    """A loss or an update is infinite or NaN; the message says at which step, and the norms."""


class Loop:
    """Steps, evaluations and checkpoints, one after the other, until the end or an interrupt.

    Attributes:
      step: the steps taken.
      length: the steps of the whole run.
    """

    def __init__(
        self,
        programs: Programs,
        checkpoints: Checkpoints,
        board: Board,
        interrupts: Interrupts | Preemptions,
        workdir: Path,
    ):
        """Takes what a run uses."""
        self.config, self.programs = programs.config, programs
        self.checkpoints, self.board, self.interrupts = checkpoints, board, interrupts
        self.workdir, self.step, self.length = workdir, 0, programs.config.steps
        self._norms: Norms = {}  # at the last evaluation
        self._profiling = False

    def run(self, states: State, seconds: float) -> State:
        """The last states, from states that so many seconds were spent on."""
        config, queued = self.config, None
        self.step, self.length = (int(fetch(x)[0]) for x in (states.step, states.length))
        self._evaluated = time.perf_counter(), self.step  # when and at which step
        self._start = self._evaluated[0] - seconds
        is_hidden = None if is_first() else True  # None: where there is no terminal
        self._bar = tqdm(total=self.length, initial=self.step, unit="step", disable=is_hidden)
        while self.step < self.length and not self.interrupts.stops_at(self.step):
            self._profile()
            with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
                states, ends = self.programs.steps(states)
            jax.block_until_ready(queued)  # so that one call waits while another one runs
            queued, self.step = ends, self.step + config.call_steps
            self._bar.update(config.call_steps)
            if self.step % config.steps_per_eval == 0:
                self._evaluate(states)
            if self.step % (config.steps_per_eval * config.evals_per_save) == 0:
                self.checkpoints.save(self.step, states)
        self._bar.close()
        self._profile(is_over=True)
        self._check(states)
        self.checkpoints.save(self.step, states)
        return states

    def _evaluate(self, states: State) -> None:
        jax.block_until_ready(states.step)
        now, (then, step) = time.perf_counter(), self._evaluated
        self._check(states)
        metrics, norms = self.programs.metrics(states), self.programs.norms(states)
        line = {
            "step": self.step,
            "epoch": self.step * self.config.batch_size / self.programs.count,
            "seconds": time.perf_counter() - self._start,
            "seconds_per_step": (now - then) / (self.step - step),
            **{name: x.tolist() for name, x in metrics.items()},
            "norms": {path: {k: x.tolist() for k, x in one.items()} for path, one in norms.items()},
        }
        if is_first():
            records.append(self.workdir, line)
        self.board.write(self.step, metrics, norms)
        self._norms, self._evaluated = norms, (time.perf_counter(), self.step)
        if self._bar.disable:
            log.info("step %d of %d: %s", self.step, self.length, describe(metrics))
        else:
            self._bar.set_postfix_str(describe(metrics))

    def _check(self, states: State) -> None:
        """Stops a run that is not finite any more, before its state is evaluated or saved."""
        failed = self.programs.first_failures(states)
        if (failed < 0).all():
            return
        first = np.where(failed < 0, failed.max() + 1, failed).argmin()
        saved = self.checkpoints.latest()
        kept = (
            "there is no checkpoint" if saved is None else f"the checkpoint of step {saved} stays"
        )
        table = norms_table(self._norms, self.programs.norms(states))
        raise NotFiniteError(
            f"the loss or the update of seed {self.config.seed + first} is not finite at step "
            f"{failed[first]}; {kept}. Norms at the last "
            f"evaluation (step {self._evaluated[1]}) and now:\n{table}\n"
            "Lower --config.optimizer.learning_rate, or set --config.optimizer.clip"
        )

    def _profile(self, *, is_over: bool = False) -> None:
        """Begins and ends the profile, before a step and after the last one."""
        first, last = self.config.profile
        begins, ends = self.step, self.step + self.config.call_steps
        is_within = not is_over and begins < last and first < ends
        if is_within and not self._profiling:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self._profiling = True
        elif self._profiling and not is_within:
            jax.profiler.stop_trace()
            self._profiling = False


def norms_table(before: Norms, now: Norms) -> str:
    """The mean norm and the effective step size of every weight, at two times."""

    def cells(norms: Norms, path: str) -> list[str]:
        return [f"{np.mean(norms[path][k]):.3g}" if path in norms else "-" for k in ("v", "step")]

    rows = [(path, *cells(before, path), *cells(now, path)) for path in now]
    headers = ("weight", "norm", "step size", "norm now", "step size now")
    return str(tabulate(rows, headers, disable_numparse=True))


def describe(metrics: Metrics) -> str:
    """The metrics as text: means, and standard deviations where there are several seeds."""
    return ", ".join(f"{name} {records.mean_and_std(x, 4)}" for name, x in metrics.items())
