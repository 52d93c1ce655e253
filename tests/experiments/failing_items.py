"""Items of work that end in every way but the expected one, and one that does."""

import subprocess
import sys
import time

from experiments import items


def run(name, options):
    if name == "crashes":
        raise RuntimeError("on purpose")
    if name == "hangs":  # with a process of its own, whose number it leaves behind
        child = subprocess.Popen(["sleep", "600"])
        (options.data_dir / "child").write_text(str(child.pid))
        time.sleep(600)
    if name == "dies":
        sys.exit(0)  # without a result
    return {"seconds": options.seconds}


if __name__ == "__main__":
    items.main(sys.argv[1:], run)
