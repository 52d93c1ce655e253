"""What the programs say while they run: lines on standard error, with the time."""

import logging
import sys

log = logging.getLogger("experiments")


def log_to_stderr() -> None:
    """Shows the lines of this package, whatever other packages have set up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)
