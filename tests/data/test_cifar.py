"""CIFAR-10 and CIFAR-100, both versions, and pickles that mean harm."""

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import empty_machine  # noqa: F401

from fdml.data import load
from fdml.data.cifar import CLASSES, PIXELS, unpickle
from fdml.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
N = 120  # images a file


def table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (N, PIXELS), dtype=np.uint8)


def write_binary(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for seed, file in enumerate(files if name == "cifar10" else ["train.bin", "test.bin"]):
        fine = np.arange(N, dtype=np.uint8)[:, None] % len(CLASSES[name])
        prefix = fine if name == "cifar10" else np.concatenate([np.full_like(fine, 19), fine], axis=1)
        (folder / file).write_bytes(np.concatenate([prefix, table(seed)], axis=1).tobytes())
    return folder


def write_python(folder: Path, name: str, protocol: int = 2, text: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for seed, file in enumerate(files if name == "cifar10" else ["train", "test"]):
        labels = [i % len(CLASSES[name]) for i in range(N)]
        batch = {"data": table(seed), "labels" if name == "cifar10" else "fine_labels": labels, "filenames": ["a"] * N}
        content = batch if text else {key.encode(): value for key, value in batch.items()}
        (folder / file).write_bytes(pickle.dumps(content, protocol))
    return folder


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_both_versions_hold_the_same(tmp_path: Path, name: str) -> None:
    folder = "cifar-10" if name == "cifar10" else "cifar-100"
    write_binary(tmp_path / "one" / f"{folder}{'-batches-bin' if name == 'cifar10' else '-binary'}", name)
    binary = load(name, data_dir=tmp_path / "one", val_fraction=0.1)
    assert binary.input == (3, 32, 32)
    assert len(binary.classes) == len(set(binary.classes)) == (10 if name == "cifar10" else 100)
    assert len(binary.train) + len(binary.val) == N * (5 if name == "cifar10" else 1)
    last = 5 if name == "cifar10" else 1
    assert torch.equal(binary.test.head(N).images.flatten(1), torch.from_numpy(table(last)))
    assert binary.test.labels.tolist() == [i % len(CLASSES[name]) for i in range(N)]
    for i, (protocol, text) in enumerate([(2, False), (2, True), (3, False), (4, True)]):
        write_python(
            tmp_path / str(i) / f"{folder}{'-batches-py' if name == 'cifar10' else '-python'}", name, protocol, text
        )
        assert load(name, data_dir=tmp_path / str(i), val_fraction=0.1).fingerprint == binary.fingerprint


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """As the original archives have them: strings are bytes there, and so is the array's content."""
    pixels = table(0)[:1].tobytes()
    content = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89T\x00\x0c\x00\x00" + pixels + b"tbU\x06labelsq\x08]q\x09K\x06au."
    )
    batch = unpickle(content, tmp_path / "data_batch_1")
    assert isinstance(batch, dict)
    assert batch[b"labels"] == [6]
    assert batch[b"data"].tobytes() == pixels


class Harm:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call[0], self.call[1:]


HARM = {
    "a command": lambda marker: pickle.dumps({"data": Harm(os.system, f"touch {marker}")}, 2),
    "a process": lambda marker: pickle.dumps(Harm(subprocess.check_call, ["touch", marker])),
    "eval": lambda marker: pickle.dumps(Harm(eval, f"open({marker!r}, 'w')"), 4),
    "old opcodes": lambda marker: b"(S'touch " + marker.encode() + b"'\nios\nsystem\n.",
    "an extension": lambda _: b"\x80\x02\x82\x01.",
    "a persistent id": lambda _: b"Psomething\n.",
    "getattr": lambda marker: pickle.dumps(Harm(getattr, np.ndarray, "tofile"), 4),
    "a float array": lambda _: pickle.dumps({"data": np.zeros(3)}),
    "an object array": lambda _: pickle.dumps({"data": np.array([{}], dtype=object)}),
    "a scalar": lambda _: pickle.dumps(np.uint8(3)),
    "another encoding": lambda _: b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
    "attributes of a function": lambda _: b"\x80\x02c_codecs\nencode\n}X\x09\x00\x00\x00_functionK\x00sb.",
    "a huge array": lambda _: b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L99999999999L\ntS'b'\ntR.",
    "a huge memo": lambda _: b"\x80\x02K\x00r\xff\xff\xff\x7f.",
    "a huge string": lambda _: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"abc.",
    "a wrong length": lambda _: pickle.dumps({"data": np.zeros(9, np.uint8)}, 2).replace(b"\x85q", b"\x86q", 1),
    "nothing": lambda _: b"",
    "noise": lambda _: bytes(range(256)),
    "a cut": lambda _: pickle.dumps({"data": np.zeros(999, np.uint8)}, 2)[:-300],
}


@pytest.mark.parametrize("what", HARM)
def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path: Path, what: str) -> None:
    marker = tmp_path / "marker"
    write_python(tmp_path, "cifar10")
    (tmp_path / "data_batch_3").write_bytes(HARM[what](str(marker)))
    with pytest.raises(InputError, match="data_batch_3: refused") as caught:
        load("cifar10", data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert np.dtype(np.uint8) == np.dtype("u1")


def test_the_hostile_pickle_would_have_worked(tmp_path: Path) -> None:
    """So that the test above shows something."""
    pickle.loads(HARM["a command"](str(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ([1, 2], "holds a list"),
        ({}, "'data' is not a uint8 array"),
        ({"data": np.zeros((2, 5), np.uint8), "labels": [1, 2]}, "n x 3072"),
        ({"data": np.zeros((2, PIXELS), np.uint8)}, "labels are not a list"),
        ({"data": np.zeros((2, PIXELS), np.uint8), "labels": [1, -1]}, "list of small numbers"),
        ({"data": np.zeros((2, PIXELS), np.uint8), "labels": [1, 10]}, "data_batch_2: label 10 is out of range"),
        ({"data": np.zeros((2, PIXELS), np.uint8), "labels": [1]}, "data_batch_2: 2 images but 1 labels"),
    ],
)
def test_batches_that_do_not_fit(tmp_path: Path, batch: object, says: str) -> None:
    write_python(tmp_path, "cifar10")
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(InputError, match=says):
        load("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes are not a whole number of 3073-byte records"),
        (bytes(3072), "3,072 bytes are not"),
        (bytes(3073) + b"x", "3,074 bytes are not"),
        (b"\x0a" + bytes(3072), "label 10 is out of range; labels go from 0 to 9"),
    ],
)
def test_damaged_binaries_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    write_binary(tmp_path, "cifar10")
    (tmp_path / "data_batch_4.bin").write_bytes(content)
    with pytest.raises(InputError, match=f"data_batch_4.bin: {says}"):
        load("cifar10", data_dir=tmp_path)


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    write_binary(tmp_path, "cifar10")
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(InputError, match=r"has no data_batch_4\.bin"):
        load("cifar10", data_dir=tmp_path, download=False)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="the real files are not beside this checkout")
def test_the_real_cifar10(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SHARED / "cifar10" / "unpack.py", tmp_path], check=True)
    data = load("cifar10", data_dir=tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test)] == [45_000, 5_000, 10_000]
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=2e-3)
    assert torch.bincount(data.val.labels).tolist() == [500] * 10
