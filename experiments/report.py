"""Compares runs in a table and in pictures: python -m experiments.report RUN... [--out=DIR].

A RUN is the directory of a run, or a file of results of `experiments.accelerator`, of which
measurements other than training are printed as they are. DIR gets
  table.md             the table that is printed
  results.json         for every run: command, commit, versions, device, config, and its curve
  curves.png           the metric over epochs and over wall time
  norms.png            norms and effective step sizes of the weights
  learning_rates.png   the last metric over the learning rate, where runs have several
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogFormatter
from tabulate import tabulate

from experiments import records
from experiments.command_line import ConfigError, folder
from experiments.items import cost, numerics, resume
from experiments.logs import log, log_to_stderr


class Unit(NamedTuple):
    """How a metric is shown."""

    label: str
    factor: float
    decimals: int


UNITS = {
    "error": Unit("test error (%)", 100, 2),
    "nats": Unit("- lower bound, test (nats)", 1, 2),
    "bits_per_dim": Unit("- lower bound, test (bits/dim)", 1, 3),
    "bits_per_byte": Unit("test cross entropy (bits/byte)", 1, 3),
}
TABLES = {"cost": cost.table, "numerics": numerics.table, "resume": resume.table}
OF_MACHINE = ("--workdir=", "--config.data_dir=")  # not kept
FOOTNOTE = """\
Last and best: mean ± standard deviation over n seeds. Epochs to plain's last: until the mean was
first as good as that of the plain run (the best of several) was at its end. ms a step: all
seeds together; median and quartiles. The runs were timed one after the other: on a busy machine,
differences of a fifth are noise. Chosen: of runs that differ in the learning rate alone, the one
with the best mean on the examples for validation."""


class History(NamedTuple):
    """What a run recorded: a row for every evaluation, a column for every seed."""

    name: str
    about: dict[str, Any]
    step: np.ndarray
    epoch: np.ndarray
    seconds: np.ndarray  # since the start of the training
    seconds_per_step: np.ndarray
    values: np.ndarray  # of the metric, in its unit
    norms: list[dict[str, dict[str, list[float]]]]  # by weight and name, over the seeds
    validation: np.ndarray | None = None  # of the metric on examples that choose learning rates

    @property
    def unit(self) -> Unit:
        """Of the values."""
        return UNITS[self.about["metric"]]

    @property
    def is_plain(self) -> bool:
        """Whether it trained the network that the others are compared with."""
        return self.about["variant"] in ("plain", "plain_short")

    @property
    def title(self) -> str:
        """The name, with a mark if the run did not get to its end."""
        last, steps = self.step[-1], self.about.get("length", self.about["config"]["steps"])
        return self.name if last == steps else f"{self.name} (step {last} of {steps})"


def read(workdir: Path, name: str) -> History:
    """The history of one run directory, to be shown as `name`.

    Raises:
      RecordError: if it holds no run, or no metrics yet, or something in them lacks.
    """
    about, lines = records.read_about(workdir), records.read_metrics(workdir)
    try:
        return history(about, lines, name)
    except (ValueError, TypeError, LookupError) as error:
        raise records.RecordError(
            f"{workdir}: run.json and metrics.jsonl do not fit: {error!r} lacks or is wrong. Put a "
            "copy of them back, or leave that directory out"
        ) from error


def read_accelerator(file: Path) -> tuple[list[History], list[str]]:
    """What a file of `experiments.accelerator` holds: histories, and tables of all else.

    Raises:
      RecordError: if it cannot be read.
    """
    try:
        found = json.loads(file.read_text())
        histories, texts = [], []
        for one in found:
            module, result = one["module"].rpartition(".")[2], one["result"]
            if module == "training":
                for name, run in result["runs"].items():
                    records.check_about(run["about"], f"{file}, {one['item']}/{name}")
                    histories.append(history(run["about"], run["metrics"], f"{one['item']}/{name}"))
            else:
                texts.append(f"{one['item']} ({one['device']['kind']})\n{TABLES[module](result)}")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise records.RecordError(
            f"{file} holds no results of experiments.accelerator: {error!r}"
        ) from error
    return histories, texts


def history(about: dict[str, Any], lines: list[dict[str, Any]], name: str) -> History:
    """The history of a run from its record and the lines of its metrics."""

    def column(key: str) -> np.ndarray:
        return np.array([line[key] for line in lines])

    metric = about["metric"]
    held_out = f"validation_{metric}" in lines[0]
    validation = UNITS[metric].factor * column(f"validation_{metric}") if held_out else None
    return History(
        name=name,
        about=about,
        step=column("step"),
        epoch=column("epoch"),
        seconds=column("seconds"),
        seconds_per_step=column("seconds_per_step"),
        values=UNITS[about["metric"]].factor * column(f"test_{about['metric']}"),
        norms=[line["norms"] for line in lines],
        validation=validation,
    )


def read_all(workdirs: Sequence[Path]) -> list[History]:
    """All histories, with names as short as they can be; runs without an evaluation are left out.

    Raises:
      RecordError: for a directory without a run, or if there is no evaluation at all.
    """
    histories = []
    for workdir, name in zip(workdirs, short_names(workdirs), strict=True):
        try:
            histories.append(read(workdir, name))
        except records.NoMetricsError as error:
            log.warning("left out: %s", error)
    if not histories:
        raise records.RecordError("none of the runs has metrics yet")
    return histories


def check_comparable(histories: Sequence[History]) -> None:
    """Refuses runs that cannot stand in one table.

    Raises:
      RecordError: if they have different metrics.
    """
    if len(metrics := {history.about["metric"] for history in histories}) > 1:
        raise records.RecordError(f"runs have different metrics: {', '.join(sorted(metrics))}")


def short_names(runs: Sequence[Path]) -> list[str]:
    """The names of directories without the parts that all share, or their paths, if not unique."""
    names = [run.resolve().name for run in runs]
    shared = set.intersection(*(set(name.split("-")) for name in names))
    short = ["-".join(part for part in name.split("-") if part not in shared) for name in names]
    for candidates in (short, names):
        if all(candidates) and len(set(candidates)) == len(candidates):
            return candidates
    return list(map(str, runs))


def table(histories: Sequence[History]) -> str:
    """One line a run, as Markdown."""
    all_plain = [history for history in histories if history.is_plain]
    plain = min(all_plain, key=lambda history: history.values[-1].mean(), default=None)
    unit, chosen = histories[0].unit, chosen_by_validation(histories)
    has_validation = any(history.validation is not None for history in histories)
    rows = []
    for history in histories:
        low, seconds, high = np.quantile(history.seconds_per_step, (0.25, 0.5, 0.75))
        published = history.about["config"]["published"]
        rows.append(
            (
                history.title + ", chosen" * any(history is one for one in chosen),
                history.values.shape[1],
                f"{history.epoch[-1]:.4g}",
                records.mean_and_std(history.values[-1], unit.decimals),
                records.mean_and_std(history.values.min(axis=0), unit.decimals),
                f"{unit.factor * published:.{unit.decimals}f}" if published >= 0 else "-",
                epochs_to(history, plain),
                f"{1000 * seconds:.1f} ({1000 * low:.1f} to {1000 * high:.1f})",
                *([_last_validation(history)] if has_validation else []),
            )
        )
    headers = (
        *("run", "n", "epochs", f"last {unit.label}", "best", "published"),
        *("epochs to plain's last", "ms a step", *["last, validation"] * has_validation),
    )
    align = ("left", *["right"] * (len(headers) - 1))
    return str(tabulate(rows, headers, "github", colalign=align, disable_numparse=True))


def _last_validation(history: History) -> str:
    if history.validation is None:
        return "-"
    return records.mean_and_std(history.validation[-1], history.unit.decimals)


def chosen_by_validation(histories: Sequence[History]) -> list[History]:
    """Of runs that differ in the learning rate alone, the best on the examples for validation."""
    chosen = []
    for runs in by_learning_rate(histories):
        last = {run.name: x[-1].mean() for run in runs if (x := run.validation) is not None}
        if len(last) == len(runs) > 1:
            chosen.append(min(runs, key=lambda run: last[run.name]))
    return chosen


def by_learning_rate(histories: Sequence[History]) -> list[list[History]]:
    """Runs that differ in nothing but the learning rate, together."""
    groups: dict[str, list[History]] = {}
    for history in histories:
        config = history.about["config"]
        but_rate = {**config, "optimizer": {**config["optimizer"], "learning_rate": None}}
        groups.setdefault(json.dumps(but_rate, sort_keys=True), []).append(history)
    return list(groups.values())


def epochs_to(history: History, plain: History | None) -> str:
    """When the mean over the seeds first was at the plain run's last one."""
    if plain is None:
        return "-"
    reached = history.values.mean(axis=1) <= plain.values[-1].mean()
    return f"{history.epoch[reached.argmax()]:.3g}" if reached.any() else "never"


def conditions(histories: Sequence[History]) -> str:
    """Hardware, versions and data, each once."""
    lines = []
    for history in histories:
        device, versions = history.about["device"], history.about["versions"]
        names = ", ".join(f"{k} {versions[k]}" for k in ("python", "jax", "flax", "optax"))
        hardware = f"{device['platform']} ({device['kind']}; {device['machine']})"
        lines.append(f"{hardware}; {devices(history)}; {names}")
        lines.extend(f"{name}: {text}" for name, text in history.about["data"].items())
    return "\n".join(dict.fromkeys(lines))


def devices(history: History) -> str:
    """On how many devices the steps were taken."""
    parts = []
    for some in history.about["devices"]:
        from_step = f"from step {some['step']} on: " if some["step"] else ""
        number, processes = math.prod(some["mesh"].values()), some["processes"]
        text = f"{from_step}{number} device{'s' * (number > 1)}"
        parts.append(text if processes == 1 else f"{text} of {processes} processes")
    return ", ".join(parts)


def results(histories: Sequence[History]) -> dict[str, Any]:
    """What is kept of the runs: nothing that is of one machine's disk."""

    def curve(history: History) -> dict[str, Any]:
        return {
            "epoch": [float(f"{x:.6g}") for x in history.epoch],
            "seconds": [round(float(x), 2) for x in history.seconds],
            "values": [[float(f"{x:.6g}") for x in row] for row in history.values],
        }

    def about(history: History) -> dict[str, Any]:
        names = ("commit", "device", "devices", "versions", "data", "config")
        kept = {name: history.about[name] for name in names}
        kept["config"] = {k: x for k, x in kept["config"].items() if k != "data_dir"}
        arguments = [x for x in history.about["arguments"] if not x.startswith(OF_MACHINE)]
        return {"command": " ".join(["python -m experiments.train", *arguments]), **kept}

    return {
        history.name: {**about(history), "metric": history.unit.label, **curve(history)}
        for history in histories
    }


def draw_curves(histories: Sequence[History], out: Path) -> None:
    """The metric over epochs and over wall time: the mean over seeds, and their range."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", sharey=True)
    for panel, label in zip(panels, ("epochs", "seconds of training"), strict=True):
        for history in histories:
            x = history.epoch if label == "epochs" else history.seconds
            panel.plot(x, history.values.mean(axis=1), label=history.title)
            panel.fill_between(x, history.values.min(axis=1), history.values.max(axis=1), alpha=0.2)
        panel.set(xlabel=label, yscale="log")
        panel.yaxis.set_major_formatter(LogFormatter())  # 140, not 1.4·10²
        panel.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel(histories[0].unit.label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    _save(figure, out)


def draw_norms(histories: Sequence[History], out: Path) -> None:
    """For every run, the norms of its weights and how far a step turns them; a line a weight."""
    size = (1 + 3 * len(histories), 6)
    figure, panels = plt.subplots(
        2, len(histories), figsize=size, layout="constrained", sharey="row", squeeze=False
    )
    for (top, bottom), history in zip(panels.T, histories, strict=True):
        paths = list(history.norms[0])
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(paths)))
        for panel, name in ((top, "v"), (bottom, "step")):
            for path, color in zip(paths, colors, strict=True):
                means = [np.mean(norms[path][name]) for norms in history.norms]
                panel.plot(history.epoch, means, color=color, label=path)
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
        top.set_title(history.name, fontsize=9)
        bottom.set_xlabel("epochs")
    panels[0, 0].set_ylabel("norm of v, mean over neurons")
    panels[1, 0].set_ylabel("step of v / norm of v")
    most = max(panels[0], key=lambda panel: len(panel.lines))
    figure.legend(*most.get_legend_handles_labels(), loc="outside right upper", fontsize=6)
    _save(figure, out)


def draw_learning_rates(histories: Sequence[History], out: Path) -> bool:
    """The last metric over the learning rate, a line for runs that differ in nothing else.

    Returns:
      Whether it was drawn: not, if no runs differ in the learning rate.
    """
    lines = by_learning_rate(histories)
    if all(len(line) < 2 for line in lines):
        return False
    figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
    for line in lines:
        rates = {one.about["config"]["optimizer"]["learning_rate"]: one.values[-1] for one in line}
        x = sorted(rates)
        means = [rates[rate].mean() for rate in x]
        deviations = [rates[rate].std(ddof=1) if len(rates[rate]) > 1 else 0 for rate in x]
        panel.errorbar(x, means, deviations, marker="o", capsize=3, label=line[0].about["variant"])
    panel.set(xscale="log", xlabel="learning rate", ylabel=f"last {histories[0].unit.label}")
    all_rates = {one.about["config"]["optimizer"]["learning_rate"] for one in histories}
    panel.set_xticks(sorted(all_rates), [f"{rate:g}" for rate in sorted(all_rates)])
    panel.set_xticks([], minor=True)
    panel.grid(alpha=0.3)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper")
    _save(figure, out)
    return True


def _save(figure: Any, out: Path) -> None:
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status."""
    log_to_stderr()
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--out", default="runs/report", metavar="DIR")
    options = parser.parse_args(arguments)
    plt.switch_backend("agg")
    files = [run for run in options.runs if run.suffix == ".json"]
    directories = [run for run in options.runs if run not in files]
    try:
        out = folder("--out", options.out)
        histories = read_all(directories) if directories else []
        for file in files:
            more, texts = read_accelerator(file)
            histories += more
            print(*texts, sep="\n\n")
        check_comparable(histories)
    except (records.RecordError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not histories:
        return 0
    text = f"{table(histories)}\n\n{FOOTNOTE}\n{conditions(histories)}\n"
    print(text)
    try:
        pictures = write(histories, text, out)
    except OSError as error:
        print(f"error: {out} cannot be written: {error}; choose another --out", file=sys.stderr)
        return 2
    print(f"pictures and numbers: {out.resolve()} ({', '.join(pictures)})")
    return 0


def write(histories: Sequence[History], text: str, out: Path) -> list[str]:
    """Puts the table, the numbers and the pictures into a directory; returns the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text)
    (out / "results.json").write_text(json.dumps(results(histories)) + "\n")
    pictures = ["curves.png", "norms.png"]
    draw_curves(histories, out / "curves.png")
    draw_norms(histories, out / "norms.png")
    if draw_learning_rates(histories, out / "learning_rates.png"):
        pictures.append("learning_rates.png")
    return pictures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
