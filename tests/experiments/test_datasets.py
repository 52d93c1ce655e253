"""The data sets: read as they are published, checked, whitened; and the order of batches."""

import functools
import gzip
import hashlib
import http.server
import tarfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.datasets import DataError, published, whitening
from experiments.datasets.batches import batch_indices
from experiments.datasets.digits import digits
from experiments.datasets.published import MNIST, Download, cifar10, mnist
from experiments.datasets.text import python_sources
from tests.experiments.conftest import write_idx


def test_digits_are_whole_and_split_by_class():
    data = digits()
    assert data.train["images"].shape == (1437, 8, 8, 1)
    assert data.test["images"].shape == (360, 8, 8, 1)
    assert (data.train["images"].dtype, data.train["labels"].dtype) == (jnp.float32, jnp.int32)
    assert (data.train["images"].min(), data.train["images"].max()) == (0, 1)
    assert np.bincount(data.test["labels"]).min() >= 34
    together = np.concatenate([split["images"].reshape(-1, 64) for split in data[:2]])
    assert len(np.unique(together, axis=0)) == 1797  # no image is on both sides


def test_an_epoch_visits_every_example_once():
    batches = batch_indices(jax.random.key(0), jnp.int32(0), steps=10, batch=4, n=22)
    first, second = batches[:5].ravel(), batches[5:].ravel()
    for epoch in (first, second):
        assert len(np.unique(epoch)) == 20
        assert epoch.min() >= 0
        assert epoch.max() < 22
    assert (first != second).any()


@pytest.mark.parametrize("call", [1, 3, 5, 7, 12, 21])
def test_steps_per_call_do_not_matter(call):
    def order(call):
        starts = jnp.arange(0, 21, call, dtype=jnp.int32)
        parts = [batch_indices(jax.random.key(1), start, call, 4, 22) for start in starts]
        return np.concatenate(parts)[:21]

    np.testing.assert_array_equal(order(call), order(21))


def test_cifar10_planes_become_channels(data_dir):
    data = cifar10(data_dir)
    assert data.train["images"].shape == (50_000, 32, 32, 3)
    assert data.test["images"].shape == (10_000, 32, 32, 3)
    record = (data_dir / "cifar-10-batches-bin/data_batch_2.bin").read_bytes()[3073 * 7 :][:3073]
    assert data.train["labels"][10_007] == record[0]
    image = data.train["images"][10_007]
    # Row 2, column 5 of the green plane, which is the second of three.
    assert image[2, 5, 1] == record[1 + 1024 + 2 * 32 + 5]
    assert image[31, 0, 2] == record[1 + 2048 + 31 * 32]


def test_mnist_is_read(data_dir):
    data = mnist(data_dir)
    assert data.train["images"].shape == (60_000, 28, 28, 1)
    assert data.test["labels"].shape == (10_000,)
    content = gzip.decompress((data_dir / "mnist/t10k-images-idx3-ubyte.gz").read_bytes())
    assert data.test["images"][3, 4, 5, 0] == content[16 + 3 * 784 + 4 * 28 + 5]


def test_other_files_than_the_published_ones_are_told(data_dir, tmp_path):
    assert published.provenance(data_dir, MNIST).startswith("not the published files")
    assert published.provenance(tmp_path, MNIST) == "to be downloaded"
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    sums = {"file": hashlib.sha256(b"abc").hexdigest()}
    assert published.provenance(tmp_path, sums) == "the published files"


def test_a_truncated_batch(tmp_path):
    file = tmp_path / "data_batch_1.bin"
    file.write_bytes(bytes(3073 * 9_999))
    with pytest.raises(DataError, match=r"data_batch_1.bin has 30726927 bytes instead of 30730000"):
        published.read_cifar10(file)


def test_a_batch_with_a_wrong_label(tmp_path):
    file = tmp_path / "data_batch_1.bin"
    file.write_bytes(bytes(3073) + b"\x0a" + bytes(3072))
    with pytest.raises(DataError, match="holds the label 10; it is no file of CIFAR-10's"):
        published.read_cifar10(file, records=2)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x02ab")[:-9], "is damaged"),
        (b"no gzip", "is damaged"),
        (gzip.compress(b"\0\0\x0d\x01\0\0\0\x02ab"), "is no IDX file of bytes"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x03ab"), "has 2 values, not 3 as it says"),
        (gzip.compress(b"\0\0\x08\x03")[:5], "is damaged"),
        (gzip.compress(b"\0\0\x08\x03\0\0\0\x02\0"), "says 3 dimensions, .* has 9 bytes"),
        (gzip.compress(b"\0\0\x08\xff" + bytes(4 * 255)), "says 255 dimensions, of 1 to 3"),
        (gzip.compress(b"\0\0\x08\0ab"), "says 0 dimensions, of 1 to 3"),
        (gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12), "has 0 values, not 792281624589"),
        (b"", "is no IDX file of bytes|is damaged"),
    ],
    ids=[  # gzip's bytes hold the time of day
        *("cut off", "no gzip", "other type", "other length", "cut in gzip's header"),
        *("cut in its header", "rank 255", "rank 0", "sizes beyond 64 bits", "empty"),
    ],
)
def test_damaged_idx_files(content, text, tmp_path):
    file = tmp_path / "images.gz"
    file.write_bytes(content)
    with pytest.raises(DataError, match=text):
        published.read_idx(file)


@pytest.mark.parametrize("length", range(24))
def test_a_gzip_file_that_is_cut_anywhere(length, tmp_path):
    whole = gzip.compress(b"\0\0\x08\x01\0\0\0\x02ab", mtime=0)
    assert len(whole) > 24
    (tmp_path / "images.gz").write_bytes(whole[:length])
    with pytest.raises(DataError, match=r"images\.gz is (damaged|no IDX file)"):
        published.read_idx(tmp_path / "images.gz")


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    """A directory in place of a file, a name that is too long, and a file of somebody else."""
    (tmp_path / "images.gz").mkdir()
    for read in (published.read_idx, published.read_cifar10):
        with pytest.raises(DataError, match=r"cannot be read: .*images\.gz.*--config\.data_dir"):
            read(tmp_path / "images.gz")
    folder = tmp_path / ("x" * 300)
    assert published.provenance(folder, MNIST) == "to be downloaded"
    download = Download("http://127.0.0.1:9/digits.gz", "0", ("mnist/digits.gz",))
    with pytest.raises(DataError, match=r"cannot be had: .*File name too long"):
        published.fetch(folder, (download,))

    def refuse(file, alg):
        raise PermissionError(13, "Permission denied", str(file))

    (tmp_path / "file").write_text("")
    monkeypatch.setattr("pooch.file_hash", refuse)
    with pytest.raises(DataError, match=r"cannot be read: .*Permission denied: .*file"):
        published.provenance(tmp_path, {"file": "0"})


def test_mnist_files_of_another_count_or_label(data_dir, tmp_path):
    for file in MNIST:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).symlink_to(data_dir / file)
    labels = tmp_path / "mnist/t10k-labels-idx1-ubyte.gz"
    labels.unlink()
    write_idx(labels, np.zeros(9_999, np.uint8))
    with pytest.raises(DataError, match=r"of shape \(9999,\) instead of \(10000,\)"):
        mnist(tmp_path)
    write_idx(labels, np.full(10_000, 11, np.uint8))
    with pytest.raises(DataError, match="holds the label 11"):
        mnist(tmp_path)


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: its directory and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_file_is_downloaded_once_and_checked(server, tmp_path):
    folder, address = server
    (folder / "digits.gz").write_bytes(b"content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    download = Download(f"{address}/digits.gz", sha256, ("mnist/digits.gz",))
    published.fetch(tmp_path / "data", (download,))
    assert (tmp_path / "data/mnist/digits.gz").read_bytes() == b"content"
    (folder / "digits.gz").unlink()
    published.fetch(tmp_path / "data", (download,))  # asks for nothing


def test_an_archive_is_unpacked(server, tmp_path):
    folder, address = server
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "batch.bin").write_bytes(b"records")
    with tarfile.open(folder / "all.tar.gz", "w:gz") as tar:
        tar.add(inner, "cifar")
    sha256 = hashlib.sha256((folder / "all.tar.gz").read_bytes()).hexdigest()
    download = Download(f"{address}/all.tar.gz", sha256, ("cifar/batch.bin",), archive=True)
    published.fetch(tmp_path / "data", (download,))
    assert (tmp_path / "data/cifar/batch.bin").read_bytes() == b"records"


@pytest.mark.parametrize("problem", ["wrong sum", "no such file", "no network"])
def test_what_cannot_be_had(problem, server, tmp_path):
    folder, address = server
    (folder / "digits.gz").write_bytes(b"other content")
    url = {
        "wrong sum": f"{address}/digits.gz",
        "no such file": f"{address}/none.gz",
        "no network": "http://127.0.0.1:9/digits.gz",
    }[problem]
    download = Download(url, hashlib.sha256(b"content").hexdigest(), ("mnist/digits.gz",))
    with pytest.raises(DataError, match=r"cannot be had: .*--config\.data_dir: .*mnist/digits\.gz"):
        published.fetch(tmp_path / "data", (download,))
    assert not list((tmp_path / "data").rglob("*.gz"))


def test_whitened_pixels_are_uncorrelated(tmp_path):
    random = np.random.default_rng(0)
    smooth = random.normal(size=(12_000, 4, 4, 1)).cumsum(1).cumsum(2)
    images = np.clip(smooth * 8 + 128, 0, 255).astype(np.uint8)
    found = whitening.fit(images)
    flat = found(images).reshape(len(images), -1)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(flat.T @ flat / len(flat), np.eye(16), atol=0.02)
    np.testing.assert_allclose(found.matrix, found.matrix.T, atol=1e-4)
    assert np.linalg.eigvalsh(found.matrix).min() > 0  # no axis is turned round: "zero phase"
    once = whitening.fit_once(images, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    again = whitening.fit_once(images, tmp_path)
    np.testing.assert_array_equal(once.matrix, again.matrix)
    np.testing.assert_array_equal(once.matrix, found.matrix)
    whitening.fit_once(255 - images, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # other images, another file


def test_whitening_that_cannot_be_kept_is_fitted_all_the_same(tmp_path, caplog):
    file = tmp_path / "file"
    file.touch()
    images = np.arange(48, dtype=np.uint8).reshape(6, 2, 2, 2)
    with caplog.at_level("INFO"):
        found = whitening.fit_once(images, file / "folder")
    np.testing.assert_array_equal(found.matrix, whitening.fit(images).matrix)
    assert "it cannot be kept for the next time: " in caplog.text


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(40)])
def test_whitening_that_is_damaged_is_fitted_again(content, tmp_path, caplog):
    images = np.arange(48, dtype=np.uint8).reshape(6, 2, 2, 2)
    whole = whitening.fit_once(images, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    again = whitening.fit_once(images, tmp_path)
    np.testing.assert_array_equal(again.matrix, whole.matrix)
    assert f"{file} cannot be read, and the whitening is fitted again" in caplog.text
    with np.load(file) as arrays:
        np.testing.assert_array_equal(arrays["matrix"], whole.matrix)


def test_text_is_cut_into_pieces_that_overlap_by_a_byte(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.py").write_bytes(bytes(range(10 * i, 10 * i + 10)))
    data = python_sources(4, tmp_path)
    assert data.train["tokens"].tolist()[:2] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert len(data.train["tokens"]) == 22  # (90 - 1) // 4
    assert data.test["tokens"].tolist() == [[90, 91, 92, 93, 94], [94, 95, 96, 97, 98]]


def test_the_standard_library_is_there():
    data = python_sources(128)
    assert len(data.train["tokens"]) > 10_000
    assert b"import" in data.test["tokens"].tobytes()


def test_too_little_text(tmp_path):
    with pytest.raises(DataError, match="has 0 Python files; at least 10"):
        python_sources(4, tmp_path)
    for i in range(10):
        (tmp_path / f"{i}.py").write_text("x")
    with pytest.raises(DataError, match="has 9 bytes of text, fewer than a sequence"):
        python_sources(64, tmp_path)
