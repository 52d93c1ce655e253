"""Where runs are launched: here, by SkyPilot's task files or Slurm's scripts; and their checks."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments.cluster import COUNT, INDEX
from experiments.command_line import ConfigError, hint, parse

FOLDER = Path("configs/launch")
TRAIN = "python -m experiments.train --config=$CONFIG --workdir=$WORKDIR"
SIZES = [2**n for n in range(12)]
# By the name of a TPU slice, the devices of JAX. In names of v4 and v5p cores are counted, of which
# a device has two.
TPUS = {
    **{f"tpu-{kind}-{n}": n for kind in ("v5litepod", "v6e") for n in SIZES[:9] if n != 2},
    **{f"tpu-{kind}-{2 * n}": n for kind in ("v4", "v5p") for n in SIZES[2:]},
    **{f"tpu-{kind}-{n}": n for kind in ("v2", "v3") for n in SIZES[3:] if n != 16},
}
ON_HOST = {"v4": 4, "v5p": 4}  # devices of the largest slice of one host; 8 of the other kinds
GPUS = ("T4", "L4", "V100", "A10G", "A100", "A100-80GB", "L40S", "H100", "H200", "B200", "GB200")
KEYS = {  # of SkyPilot's task files, those that are used here
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": dict,
    "envs": dict,
    "file_mounts": dict,
    "setup": str,
    "run": str,
}
RESOURCES = (
    *("infra", "accelerators", "accelerator_args", "use_spot", "job_recovery", "autostop"),
    *("disk_size", "disk_tier", "cpus", "memory", "image_id", "labels", "network_tier"),
)
ENVS = ("CONFIG", "WORKDIR", "OVERRIDES", "BUCKET")


class Place(NamedTuple):
    """One place.

    Attributes:
      name: as --on has it.
      devices: of JAX, of all processes together; 0 for what there is.
      is_cluster: whether several processes share them.
      task: the content of a task file; empty for other places.
      processes: those that this machine is to run, 0 for places that are not here.
    """

    name: str
    devices: int
    is_cluster: bool
    task: Mapping[str, Any]
    processes: int

    def local(self, index: int, port: int) -> dict[str, str]:
        """The environment of one of several processes on this machine."""
        address, each = f"127.0.0.1:{port}", self.devices // self.processes
        found = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(each)} if each else {}
        if self.is_cluster:
            found |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_COORDINATOR_BIND_ADDRESS": address,  # not on all interfaces
                COUNT: str(self.processes),
                INDEX: str(index),
            }
        return found


def read_place(name: str) -> Place:
    """The place called local, local:PROCESSESxDEVICES, FILE.yaml or FILE.sh.

    Raises:
      ConfigError: if there is none of this name, or the file has mistakes.
    """
    if name == "local":
        return Place(name, devices=0, is_cluster=False, task={}, processes=1)
    if local := re.fullmatch(r"local:(\d+)x(\d+)", name):
        processes, each = map(int, local.groups())
        if not processes or not each:
            raise ConfigError(f"--on={name} must have a process and a device at least")
        return Place(name, processes * each, processes > 1, task={}, processes=processes)
    read = {".yaml": _read_task, ".sh": _read_script}.get(Path(name).suffix)
    if read is None or not os.path.isfile(name):
        places = ["local", "local:2x4", *sorted(map(str, FOLDER.glob("*.*")))]
        raise ConfigError(f"unknown place --on={name}{hint(name, places)}")
    try:
        return read(name, Path(name).read_text())
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: {error}") from error


def _read_task(name: str, text: str) -> Place:
    try:
        task = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"no YAML: {error}") from error
    if not isinstance(task, dict):
        raise ConfigError("must have keys and values, such as those of the other files")
    _check_keys("", task, KEYS)
    for key, kind in KEYS.items():
        if key != "num_nodes" and not isinstance(task.get(key), kind):
            raise ConfigError(f"{key} must be a {kind.__name__}, got {task.get(key)!r}")
    nodes, resources = task.get("num_nodes", 1), task["resources"]
    if type(nodes) is not int or nodes < 1:
        raise ConfigError(f"num_nodes must be a positive int, got {nodes!r}")
    _check_keys("resources.", resources, RESOURCES)
    _check_keys("envs.", task["envs"], ENVS)
    if missing := [key for key in ENVS if not isinstance(task["envs"].get(key), str)]:
        raise ConfigError(f"envs must have {', '.join(ENVS)}, as strings; missing: {missing}")
    _check_run(task["run"], "$OVERRIDES")
    parse([f"--config={task['envs']['CONFIG']}"])
    each, is_cluster = _devices(str(resources.get("accelerators")), nodes)
    return Place(name, nodes * each, is_cluster, task=task, processes=0)


def _check_keys(prefix: str, found: Mapping[str, Any], known: Any) -> None:
    for key in found:
        if key not in known:
            raise ConfigError(f"unknown key {prefix}{key}{hint(str(key), known)}")


def _check_run(run: str, overrides: str) -> None:
    if f"{TRAIN} {overrides}" not in " ".join(run.replace("\\\n", " ").split()):
        raise ConfigError(f"its commands must have: {TRAIN} {overrides}")
    done = subprocess.run(["bash", "-n"], input=run, text=True, capture_output=True, check=False)
    if done.returncode:
        raise ConfigError(f"its commands are not those of a shell: {done.stderr.strip()}")


def _devices(accelerator: str, nodes: int) -> tuple[int, bool]:
    """The devices of a node, and whether there are several hosts."""
    kind, _, count = accelerator.partition(":")
    if kind in TPUS and count in ("", "1"):
        if nodes > 1:
            raise ConfigError("num_nodes must be 1 with a TPU: the slice says how many hosts")
        devices = TPUS[kind]
        return devices, devices > ON_HOST.get(kind.split("-")[1], 8)
    if kind in GPUS and (count or "1").isdecimal() and int(count or "1") > 0:
        return int(count or "1"), nodes > 1
    raise ConfigError(f"unknown accelerator {accelerator}{hint(kind, [*TPUS, *GPUS])}")


def _read_script(name: str, text: str) -> Place:
    """A script for sbatch, with as many tasks as GPUs."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    names = ("nodes", "ntasks-per-node", "gpus-per-node")
    if any(not options.get(key, "").isdecimal() for key in names):
        raise ConfigError(f"must set {', '.join(f'#SBATCH --{key}=NUMBER' for key in names)}")
    nodes, tasks, gpus = (int(options[key]) for key in names)
    if tasks != gpus:
        raise ConfigError(
            f"--ntasks-per-node and --gpus-per-node must be the same, as JAX gives every task one "
            f"GPU; got {tasks} and {gpus}"
        )
    _check_run(text, "${OVERRIDES:-}")
    return Place(name, nodes * gpus, is_cluster=nodes * gpus > 1, task={}, processes=0)
