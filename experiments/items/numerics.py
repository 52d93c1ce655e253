"""The tests that are marked for accelerators, with products in full float32 precision."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from experiments import items
from experiments.logs import log

TESTS = Path(__file__).parents[2] / "tests"
MARK = "accelerator"
REHEARSAL = ("-k", "linear or sgd")  # a few of each kind


def run(name: str, options: items.Options) -> dict[str, Any]:
    """Runs the tests, and says which passed and which failed.

    Raises:
      RuntimeError: if pytest did not run them.
    """
    files = sorted(str(file) for file in TESTS.glob("test_*.py") if MARK in file.read_text())
    # Inside the folder of the tests, so that a relative path is right for reports.
    outcome = TESTS.parent / f".{name}-{os.getpid()}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "accelerator", "--accelerator"]
    command += ["-p", "no:cacheprovider", f"--junitxml={outcome}", *files]
    command += REHEARSAL if options.rehearsal else ()
    environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    begin = time.monotonic()
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, stdout=sys.stderr, check=False
    )
    log.info("pytest ended with status %d", done.returncode)
    try:
        if done.returncode not in (0, 1):  # 1: tests failed, which is a result
            raise RuntimeError(f"pytest ended with status {done.returncode}")
        cases = ElementTree.parse(outcome).getroot().iter("testcase")
        found = [(f"{case.get('classname')}::{case.get('name')}", case) for case in cases]
    finally:
        outcome.unlink(missing_ok=True)
    failed = {
        test: str(problem.get("message")).split("\n", maxsplit=1)[0]
        for test, case in found
        for problem in (*case.iter("failure"), *case.iter("error"))
    }
    skipped = [test for test, case in found if case.find("skipped") is not None]
    passed = [test for test, _ in found if test not in failed and test not in skipped]
    return {
        "passed": passed,
        "failed": failed,
        "skipped": skipped,
        "matmul_precision": environment["JAX_DEFAULT_MATMUL_PRECISION"],
        "test_seconds": time.monotonic() - begin,
    }


def table(result: dict[str, Any]) -> str:
    """How many tests passed, and which failed."""
    counts = f"{len(result['passed'])} passed, {len(result['failed'])} failed"
    lines = [f"  {test}: {message}" for test, message in result["failed"].items()]
    return "\n".join([f"{counts}, matmul precision {result['matmul_precision']}", *lines])


if __name__ == "__main__":
    items.main(sys.argv[1:], run)
