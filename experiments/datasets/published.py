"""CIFAR-10 and MNIST, in the file formats in which they are published.

CIFAR-10   DIR/cifar-10-batches-bin/{data_batch_1 to 5,test_batch}.bin: records of 3,073 bytes,
           a label, then the red, green and blue planes of 32x32 pixels, row by row
MNIST      DIR/mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz: gzipped IDX, that is two
           zero bytes, a type, a rank, big-endian sizes, then the bytes
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch

from experiments.datasets import Data, DataError, Examples
from experiments.logs import log


class Download(NamedTuple):
    """Where a file or an archive is published, and what it holds."""

    url: str
    sha256: str
    files: tuple[str, ...]  # paths below the data directory
    archive: bool = False


CIFAR10 = {
    "cifar-10-batches-bin/data_batch_1.bin": (
        "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"
    ),
    "cifar-10-batches-bin/data_batch_2.bin": (
        "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"
    ),
    "cifar-10-batches-bin/data_batch_3.bin": (
        "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"
    ),
    "cifar-10-batches-bin/data_batch_4.bin": (
        "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"
    ),
    "cifar-10-batches-bin/data_batch_5.bin": (
        "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"
    ),
    "cifar-10-batches-bin/test_batch.bin": (
        "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"
    ),
}
MNIST = {
    "mnist/train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "mnist/train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "mnist/t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "mnist/t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}
CIFAR10_DOWNLOADS = (
    Download(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        tuple(CIFAR10),
        archive=True,
    ),
)
MNIST_DOWNLOADS = tuple(
    Download(f"https://storage.googleapis.com/cvdf-datasets/{file}", sha256, (file,))
    for file, sha256 in MNIST.items()
)


def cifar10(folder: Path, downloads: tuple[Download, ...] = CIFAR10_DOWNLOADS) -> Data:
    """The 60,000 images of CIFAR-10, downloaded to `folder` unless they are there.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009),
    https://www.cs.toronto.edu/~kriz/cifar.html

    Returns:
      "images" (n, 32, 32, 3), uint8, and "labels" (n,), int32; 50,000 and 10,000 of them.

    Raises:
      DataError: if a file cannot be had, has another SHA-256 than the published one when it was
        downloaded, or another length or labels than a file of CIFAR-10 has.
    """
    fetch(folder, downloads)
    *train, test = (folder / file for file in CIFAR10)
    return Data(_cifar10(train), _cifar10([test]))


def mnist(folder: Path, downloads: tuple[Download, ...] = MNIST_DOWNLOADS) -> Data:
    """The 70,000 handwritten digits of MNIST, downloaded to `folder` unless they are there.

    Source: Y. LeCun, C. Cortes and C. Burges, The MNIST Database of Handwritten Digits (1998)

    Returns:
      "images" (n, 28, 28, 1), uint8, and "labels" (n,), int32; 60,000 and 10,000 of them.

    Raises:
      DataError: as for `cifar10`.
    """
    fetch(folder, downloads)
    images, labels, test_images, test_labels = (folder / file for file in MNIST)
    return Data(_mnist(images, labels, 60_000), _mnist(test_images, test_labels, 10_000))


def provenance(folder: Path, sums: Mapping[str, str]) -> str:
    """Whether the files in `folder` are the published ones, by their SHA-256.

    Raises:
      DataError: if a file cannot be read.
    """
    if not all(os.path.isfile(folder / file) for file in sums):
        return "to be downloaded"
    with _reading():
        if all(pooch.file_hash(folder / file, alg="sha256") == sums[file] for file in sums):
            return "the published files"
    return "not the published files (their SHA-256 differ): compare variants, not with the paper"


def fetch(folder: Path, downloads: tuple[Download, ...]) -> None:
    """Downloads what is not there, and checks its SHA-256.

    Raises:
      DataError: if something cannot be had, or is not what it should be.
    """
    for download in downloads:
        if all(os.path.isfile(folder / file) for file in download.files):
            continue
        log.info("downloading %s to %s", download.url, folder)
        target = folder if download.archive else (folder / download.files[0]).parent
        try:
            pooch.retrieve(
                download.url,
                known_hash=f"sha256:{download.sha256}",
                fname=download.url.rsplit("/", maxsplit=1)[1],
                path=target,
                processor=pooch.Untar(extract_dir=".") if download.archive else None,
                downloader=pooch.HTTPDownloader(timeout=60),
            )
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            listing = ", ".join(str(folder / file) for file in download.files)
            raise DataError(
                f"{download.url} cannot be had: {error}. Put the published files there "
                f"yourself, or name their directory with --config.data_dir: {listing}"
            ) from error


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data cannot be read: {error}. Make it readable, or name another directory with "
            "--config.data_dir"
        ) from error


def read_cifar10(file: Path, records: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) and labels (n,), both uint8, of one file.

    Raises:
      DataError: if it is not a file of so many records with labels from 0 to 9.
    """
    with _reading():
        content = np.fromfile(file, np.uint8)
    if (size := len(content)) != (expected := records * 3073):
        raise DataError(f"{file} has {size} bytes instead of {expected}; delete it to fetch it")
    rows = content.reshape(records, 3073)
    if (highest := rows[:, 0].max()) > 9:
        raise DataError(f"{file} holds the label {highest}; it is no file of CIFAR-10's")
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]


def read_idx(file: Path) -> np.ndarray:
    """The array of bytes in a gzipped IDX file.

    Raises:
      DataError: if it is truncated, damaged, or something else.
    """
    with _reading():
        compressed = file.read_bytes()
    try:
        content = gzip.decompress(compressed)
    except (EOFError, gzip.BadGzipFile, zlib.error, struct.error) as error:
        raise DataError(f"{file} is damaged ({error}); delete it to fetch it again") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{file} is no IDX file of bytes: it begins with {content[:4]!r}")
    rank, start = content[3], 4 + 4 * content[3]
    if not 1 <= rank <= 3 or len(content) < start:  # 3 is that of images
        raise DataError(
            f"{file} is damaged: its header says {rank} dimensions, of 1 to 3, and it has "
            f"{len(content)} bytes; delete it to fetch it again"
        )
    shape = tuple(np.frombuffer(content, ">u4", rank, offset=4).tolist())
    if len(content) - start != (expected := math.prod(shape)):
        raise DataError(f"{file} has {len(content) - start} values, not {expected} as it says")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _cifar10(files: list[Path]) -> Examples:
    images, labels = zip(*map(read_cifar10, files), strict=True)
    return {
        "images": np.ascontiguousarray(np.concatenate(images)),
        "labels": np.concatenate(labels).astype(np.int32),
    }


def _mnist(image_file: Path, label_file: Path, count: int) -> Examples:
    images, labels = read_idx(image_file), read_idx(label_file)
    for file, array, shape in (
        (image_file, images, (count, 28, 28)),
        (label_file, labels, (count,)),
    ):
        if array.shape != shape:
            raise DataError(f"{file} holds an array of shape {array.shape} instead of {shape}")
    if (highest := labels.max()) > 9:
        raise DataError(f"{label_file} holds the label {highest}; it is no file of MNIST's")
    return {"images": images[..., None], "labels": labels.astype(np.int32)}
