"""Text that ships with Python: the sources of its standard library."""

import sysconfig
from pathlib import Path

import numpy as np

from experiments.datasets import Data, DataError, Examples

HELD_OUT = 10  # every tenth file


def python_sources(length: int, folder: Path | None = None) -> Data:
    """The top-level modules of the standard library as bytes, in pieces of length + 1.

    Files are taken in the order of their names; every tenth one is for testing. Python
    releases differ, so that numbers compare on one release alone.

    Args:
      length: the tokens that a network sees at once.
      folder: of the modules, instead of this Python's own.

    Returns:
      "tokens", uint8 of shape (n, length + 1): a piece begins with the last byte of the one
      before, so that every byte but the first is predicted once.

    Raises:
      DataError: if the folder has fewer than ten modules, or hardly any text.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    if len(files) < HELD_OUT:
        raise DataError(f"{folder} has {len(files)} Python files; at least {HELD_OUT} are needed")
    test = files[HELD_OUT - 1 :: HELD_OUT]
    return Data(
        _pieces([file for file in files if file not in test], length), _pieces(test, length)
    )


def _pieces(files: list[Path], length: int) -> Examples:
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    pieces = (len(text) - 1) // length
    if not pieces:
        raise DataError(f"{files[0].parent} has {len(text)} bytes of text, fewer than a sequence")
    rows = length * np.arange(pieces)[:, None] + np.arange(length + 1)
    return {"tokens": text[rows]}
