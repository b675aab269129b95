"""SVHN's MATLAB files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import empty_machine  # noqa: F401
from scipy.io import savemat

from fdml.data import load
from fdml.errors import InputError


def pixels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3, n), dtype=np.uint8)


def write(folder: Path, n: int = 30) -> Path:
    labels = (np.arange(n, dtype=np.uint8) % 10 + 1)[:, None]
    savemat(folder / "train_32x32.mat", {"X": pixels(n), "y": labels}, do_compression=True)
    savemat(folder / "test_32x32.mat", {"X": pixels(n, 1), "y": labels})
    return folder


def test_label_ten_means_zero(tmp_path: Path) -> None:
    data = load("svhn", data_dir=write(tmp_path), val_fraction=0.34)
    assert data.input == (3, 32, 32)
    assert data.classes == tuple("0123456789")
    assert data.test.labels.tolist() == [(i + 1) % 10 for i in range(30)]
    expected = torch.from_numpy(np.ascontiguousarray(pixels(30, 1).transpose(3, 2, 0, 1)))
    assert torch.equal(data.test.head(30).images, expected)


Y = np.ones((30, 1), np.uint8)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a readable MATLAB file"),
        (b"noise" * 100, "not a readable MATLAB file"),
        ({"X": pixels(30)}, "needs X and y, has X"),
        ({"y": Y}, "needs X and y, has y"),
        ({"X": pixels(30)[:31], "y": Y}, "got uint8 31x32x3x30"),
        ({"X": pixels(30).astype(float), "y": Y}, "got double 32x32x3x30"),
        ({"X": pixels(29), "y": Y}, "29 images but labels y of shape 30x1"),
        ({"X": pixels(30), "y": Y * 11}, "label 11 is out of range"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes | dict[str, np.ndarray], says: str) -> None:
    path = write(tmp_path) / "test_32x32.mat"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        savemat(path, content)
    with pytest.raises(InputError, match=says) as caught:
        load("svhn", data_dir=tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "missing", "says"),
    [
        ("train_32x32.mat", 5_000, "train_32x32.mat: needs X and y, has X; it may be cut short"),
        ("test_32x32.mat", 5_000, "test_32x32.mat: needs X and y, has X; it may be cut short"),
        ("train_32x32.mat", 5, "train_32x32.mat: not a readable MATLAB file"),
        ("test_32x32.mat", 5, "test_32x32.mat: not a readable MATLAB file"),
    ],
)
def test_truncated_files_are_named(tmp_path: Path, file: str, missing: int, says: str) -> None:
    path = write(tmp_path) / file
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(InputError, match=says):
        load("svhn", data_dir=tmp_path)
