"""The 1,797 handwritten digits of 8x8 pixels that ship with scikit-learn."""

import numpy as np

from experiments.datasets import Data, DataError, Examples


def digits() -> Data:
    """Images (n, 8, 8, 1), float32 in [0, 1], and labels (n,), int32.

    A fifth of every class is held out: 1,437 images to train on, 360 to test on. The
    split is always the same.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (1998),
    https://doi.org/10.24432/C50P49, test part.

    Raises:
      DataError: if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection  # noqa: PLC0415 - no other data set needs it
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn: pip install '.[experiments]' in a clone of wnjax"
        ) from error
    bunch = datasets.load_digits()
    sides = model_selection.train_test_split(
        np.arange(len(bunch.target)), test_size=0.2, stratify=bunch.target, random_state=0
    )

    def split(rows: np.ndarray) -> Examples:
        images = (bunch.images[rows, :, :, None] / 16).astype(np.float32)
        return {"images": images, "labels": bunch.target[rows].astype(np.int32)}

    return Data(*map(split, sides))
