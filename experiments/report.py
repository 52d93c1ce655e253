"""Compares runs in a table and a picture: python -m experiments.report RUN... [--out=FILE.png]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from tabulate import tabulate

from experiments import records

GOAL = 0.05  # test error
FOOTNOTE = """\
test error: mean ± standard deviation over the seeds. ms a step: all seeds together, the test
error included; median and quartiles over the chunks. The runs were timed one after the other:
on a busy machine, differences of a fifth are noise."""


class History(NamedTuple):
    """What a run recorded: a row for every chunk of steps, a column for every seed."""

    name: str
    norm: str
    step: np.ndarray
    loss: np.ndarray
    test_error: np.ndarray
    seconds_per_step: np.ndarray


def read(workdir: Path, name: str) -> History:
    """The history of one run directory, to be shown as `name`.

    Raises:
      RecordError: if it holds no run, or no metrics yet.
    """
    config, lines = records.read_about(workdir)["config"], records.read_metrics(workdir)

    def column(name: str) -> np.ndarray:
        return np.array([line[name] for line in lines])

    return History(
        name=name,
        norm=config["norm"],
        step=column("step"),
        loss=column("loss"),
        test_error=column("test_error"),
        seconds_per_step=column("seconds_per_step"),
    )


def short_names(runs: Sequence[Path]) -> list[str]:
    """The names of directories, or where two are the same, their paths."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else list(map(str, runs))


def table(histories: Sequence[History]) -> str:
    """One line a run: final test error, steps to the goal, time a step against the plain run's."""
    plain = next((np.median(h.seconds_per_step) for h in histories if h.norm == "plain"), None)
    rows = []
    for history in histories:
        low, seconds, high = np.quantile(history.seconds_per_step, (0.25, 0.5, 0.75))
        rows.append(
            (
                history.name,
                history.step[-1],
                records.mean_and_std(100 * history.test_error[-1], 2),
                steps_to_goal(history),
                f"{1000 * seconds:.1f} ({1000 * low:.1f} to {1000 * high:.1f})",
                f"{seconds / plain:.2f}" if plain else "-",
            )
        )
    headers = ("run", "steps", "test error %", f"steps to {GOAL:.0%}", "ms a step", "of plain")
    align = ("left", *["right"] * (len(headers) - 1))
    return str(tabulate(rows, headers, colalign=align, disable_numparse=True))


def steps_to_goal(history: History) -> str:
    """At which step the test error first was at the goal, as far as it was taken: over seeds."""
    reached = history.test_error <= GOAL
    first = history.step[reached.argmax(axis=0)][reached.any(axis=0)]
    if len(first) == reached.shape[1]:
        return f"{first.mean():.0f}"
    return f"reached by {len(first)} of {reached.shape[1]}"


def draw(histories: Sequence[History], out: Path) -> None:
    """Training loss and test error over the steps: the mean over seeds, and their range."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    views = (("loss", "training loss (nats)", 1), ("test_error", "test error (%)", 100))
    for panel, (name, label, factor) in zip(panels, views, strict=True):
        for history in histories:
            values = factor * getattr(history, name)
            panel.plot(history.step, values.mean(axis=1), label=history.name)
            panel.fill_between(history.step, values.min(axis=1), values.max(axis=1), alpha=0.2)
        panel.set(xlabel="step", ylabel=label, yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--out", type=Path, default=Path("runs/report.png"), help="the picture")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".png":
        parser.error(f"--out must be a file that ends in .png, got {options.out}")
    plt.switch_backend("agg")
    try:
        histories = list(map(read, options.runs, short_names(options.runs)))
    except records.RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(histories))
    print(FOOTNOTE)
    draw(histories, options.out)
    print(f"curves: {options.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
