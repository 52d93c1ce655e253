"""Commands for every place, and that mistakes are found before anything is launched."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from experiments import launch
from experiments.command_line import ConfigError, parse
from experiments.places import FOLDER, read_place

GOLDEN = Path(__file__).parent / "launched.txt"
PLACES = sorted(FOLDER.iterdir())
TASKS = [place for place in PLACES if place.suffix == ".yaml"]
TASK = FOLDER / "tpu-v5e-8.yaml"
SCRIPT = FOLDER / "slurm-2x8gpu.sh"
DIGITS = "--config=configs/digits.py:weight_norm"


def golden():
    """From each command line to what it prints."""
    parts = re.split(r"^\$ python -m experiments.launch (.*)\n", GOLDEN.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("arguments", golden())
def test_what_is_printed(arguments, capsys):
    """After a wanted change: the new lines, read with care, belong into the file."""
    assert launch.main(shlex.split(arguments)) == 0
    assert capsys.readouterr().out.strip() == golden()[arguments].strip()


def test_all_places_are_in_the_golden_file():
    printed = " ".join(golden())
    assert all(str(place) in printed for place in PLACES)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.stem)
def test_every_place_passes_our_check(place):
    found = read_place(str(place))
    assert found.devices in (8, 16)
    assert found.is_cluster == (found.devices == 16)
    assert f"--on={place}" in place.read_text()  # its header says how it is used


@pytest.mark.parametrize("place", TASKS, ids=lambda place: place.stem)
def test_every_task_file_passes_the_check_of_skypilot(place, monkeypatch):
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    sky = pytest.importorskip("sky", reason="SkyPilot is an extra of half a gigabyte")
    task = sky.Task.from_yaml(str(place))
    assert task.num_nodes == read_place(str(place)).task.get("num_nodes", 1)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.stem)
def test_what_a_place_runs_is_the_command(place, tmp_path):
    """The commands of the file run in a shell, with a stand-in for Python."""
    fields = ["--config.optimizer.learning_rate=0.3", "--config.task.widths=(4,8)"]
    (one,) = launch.launches([DIGITS, f"--on={place}", *fields])
    (tmp_path / ".venv/bin").mkdir(parents=True)
    stand_in = tmp_path / ".venv/bin/python"
    names = ("JAX_COORDINATOR_ADDRESS", "WNJAX_PROCESS_COUNT", "WNJAX_PROCESS_ID")
    shown = " ".join(f'"${name}"' for name in names)
    stand_in.write_text(f'#!/bin/bash\nprintf "%s\\n" {shown} "$@"\n')
    stand_in.chmod(0o755)
    (tmp_path / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    commands = one.place.task["run"] if one.place.task else place.read_text()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **one.environment}
    environment |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    environment |= {"SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(
        ["bash", "-c", commands],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ("spot" in place.stem)  # not done, without an outcome
    *about, _, _ = done.stdout.splitlines()[:5]
    is_told = "SKYPILOT_NODE_IPS" in commands
    assert about == (["10.0.0.1:8476", "2", "1"] if is_told else ["", "", ""])
    assert is_told == (one.place.is_cluster and place.stem.startswith("gpu"))
    config = parse(done.stdout.splitlines()[5:]).config
    assert config == one.entry.run.config
    assert config.task.widths == (4, 8)
    assert config.cluster.devices == config.mesh.data == one.place.devices


def write(tmp_path, change):
    """A task file with a change of its content."""
    task = yaml.safe_load(TASK.read_text())
    change(task)
    file = tmp_path / "place.yaml"
    file.write_text(yaml.safe_dump(task))
    return f"--on={file}"


def put(*path, value):
    """A change: the value at a path of keys, and what was there goes."""

    def change(task):
        for key in path[:-1]:
            task = task[key]
        task[path[-1]] = value

    return change


RUN = ".venv/bin/python -m experiments.train --config=$CONFIG --workdir=$WORKDIR $OVERRIDES"
BAD_TASKS = {
    "unknown key rum; did you mean run?": put("rum", value="x"),
    "unknown key resources.acelerators; did you mean accelerators?": put(
        "resources", "acelerators", value="x"
    ),
    "unknown key envs.CONFG; did you mean CONFIG?": put("envs", "CONFG", value="x"),
    "run must be a str, got None": put("run", value=None),
    "resources must be a dict, got 'tpu'": put("resources", value="tpu"),
    "num_nodes must be a positive int, got 'x'": put("num_nodes", value="x"),
    "num_nodes must be 1 with a TPU": put("num_nodes", value=2),
    "unknown accelerator tpu-v5litepod-9; did you mean tpu-v5litepod-": put(
        "resources", "accelerators", value="tpu-v5litepod-9"
    ),
    "unknown accelerator H10:8; did you mean H100?": put(
        "resources", "accelerators", value="H10:8"
    ),
    "unknown accelerator H100:0": put("resources", "accelerators", value="H100:0"),
    "its commands must have: python -m experiments.train": put("run", value="echo"),
    "its commands are not those of a shell": put("run", value=f"if {RUN}"),
    "configs/digit.py": put("envs", "CONFIG", value="configs/digit.py"),
    "missing: ['BUCKET']": put("envs", "BUCKET", value=None),
}


@pytest.mark.parametrize("text", BAD_TASKS)
def test_a_task_file_with_a_mistake(text, tmp_path, capsys):
    on = write(tmp_path, BAD_TASKS[text])
    assert launch.main([DIGITS, on, "--bucket=b", "--run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'place.yaml'}: ")
    assert text in error


@pytest.mark.parametrize("text", ["- a list", "{", "only text"])
def test_no_task_file(text, tmp_path):
    (tmp_path / "place.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"no YAML|must have keys and values"):
        read_place(str(tmp_path / "place.yaml"))


def test_a_place_that_cannot_be_read(tmp_path):
    for name in ("place.yaml", "place.sh"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(ConfigError, match=rf"{name}: 'utf-8' codec can't decode byte"):
            read_place(str(tmp_path / name))
    with pytest.raises(ConfigError, match="unknown place"):
        read_place(f"{'x' * 300}.yaml")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("#SBATCH --nodes=2\n", "", "must set #SBATCH --nodes=NUMBER"),
        ("per-node=8\n#SBATCH --gpus", "per-node=4\n#SBATCH --gpus", "must be the same, as JAX"),
        ("$CONFIG", "$CONFG", "its commands must have: python -m experiments.train"),
    ],
)
def test_a_script_with_a_mistake(old, new, text, tmp_path):
    changed = SCRIPT.read_text().replace(old, new)
    assert changed != SCRIPT.read_text()
    (tmp_path / "place.sh").write_text(changed)
    with pytest.raises(ConfigError, match=text):
        read_place(str(tmp_path / "place.sh"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([DIGITS], "--on=PLACE is missing, such as --on=configs/launch/tpu-v5e-8.yaml"),
        (["--config=configs/digits.py:weight_nrm", "--on=local"], "did you mean weight_norm?"),
        ([DIGITS, "--on=local", "--config.sede=1"], "did you mean --config.seed?"),
        (["--config=configs/digts.py", "--on=local"], "did you mean configs/digits.py?"),
        ([DIGITS, "--on=local", "--workdir="], "--workdir= is empty: name a directory"),
        ([DIGITS, "--on=loca"], "unknown place --on=loca; did you mean local?"),
        ([DIGITS, "--on=configs/launch/tpu-v5e8.yaml"], "did you mean configs/launch/tpu-v5e-8.y"),
        ([DIGITS, "--on=local:0x4"], "must have a process and a device at least"),
        ([DIGITS, "--on=local", "--bucket=b"], "--bucket is for task files"),
        ([DIGITS, "--on=local", "--workdir=gs://b/run"], "must be a directory; mount the bucket"),
        ([DIGITS, "--on=local:2x4", "--workdir=a b"], "without spaces and signs of the shell"),
        (["--config=configs/char_lm.py", "--sweep", "--on=local", "--x=1"], "unknown flag --x"),
        ([DIGITS, "--on=local", "--sweep=false"], "--sweep takes no value"),
        ([DIGITS, f"--on={TASK}", "--bucket="], "--bucket need one"),
        ([DIGITS, f"--on={TASK}", "--workdir=/data/x"], "must be a directory of the bucket"),
        ([DIGITS, f"--on={TASK}", "--workdir=../x"], "must be a directory of the bucket"),
        (
            [DIGITS, f"--on={TASK}", "--config.mesh.data=16"],
            "mesh.data · mesh.fsdp · mesh.tensor must be at most 8, the number of devices, got 16",
        ),
        (
            [DIGITS, "--on=local:2x4", "--config.mesh.data=2", "--config.seeds=1"],
            "use 2 of 8 devices, which must all take part in several processes",
        ),
        (
            [DIGITS, "--on=local:2x4", "--config.batch_size=100", "--config.seeds=1"],
            "batches of 100 and 1 seeds use 4 of 8 devices, and in several processes all must take "
            "part; for example with --config.batch_size=96 or --config.seeds=8",
        ),
    ],
)
def test_a_mistake_never_gets_to_a_cluster(arguments, text, capsys, monkeypatch):
    monkeypatch.setattr(launch, "execute", lambda found: pytest.fail("it was launched"))
    assert launch.main([*arguments, "--run"]) == 2
    assert text in capsys.readouterr().err


def test_devices_that_have_nothing_to_do_are_told_of(caplog):
    (one,) = launch.launches(["--config=configs/cifar10.py", f"--on={TASK}"])
    assert one.entry.run.config.mesh.data == 4
    assert "batches of 100 and 1 seeds use 4 of 8 devices" in caplog.text


def test_a_sweep_that_is_asked_to_stop_starts_nothing_more(tmp_path, monkeypatch, capsys):
    started = []

    def asked_to_stop(arguments, interrupts, *others):
        started.append(arguments)
        interrupts.requested = True
        return [0]

    monkeypatch.setattr(launch, "train_apart", asked_to_stop)
    arguments = ["--config=configs/digits.py:plain", "--sweep", "--on=local"]
    assert launch.main([*arguments, f"--workdir={tmp_path}", "--run"]) == 1
    assert len(started) == 1
    assert "3 of 3 did not finish" in capsys.readouterr().out


def test_results_need_a_bucket(capsys):
    assert launch.main([DIGITS, f"--on={TASK}"]) == 0
    assert "--env BUCKET=NAME" in capsys.readouterr().out
    assert launch.main([DIGITS, f"--on={TASK}", "--run"]) == 2
    assert "--bucket=NAME is missing" in capsys.readouterr().err


def test_programs_that_are_not_there(capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: None)
    assert launch.main([DIGITS, f"--on={TASK}", "--bucket=b", "--run"]) == 2
    assert "no program sky here: pip install 'skypilot[gcp]'" in capsys.readouterr().err
    assert launch.main([DIGITS, f"--on={SCRIPT}", "--run"]) == 2
    assert "no program sbatch here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "program"), [(TASK, "sky"), (SCRIPT, "sbatch")], ids=["sky", "slurm"]
)
def test_run_calls_the_program(place, program, tmp_path, monkeypatch, capsys):
    """For every run of a sweep, also after one that failed; here a stand-in."""
    log = tmp_path / "log"
    (tmp_path / program).write_text(f'#!/bin/bash\necho "$CONFIG $*" >> {log}')
    (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    bucket = ["--bucket=b"] if program == "sky" else []
    arguments = ["--config=configs/digits.py:plain", "--sweep", f"--on={place}", *bucket, "--run"]
    assert launch.main(arguments) == 0
    lines = log.read_text().splitlines()
    assert len(lines) == 3
    assert all(str(place) in line and "configs/digits.py:plain" in line for line in lines)
    (tmp_path / program).write_text("#!/bin/bash\nexit 3\n")
    assert launch.main(arguments) == 1
    out = capsys.readouterr().out
    assert "3 of 3 did not finish:\n  python -m experiments.train" in out


@pytest.mark.parametrize(
    ("accelerator", "devices", "is_cluster"),
    [
        ("tpu-v5litepod-8", 8, False),
        ("tpu-v5litepod-16", 16, True),
        ("tpu-v4-8", 4, False),  # such a name counts cores, of which a device has two
        ("tpu-v5p-16", 8, True),
        ("tpu-v3-8", 8, False),
        ("tpu-v3-32", 32, True),
        ("H100", 1, False),
        ("A100-80GB:4", 4, False),
    ],
)
def test_devices_of_accelerators(accelerator, devices, is_cluster, tmp_path):
    on = write(tmp_path, put("resources", "accelerators", value=accelerator))
    place = read_place(on.removeprefix("--on="))
    assert (place.devices, place.is_cluster) == (devices, is_cluster)


def test_help(capsys):
    assert launch.main(["--help"]) == 0
    assert "local:2x4" in capsys.readouterr().out
