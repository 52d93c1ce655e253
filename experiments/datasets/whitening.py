"""ZCA whitening: images whose pixels are uncorrelated, and as near the originals as can be."""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from experiments.logs import log

EPSILON = 1e-5  # added to the variances, of pixels between -1 and 1


class Whitening(NamedTuple):
    """x -> (x - mean) @ matrix, for flattened images with pixels between -1 and 1."""

    mean: np.ndarray  # (pixels,)
    matrix: np.ndarray  # (pixels, pixels), symmetric

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Whitened float32 images of uint8 images (n, ...)."""
        out = np.empty(images.shape, np.float32)
        for i in range(0, len(images), 10_000):  # as float32 they are four times as large
            part = _flat(images[i : i + 10_000]) - self.mean
            out[i : i + 10_000] = (part @ self.matrix).reshape(-1, *images.shape[1:])
        return out


def fit(images: np.ndarray) -> Whitening:
    """The whitening of images (n, ...): matrix = U diag(1 / sqrt(s + 1e-5)) Uᵀ.

    Here U diag(s) Uᵀ is the covariance of the pixels.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009), appendix A,
    with the constant of Salimans & Kingma's code.
    """
    mean = np.zeros(images[0].size)
    products = np.zeros((mean.size, mean.size))
    for i in range(0, len(images), 10_000):
        part = _flat(images[i : i + 10_000])
        mean += part.sum(axis=0, dtype=np.float64)
        products += (part.T @ part).astype(np.float64)
    mean /= len(images)
    variances, vectors = np.linalg.eigh(products / len(images) - np.outer(mean, mean))
    scale = 1 / np.sqrt(np.maximum(variances, 0) + EPSILON)
    matrix = (vectors * scale) @ vectors.T
    return Whitening(mean.astype(np.float32), matrix.astype(np.float32))


def fit_once(images: np.ndarray, folder: Path) -> Whitening:
    """`fit`, kept in a file in `folder` whose name tells the images that it belongs to."""
    digest = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()[:16]
    file = folder / f"whitening-{digest}.npz"
    if os.path.isfile(file):
        try:
            with file.open("rb") as opened, np.load(opened) as arrays:
                return Whitening(arrays["mean"], arrays["matrix"])
        except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error) as error:
            log.warning("%s cannot be read, and the whitening is fitted again: %r", file, error)
    log.info("fitting the whitening to %d images, once: %s", len(images), file)
    whitening = fit(images)
    part = file.with_suffix(".part.npz")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(part, **whitening._asdict())
        part.replace(file)  # whole, or not there
    except OSError as error:  # of a folder that others may only read, say
        log.info("it cannot be kept for the next time: %s", error)
    return whitening


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1
