"""From what a file holds to train, val and test: the cuts, the checks on labels, the fingerprint."""

import hashlib
import random
from collections.abc import Sized
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from fdml.data.dataset import Arrays, DataSet, Split
from fdml.errors import InputError

SEED = 2026
TEST_FRACTION = 0.2


@dataclass(frozen=True, eq=False)
class Parts:
    """What a reader found. A split that is ``None`` is cut from ``train``.

    ``shuffle``: the images come sorted (by class, say), so each split is put in a fixed random order, which makes the
    first images of a split a fair sample of it. The well-known sets keep their order, so an index means the same there
    as in the literature.
    """

    classes: tuple[str, ...]
    train: Split
    test: Split | None = None
    val: Split | None = None
    shuffle: bool = False


def assemble(name: str, parts: Parts, val_fraction: float) -> DataSet:
    """The data set: missing splits cut from train (test first, a fifth; then val), everything by fixed seeds."""
    train, val, test = parts.train, parts.val, parts.test
    for part in (val, test):
        if part is not None and part.shape != train.shape:
            raise InputError(f"{name}: train images are {train.shape}, others {part.shape} (channels, height, width)")
    if parts.shuffle:
        train = train.take(_shuffled(len(train)))
        val = val.take(_shuffled(len(val))) if val is not None else None
        test = test.take(_shuffled(len(test))) if test is not None else None
    if test is None:
        train, test = _cut(name, train, TEST_FRACTION)
    if val is None:
        train, val = _cut(name, train, val_fraction)
    for kind, part in (("train", train), ("val", val), ("test", test)):
        if not len(part):
            raise InputError(f"{name}: no images in {kind}")
    return DataSet(name, parts.classes, train, val, test, fingerprint(train, val, test))


def arrays(images: np.ndarray, labels: np.ndarray, classes: int, where: str) -> Arrays:
    """A split of uint8 images (n, c, h, w) and integer labels (n,). Raises ``InputError`` as ``check`` does."""
    check(images, labels, classes, where)
    # Copied where it is a view (which would keep a whole file's bytes alive) or read-only (which torch warns of).
    owned = np.require(images, requirements=["C", "W", "O"])
    return Arrays(torch.from_numpy(owned), torch.from_numpy(np.array(labels, dtype=np.int64)))


def check(images: Sized, labels: np.ndarray, classes: int, where: str) -> None:
    """Raises ``InputError`` that begins with ``where`` for no images, a count that differs, a label out of range."""
    if len(images) != len(labels):
        raise InputError(f"{where}: {len(images)} images but {len(labels)} labels")
    if not len(images):
        raise InputError(f"{where}: no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"{where}: label {low if low < 0 else high} is out of range; labels go from 0 to {classes - 1}"
        )


def stratified(
    labels: Int64[Tensor, " n"], count: int, seed: int = SEED
) -> tuple[Int64[Tensor, " rest"], Int64[Tensor, " cut"]]:
    """Places to keep and ``count`` places to cut, both ascending: drawn at random within each class.

    Each class gives in proportion to its size (largest remainders), and keeps at least one image.
    Raises ``ValueError`` when there are not ``count`` images to give.
    """
    labels = labels.cpu()
    sizes = torch.bincount(labels).tolist()
    total = sum(sizes)
    if not 0 <= count <= total - sum(size > 0 for size in sizes):
        raise ValueError(f"cannot cut {count} of {total} images and keep one a class")
    wanted = [count * size / total for size in sizes]
    share = [min(int(part), max(size - 1, 0)) for part, size in zip(wanted, sizes, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda k: (share[k] - wanted[k], k))
    while (missing := count - sum(share)) > 0:
        for k in [k for k in by_remainder if share[k] < sizes[k] - 1][:missing]:
            share[k] += 1
    order = _shuffled(len(labels), seed)
    chosen = [order[labels[order] == k][:n] for k, n in enumerate(share)]
    cut = torch.zeros(len(labels), dtype=torch.bool)
    cut[torch.cat(chosen)] = True
    return (~cut).nonzero()[:, 0], cut.nonzero()[:, 0]


def fingerprint(*splits: Split) -> str:
    """SHA-256 in hex over the splits in their order.

    ``Arrays``: shape, bytes of the images and labels. ``Files``: the sorted (name, encoded size in bytes, label), which
    is known without reading an image; the name is the path in a folder, the split and row in a data set of the hub.
    """
    digest = hashlib.sha256()
    for split in splits:
        if isinstance(split, Arrays):
            digest.update(f"{tuple(split.images.shape)}".encode())
            digest.update(split.images.cpu().contiguous().numpy().data)
            digest.update(split.labels.cpu().numpy().astype("<i8").data)
            continue
        for (name, size), label in sorted(zip(split.sources.listed(), split.labels.tolist(), strict=True)):
            digest.update(f"{name}\0{size}\0{label}\n".encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _cut(name: str, split: Split, fraction: float) -> tuple[Split, Split]:
    count = max(1, round(fraction * len(split)))
    try:
        rest, cut = stratified(split.labels, count)
    except ValueError as error:
        raise InputError(f"{name}: too few images to cut a validation or test split ({error})") from error
    return split.take(rest), split.take(cut)


def _shuffled(count: int, seed: int = SEED) -> Int64[Tensor, " n"]:
    # Python promises that `random.Random(seed).random()` never changes; numpy and torch promise no such thing.
    draw = random.Random(seed).random
    return torch.from_numpy(np.argsort([draw() for _ in range(count)], kind="stable"))
