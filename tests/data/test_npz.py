"""Arrays in .npz files."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fdml.data import load, npz
from fdml.errors import InputError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (40, 6, 7, 3), dtype=np.uint8)
Y = np.arange(40) % 4
GOOD: dict[str, Any] = {"x_train": X, "y_train": Y, "x_test": X[:8], "y_test": Y[:8]}


def write(path: Path, **arrays: Any) -> str:
    np.savez(path / "set.npz", **arrays)
    return f"npz:{path / 'set.npz'}"


def pixels_of(data: Any, name: str) -> set[bytes]:
    return {image.numpy().tobytes() for image in getattr(data, name).head(100).images}


@pytest.mark.parametrize(
    ("images", "shape"),
    [
        (X, (3, 6, 7)),
        (X.transpose(0, 3, 1, 2), (3, 6, 7)),
        (X[..., 0], (1, 6, 7)),
        (X[..., :1], (1, 6, 7)),
        ((X / 255).astype(np.float32), (3, 6, 7)),
        ((X / 255).astype(np.float16), (3, 6, 7)),
    ],
)
def test_layouts(tmp_path: Path, images: np.ndarray, shape: tuple[int, int, int]) -> None:
    data = load(write(tmp_path, x_train=images, y_train=Y[:, None], x_test=images[:8], y_test=Y[:8]), val_fraction=0.2)
    assert data.input == shape
    assert data.classes == ("0", "1", "2", "3")
    assert [len(part) for part in (data.train, data.val, data.test)] == [32, 8, 8]
    if shape[0] == 3:
        assert pixels_of(data, "test") == {np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes() for image in X[:8]}


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (("x", "y"), [29, 3, 8]),
        (("image", "label"), [29, 3, 8]),
        (("images", "labels"), [29, 3, 8]),
        (("train_images", "train_labels", "val_images", "val_labels"), [32, 40, 8]),
    ],
)
def test_names_in_use(tmp_path: Path, names: tuple[str, ...], sizes: list[int]) -> None:
    arrays = {name: X if i % 2 == 0 else Y for i, name in enumerate(names)}
    data = load(write(tmp_path, **arrays, other=np.zeros(3)))
    assert [len(part) for part in (data.train, data.val, data.test)] == sizes


def test_class_names(tmp_path: Path) -> None:
    data = load(write(tmp_path, **GOOD, classes=np.array(["ant", "bee", "cat", "dog", "emu"])))
    assert data.classes == ("ant", "bee", "cat", "dog", "emu")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_train": X / 254}, "goes from 0 to 1.00394; float images lie in"),
        ({"x_train": X.astype(float)}, "divide by 255"),
        ({"x_train": X / 255 - 0.5}, "goes from -0.5"),
        ({"x_train": np.full(X.shape, np.nan)}, "goes from nan"),
        ({"x_train": X.astype(np.int64)}, "x_train is int64"),
        ({"x_train": X[:, :, :, :2]}, "40x6x7x2, which has neither 1 nor 3 channels"),
        ({"x_train": X[:, :3]}, "40x3x7x3, which could have its channels first or last"),
        ({"x_train": X.reshape(40, -1)}, "40x126; images are"),
        ({"x_train": X[:, :0]}, "sides go from 1"),
        ({"x_train": np.zeros((1, 1025, 2), np.uint8), "y_train": Y[1:2]}, "sides go from 1 to 1024"),
        ({"x_test": X[:8, :5]}, "train images are"),
        ({"y_train": Y[:39]}, "x_train, y_train: 40 images but 39 labels"),
        ({"y_train": Y.astype(float)}, "y_train is float64"),
        ({"y_train": np.eye(40, dtype=int)}, "labels are integers, one an image"),
        ({"y_train": Y - 1}, "label -1 is out of range"),
        ({"y_train": Y * 0}, "at least two classes"),
        ({"y_train": Y * 10**9}, "the highest label is 3000000000"),
        ({"y_test": Y[:8] + 1}, "x_test, y_test: label 4 is out of range; labels go from 0 to 3"),
        ({"x_test": X[:0], "y_test": Y[:0]}, "x_test, y_test: no images"),
        ({"y_test": None}, "has x_test without y_test"),
        ({"x_train": None}, "needs x_train and y_train, or x and y; has y_train, x_test, y_test"),
        ({"classes": np.array(["a", "b"])}, "label 3 is out of range"),
        ({"classes": np.arange(4)}, "classes must be a list"),
        ({"classes": np.array(["a", None], dtype=object)}, "classes.npy holds Python objects"),
        ({"x_train": np.array([X, None], dtype=object)}, "x_train.npy holds Python objects"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    name = write(tmp_path, **{key: value for key, value in (GOOD | change).items() if value is not None})
    with pytest.raises(InputError, match=says) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def npy(shape: tuple[int, ...], content: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue() + content


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        (b"not a zip", "not a readable .npz file"),
        ({"x_train.npy": npy((10**6, 10**4, 10**4, 3))}, "announces 300,000,000,000,000 bytes, has 0"),
        ({"x_train.npy": npy((2, 2), b"abc")}, "announces 4 bytes, has 3"),
        ({"x_train.npy": b"\x93NUMPY\x07\x00"}, "unknown version"),
        ({"x_train.npy": b"\x93NUMPY\x01\x00\xff\xff"}, "not a readable .npz file"),
        ({"x_train.npy": b""}, "not a readable .npz file"),
        ({"x_train.npy": npy((-1,), b"")}, "announces -1 bytes"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes | dict[str, bytes] | None, says: str) -> None:
    path = tmp_path / "set.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, member in content.items():
                archive.writestr(name, member)
    with pytest.raises(InputError, match=says) as caught:
        load(f"npz:{path}")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "MAX_BYTES", 1 << 16)
    with pytest.raises(InputError, match="of arrays; use a folder"):
        load(write(tmp_path, x=np.zeros((100, 30, 30), np.uint8), y=np.arange(100)))


def test_a_damaged_member(tmp_path: Path) -> None:
    name = write(tmp_path, **GOOD)
    path = tmp_path / "set.npz"
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    with pytest.raises(InputError, match="Bad CRC-32"):
        load(name)


def test_the_same_file_gives_the_same_order(tmp_path: Path) -> None:
    one, two = (load(write(tmp_path, **GOOD)) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert torch.equal(one.train.labels, two.train.labels)
