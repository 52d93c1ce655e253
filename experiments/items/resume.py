"""Whether a run that is stopped and started again ends as one that is not, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from experiments import items, records
from experiments.checkpoints import Checkpoints
from experiments.command_line import parse
from experiments.train import load
from experiments.trainer import Trainer

# Convolutions, batch means, and reductions over many examples; small, since it is compiled anew by
# every process.
RUN = ("--config=configs/digits.py:weight_norm_mean_only", "--config.seeds=1")
# So many steps that the run is not over before it is stopped, at some step after the first round.
SIZES = ("--config.steps=20000", "--config.steps_per_eval=500", "--config.steps_per_call=10")
REHEARSAL = (
    *("--config.steps=100", "--config.steps_per_eval=2", "--config.steps_per_call=1"),
    *("--config.task.widths=(4,8)", "--config.batch_size=8"),
)
FLAGS = {"default": "", "deterministic": "--xla_gpu_deterministic_ops=true"}


def run(name: str, options: items.Options) -> dict[str, Any]:
    """Compares both runs; with XLA's deterministic operations too, where the first pair differs."""
    del name
    arguments = [*RUN, *(REHEARSAL if options.rehearsal else SIZES), "--config.unroll=false"]
    results: dict[str, Any] = {}
    for flags_name, flags in FLAGS.items():
        with tempfile.TemporaryDirectory() as folder:
            results[flags_name] = _compare(arguments, Path(folder), flags)
        if results[flags_name]["is_same"]:
            break
    return {"arguments": arguments, "runs": results}


def table(result: dict[str, Any]) -> str:
    """What came out, a line for each set of flags."""
    lines = []
    for name, one in result["runs"].items():
        verdict = "the same, bit for bit" if one["is_same"] else "different"
        lines.append(
            f"{name}: stopped after step {one['stopped_at']} of {one['steps']} and resumed: "
            f"{verdict} (largest difference of a parameter {one['largest_difference']:.3g})"
        )
    return "\n".join(lines)


def _compare(arguments: list[str], folder: Path, flags: str) -> dict[str, Any]:
    whole, parts = folder / "whole", folder / "parts"
    _wait(_start([*arguments, f"--workdir={whole}"], flags))
    process = _start([*arguments, f"--workdir={parts}"], flags)
    _wait_for_metrics(parts, process)
    process.send_signal(signal.SIGTERM)
    _wait(process)
    with Checkpoints(parts) as checkpoints:
        stopped_at = checkpoints.latest()
    _wait(_start([*arguments, f"--workdir={parts}"], flags))
    like = like_the_last_states(arguments)
    states = [_last_states(workdir, like) for workdir in (whole, parts)]
    difference = jax.tree.map(_difference, *states)
    lines = [_without_times(workdir) for workdir in (whole, parts)]
    largest = max(jax.tree.leaves(difference))
    return {
        "stopped_at": stopped_at,
        "steps": parse(arguments).config.steps,
        "is_same": largest == 0 and lines[0] == lines[1],
        "largest_difference": largest,
    }


def _start(arguments: list[str], flags: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    command = [sys.executable, "-m", "experiments.train", *arguments]
    return subprocess.Popen(command, env=environment, stdout=sys.stderr)


def _wait(process: subprocess.Popen[bytes]) -> None:
    if status := process.wait():
        raise RuntimeError(f"{process.args!r} ended with status {status}")


def _wait_for_metrics(workdir: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the run has come to its first evaluation, or to its end."""
    file = workdir / "metrics.jsonl"
    while process.poll() is None and not (file.is_file() and file.read_text()):
        time.sleep(0.02)


def like_the_last_states(arguments: Sequence[str]) -> Any:
    """The shapes of the states of a run, on the first device."""
    config = parse(arguments).config
    init = jax.vmap(Trainer(config).init, in_axes=(0, None))
    states = jax.eval_shape(init, jnp.zeros(config.seeds, jnp.int32), dict(load(config).train))
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), states)


def _last_states(workdir: Path, like: Any) -> Any:
    with Checkpoints(workdir) as checkpoints:
        return jax.device_get(checkpoints.restore(like))


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)), initial=0))


def _without_times(workdir: Path) -> list[dict[str, Any]]:
    lines = records.read_metrics(workdir)
    return [{k: x for k, x in line.items() if "seconds" not in k} for line in lines]


if __name__ == "__main__":
    items.main(sys.argv[1:], run)
