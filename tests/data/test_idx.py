"""IDX files: MNIST and Fashion-MNIST."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import empty_machine  # noqa: F401

from fdml.data import idx, load
from fdml.data.idx import FILES, read_array
from fdml.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def header(*shape: int) -> bytes:
    return bytes((0, 0, 8, len(shape))) + b"".join(side.to_bytes(4, "big") for side in shape)


def write(folder: Path, *, packed: bool = True, train: int = 40, test: int = 20, labels: int | None = None) -> Path:
    """A whole data set of random pixels; ``labels`` overrides how many training labels there are."""
    rng = np.random.default_rng(0)
    for file, count in zip(FILES, (train, train if labels is None else labels, test, test), strict=True):
        if "images" in file:
            content = header(count, 28, 28) + rng.integers(0, 256, count * 784, dtype=np.uint8).tobytes()
        else:
            content = header(count) + bytes(i % 10 for i in range(count))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (f"{file}.gz" if packed else file)
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return folder


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("packed", [True, False])
def test_reads_both_forms(tmp_path: Path, name: str, packed: bool) -> None:
    data = load(name, data_dir=write(tmp_path, packed=packed), val_fraction=0.25)
    assert [len(part) for part in (data.train, data.val, data.test)] == [30, 10, 20]
    assert data.input == (1, 28, 28)
    assert len(data.classes) == 10
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]
    name = FILES[2] + (".gz" if packed else "")
    content = (tmp_path / name).read_bytes()
    pixels = np.frombuffer(gzip.decompress(content) if packed else content, np.uint8)[16:]
    assert torch.equal(data.test.head(20).images.flatten(), torch.from_numpy(pixels.copy()))


ONE = header(2, 28, 28) + bytes(2 * 784)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "begins , not 00000803"),
        (b"\x89PNG and so on", "begins 89504e47"),
        (bytes((0, 0, 8, 1)) + ONE[4:], "begins 00000801, not 00000803"),
        (bytes((0, 0, 13, 3)) + ONE[4:], "begins 00000d03"),
        (ONE[:9], "ends inside its header"),
        (ONE[:-1], "announces 1,568 bytes but has only 1,567"),
        (ONE + b"x", "announces 1,568 bytes but has more"),
        (header(2**32 - 1, 2**32 - 1, 2**32 - 1), "more than 1 GiB"),
        (header(60_000, 28, 28), "announces 47,040,000 bytes but has only 0"),
        (gzip.compress(ONE, mtime=0)[:-9], "truncated or damaged gzip"),
        (gzip.compress(ONE, mtime=0)[:-8] + bytes(8), "truncated or damaged gzip"),
        (gzip.compress(ONE[:-1], mtime=0), "only 1,567"),
        (gzip.compress(ONE + bytes(10_000_000), mtime=0), "has more"),
        (b"\x1f\x8b\x08\x00" + b"\xff" * 40, "truncated or damaged gzip"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_array(path, 3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (FILES[0], header(40, 27, 28) + bytes(40 * 27 * 28), "images are 27x28, expected 28x28"),
        (FILES[1], header(39) + bytes(39), "40 images but 39 labels"),
        (FILES[3], header(20) + bytes(19) + b"\x0a", "label 10 is out of range"),
        (FILES[2], header(0, 28, 28), "0 images but 20 labels"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, file: str, content: bytes, says: str) -> None:
    write(tmp_path, packed=False)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=says):
        load("mnist", data_dir=tmp_path)


def test_no_images_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images"):
        load("mnist", data_dir=write(tmp_path, test=0))


def test_size_is_not_for_fixed_sets(tmp_path: Path) -> None:
    write(tmp_path)
    assert load("mnist", data_dir=tmp_path, size=28).input == (1, 28, 28)
    with pytest.raises(InputError, match="mnist is 28x28"):
        load("mnist", data_dir=tmp_path, size=32)


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="the real files are not beside this checkout")
def test_the_real_test_files(tmp_path: Path) -> None:
    """The real test images with made-up training ones, which keeps this fast."""
    for name, first in (("mnist", [7, 2, 1, 0, 4]), ("fashion-mnist", [9, 2, 1, 1, 6])):
        folder = write(tmp_path / name)
        for file in FILES[2:]:
            (folder / f"{file}.gz").write_bytes((SHARED / name / f"{file}.gz").read_bytes())
        test = load(name, data_dir=tmp_path).test
        assert len(test) == 10_000
        assert test.labels[:5].tolist() == first
    # shared file names: only the content of the training labels tells the two sets apart
    for file in FILES[:2]:
        (folder / f"{file}.gz").write_bytes((SHARED / "mnist" / f"{file}.gz").read_bytes())
    with pytest.raises(InputError, match="these are the files of mnist, not of fashion-mnist"):
        load("fashion-mnist", data_dir=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="the real files are not beside this checkout")
def test_the_real_mnist_statistics() -> None:
    data = load("mnist", data_dir=SHARED)
    assert [len(part) for part in (data.train, data.val, data.test)] == [54_000, 6_000, 10_000]
    assert data.mean == pytest.approx((0.1307,), abs=1e-3)
    assert data.std == pytest.approx((0.3081,), abs=1e-3)


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="the real files are not beside this checkout")
def test_checksums_are_those_of_the_real_files() -> None:
    import hashlib

    for name, checksums in idx._CHECKSUMS.items():
        for file, (size, sha256) in zip(FILES, checksums, strict=True):
            content = (SHARED / name / f"{file}.gz").read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)
