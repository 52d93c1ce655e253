"""What is measured on an accelerator: a module, and a process of its own, for each kind of item.

Each module has `run(name, options)`, which returns what it measured, to be written as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.logs import log_to_stderr


class Options(NamedTuple):
    """How an item is run.

    Attributes:
      seconds: that it may take in all.
      rehearsal: whether small networks and few steps take the place of the real ones.
      data_dir: where CIFAR-10 and MNIST are.
    """

    seconds: float
    rehearsal: bool
    data_dir: Path


def main(arguments: Sequence[str], run: Callable[[str, Options], dict[str, Any]]) -> None:
    """Runs the item that a command line names, and writes its result to a file."""
    log_to_stderr()
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--rehearsal", action="store_true")
    options = parser.parse_args(arguments)
    result = run(options.name, Options(options.seconds, options.rehearsal, options.data_dir))
    part = options.out.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(options.out)  # whole, or not there
