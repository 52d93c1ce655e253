"""What weight normalization costs a training step: python -m experiments.overhead.

Every implementation trains the same network on the same batch, in one process and in turn.
Batches count images, or the transformer's sequences of 64 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from tabulate import tabulate

from experiments.logs import log_to_stderr
from experiments.peers import IMPLEMENTATIONS
from experiments.problems import NETWORKS, Network
from experiments.records import version, versions
from experiments.stopwatch import Cell, measure, ratios

HEADERS = ("", "step time", "quartiles", "ms a step", "compile time", "bytes", "memory", "against")
FOOTNOTE = """\
step time: median and quartiles, over rounds, of the ratio to the network without normalization
(the column against) in the same round. compile time: with tracing, the faster of two. bytes:
accessed by a step, as XLA counts them. memory: temporary, of the compiled step. All are ratios
but ms a step, which is a median too."""


def table(cell: Cell) -> str:
    """One line an implementation."""
    rows = []
    for name, one in cell.items():
        (low, median, high), *others = ratios(cell, name)
        quartiles = f"{low:.2f} to {high:.2f}"
        milliseconds = f"{1000 * np.median(one.seconds):.1f}"
        texts = ["-" if ratio is None else f"{ratio:.2f}" for ratio in others]
        against = IMPLEMENTATIONS[name].against
        rows.append((name, f"{median:.2f}", quartiles, milliseconds, *texts, against))
    align = ("left", *["right"] * (len(HEADERS) - 2), "left")
    return str(tabulate(rows, HEADERS, colalign=align, disable_numparse=True))


def title(cell: Cell) -> str:
    """The cell, and how many rounds it was given."""
    one = next(iter(cell.values()))
    return f"{one.model}, batch {one.batch} ({len(one.seconds)} rounds)"


def draw(cells: Sequence[Cell], out: Path) -> None:
    """The ratios of time and of bytes, a column of panels for every network."""
    models = list(dict.fromkeys(one.model for cell in cells for one in cell.values()))
    size = (1 + 4 * len(models), 7)
    figure, panels = plt.subplots(2, len(models), figsize=size, layout="constrained", squeeze=False)
    for model, (top, bottom) in zip(models, panels.T, strict=True):
        own = [cell for cell in cells if next(iter(cell.values())).model == model]
        _draw_model(top, bottom, own)
        top.set_title(model)
    panels[0, 0].set_ylabel("step time, ratio")
    panels[1, 0].set_ylabel("bytes accessed, ratio")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def _draw_model(top: Any, bottom: Any, cells: Sequence[Cell]) -> None:
    """Groups of points, one group a batch size; the bars are quartiles."""
    names = [name for name in cells[0] if IMPLEMENTATIONS[name].against != name]
    for i, name in enumerate(names):
        measured = [x for x, cell in enumerate(cells) if name in cell]
        xs = np.array(measured) + 0.7 * ((i + 0.5) / len(names) - 0.5)
        costs = [ratios(cells[x], name) for x in measured]
        low, median, high = np.transpose([cost.step for cost in costs])
        style = {"fmt": "os^vDP*X<>p"[i % 11], "color": f"C{i % 10}", "label": name}
        top.errorbar(xs, median, (median - low, high - median), **style)
        if all(cost.bytes is not None for cost in costs):
            bottom.errorbar(xs, [cost.bytes for cost in costs], **style)
    batches = [next(iter(cell.values())).batch for cell in cells]
    for panel in (top, bottom):
        panel.axhline(1, color="gray", linewidth=1)
        panel.set_xticks(range(len(cells)), [f"batch {batch}" for batch in batches])
        panel.grid(alpha=0.3, axis="y")


def machine(networks: Mapping[str, Network]) -> dict[str, Any]:
    """What was run, and on what."""
    others = {one.package for one in IMPLEMENTATIONS.values() if one.package and one.is_installed()}
    device = jax.devices()[0]
    return {
        "networks": {name: " ".join(str(one.model).split()) for name, one in networks.items()},
        "implementations": {name: one.about for name, one in IMPLEMENTATIONS.items()},
        "versions": versions() | {name: version(name) for name in sorted(others)},
        "device": f"{device.platform}, {device.device_kind}, {platform.machine()}, "
        f"{os.cpu_count()} CPU cores",
    }


def choose(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The implementations that can run here, each after what it is compared to, and the rest.

    Returns:
      Names; and by name, the package that is missing.
    """
    missing = {
        name: str(IMPLEMENTATIONS[name].package)
        for name in names
        if not IMPLEMENTATIONS[name].is_installed()
    }
    installed = [name for name in names if name not in missing]
    pairs = ((IMPLEMENTATIONS[name].against, name) for name in installed)
    return list(dict.fromkeys(itertools.chain.from_iterable(pairs))), missing


def parser(networks: Mapping[str, Network]) -> argparse.ArgumentParser:
    """The command line."""

    def names(known: Mapping[str, Any]) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            for name in (chosen := text.split(",")):
                if name not in known:
                    message = f"unknown {name!r}; there are: {', '.join(known)}"
                    raise argparse.ArgumentTypeError(message)
            return chosen

        return split

    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"must be positive, got {number}")
        return number

    def sizes(text: str) -> list[int]:
        return list(map(positive, text.split(",")))

    made = argparse.ArgumentParser(
        prog="python -m experiments.overhead",
        description=__doc__,
        epilog="\n".join(f"{name:22}{one.about}" for name, one in IMPLEMENTATIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = ", ".join(f"{name} {network.sizes}" for name, network in networks.items())
    add = made.add_argument
    add("--models", type=names(networks), default=list(networks), help=f"of {', '.join(networks)}")
    add("--batches", type=sizes, help=f"of every model, in place of {defaults}")
    add(
        "--implementations",
        type=names(IMPLEMENTATIONS),
        default=list(IMPLEMENTATIONS),
        help="separated by commas; all that are installed unless given; see below",
    )
    add(
        "--seconds",
        type=positive,
        default=45,
        help="for the rounds of a cell (%(default)s); there are three at least, none is cut off",
    )
    add("--repeats", type=positive, help="rounds of every cell, in place of --seconds")
    add(
        "--out",
        type=Path,
        default=Path("runs/overhead.png"),
        metavar="FILE.png",
        help="the picture (%(default)s); the numbers go beside it as FILE.json",
    )
    return made


def main(arguments: Sequence[str], networks: Mapping[str, Network] = NETWORKS) -> int:
    """Runs the command line and returns its exit status."""
    command_line = parser(networks)
    options = command_line.parse_args(arguments)
    if options.out.suffix != ".png":
        command_line.error(f"--out must be a file that ends in .png, got {options.out}")
    names, skipped = choose(options.implementations)
    for name, package in skipped.items():
        print(f"skipped: {name} (pip install {package})")
    if not names:
        print("error: none of the implementations is installed", file=sys.stderr)
        return 2
    log_to_stderr()
    jax.config.update("jax_enable_compilation_cache", False)  # compilations are timed
    plt.switch_backend("agg")

    options.out.parent.mkdir(parents=True, exist_ok=True)
    numbers, records = options.out.with_suffix(".json"), {**machine(networks), "skipped": skipped}
    cells: list[Cell] = []
    for model in options.models:
        for size in options.batches or networks[model].sizes:
            problem = networks[model].problem(size)
            cells.append(measure(model, problem, names, options.seconds, options.repeats))
            print(f"\n{title(cells[-1])}\n{table(cells[-1])}", flush=True)
            measurements = [one._asdict() for cell in cells for one in cell.values()]
            text = json.dumps({**records, "measurements": measurements}, indent=2)
            numbers.write_text(text + "\n")  # after every cell, for a run that is cut short
    print(FOOTNOTE)
    draw(cells, options.out)
    print(f"picture: {options.out.resolve()}\nnumbers: {numbers.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
