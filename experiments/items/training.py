"""Experiments at full size, in the time that there is."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import items, records
from experiments.command_line import parse
from experiments.train import train

CIFAR10 = (
    *("plain", "weight_norm", "weight_norm_init", "batch_norm", "mean_only"),
    "weight_norm_mean_only",
)
FIFTY = ("--config.steps=25000", "--config.optimizer.decay_from=12500")
RUNS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "draw": {
        name: (f"--config=configs/mnist_draw.py:{name}", "--config.seeds=4")
        for name in ("plain", "weight_norm")
    },
    **{
        f"cifar10_50_{name}": {name: (f"--config=configs/cifar10.py:{name}", *FIFTY)}
        for name in CIFAR10
    },
    **{f"cifar10_200_{name}": {name: (f"--config=configs/cifar10.py:{name}",)} for name in CIFAR10},
}
"""By item and name, the arguments of experiments.train."""


def run(name: str, options: items.Options) -> dict[str, Any]:
    """Trains one network after the other, each in its share of the time that is left."""
    end, runs = time.monotonic() + options.seconds, {}
    for left, (label, arguments) in zip(
        range(len(RUNS[name]), 0, -1), RUNS[name].items(), strict=True
    ):
        size = _rehearsed(arguments) if options.rehearsal else arguments
        minutes = (end - time.monotonic()) / left / 60
        with tempfile.TemporaryDirectory() as folder:
            workdir = Path(folder) / label
            last = ("--config.evals_per_save=1000000", f"--config.minutes={minutes:.4g}")
            where = (f"--config.data_dir={options.data_dir}", f"--workdir={workdir}")
            train(parse([*size, *last, *where]))
            runs[label] = _record(workdir)
    return {"runs": runs}


def _rehearsed(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The smoke variant of the same config file, with two seeds where there are several."""
    file = arguments[0].partition(":")[0]
    seeds = ("--config.seeds=2",) if any("seeds" in one for one in arguments) else ()
    return (f"{file}:smoke", *seeds)


def _record(workdir: Path) -> dict[str, Any]:
    """What a run leaves: run.json, and its metrics, with the norms of the last evaluation alone."""
    lines = records.read_metrics(workdir)
    for line in lines[:-1]:
        line["norms"] = {}
    return {"about": records.read_about(workdir), "metrics": lines}


if __name__ == "__main__":
    items.main(sys.argv[1:], run)
