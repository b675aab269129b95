"""Extra training images: what is joined, what is refused, and in which order a mixed epoch goes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fdml.data import npz
from fdml.data.dataset import Arrays, DataSet, Files, channel_statistics
from fdml.data.extra import epoch_order, extend
from fdml.data.folder import Paths
from fdml.data.splits import Parts, assemble
from fdml.errors import InputError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 6, 7, 3), dtype=np.uint8)
LABELS = np.arange(30) % 4


def own(classes: tuple[str, ...] = tuple("abcd")) -> DataSet:
    images = torch.from_numpy(RNG.integers(0, 128, (40, 3, 6, 7), dtype=np.uint8))
    return assemble("made up", Parts(classes, Arrays(images, torch.arange(40) % 4)), 0.25)


def write(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "extra.npz", **arrays)
    return f"npz:{folder / 'extra.npz'}"


def test_the_own_images_come_first_and_everything_else_stays(tmp_path: Path) -> None:
    data = own()
    joined = extend(data, write(tmp_path, image=IMAGES, label=LABELS))
    count = len(data.train)
    assert isinstance(data.train, Arrays)
    assert isinstance(joined.train, Arrays)
    assert (data.extra, joined.extra) == (0, 30)
    assert torch.equal(joined.train.images[:count], data.train.images)
    assert torch.equal(joined.train.labels[:count], data.train.labels)
    assert torch.equal(joined.train.images[count:], torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
    assert joined.train.labels[count:].tolist() == LABELS.tolist()
    assert (joined.name, joined.classes, joined.input) == (data.name, data.classes, data.input)
    assert joined.val is data.val
    assert joined.test is data.test


def test_statistics_are_those_of_the_own_images(tmp_path: Path) -> None:
    data = own()
    joined = extend(data, write(tmp_path, image=IMAGES, label=LABELS))
    assert (joined.mean, joined.std) == (data.mean, data.std)
    assert (joined.mean, joined.std) != channel_statistics(joined.train)
    moved = joined.to("cpu")
    assert moved.extra == 30
    assert moved.mean == data.mean


def test_the_fingerprint_covers_both(tmp_path: Path) -> None:
    data, other = own(), own()
    source = write(tmp_path, image=IMAGES, label=LABELS)
    prints = [data.fingerprint, extend(data, source).fingerprint, extend(other, source).fingerprint]
    assert extend(data, source).fingerprint == prints[1]
    prints.append(extend(data, write(tmp_path, image=IMAGES ^ 1, label=LABELS)).fingerprint)
    prints.append(extend(data, write(tmp_path, image=IMAGES, label=LABELS[::-1])).fingerprint)
    assert len(set(prints)) == 5
    assert all(len(text) == 64 for text in prints)


def test_of_a_file_with_splits_only_training_is_taken(tmp_path: Path) -> None:
    source = write(tmp_path, x_train=IMAGES[:20], y_train=LABELS[:20], x_test=IMAGES[20:], y_test=LABELS[20:])
    assert extend(own(), source).extra == 20


def test_two_files_one_after_the_other(tmp_path: Path) -> None:
    data = own()
    source = write(tmp_path, image=IMAGES, label=LABELS)
    twice = extend(extend(data, source), source)
    assert twice.extra == 60
    assert len(twice.train) == len(data.train) + 60
    assert twice.mean == data.mean


def test_class_names_may_come_with_it(tmp_path: Path) -> None:
    assert extend(own(), write(tmp_path, image=IMAGES, label=LABELS, classes=np.array(list("abcd")))).extra == 30
    fewer = write(tmp_path, image=IMAGES, label=LABELS // 2)
    assert extend(own(), fewer).extra == 30


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image": IMAGES[:, :5]}, r"images are \(3, 5, 7\), must be \(3, 6, 7\) as made up has them"),
        ({"image": IMAGES[..., :1]}, r"images are \(1, 6, 7\), must be \(3, 6, 7\)"),
        ({"label": LABELS + 1}, "label 4 is out of range; made up has 0 to 3"),
        ({"label": LABELS - 1}, "label -1 is out of range"),
        ({"classes": np.array(list("abdc"))}, "classes are a, b, d, c, must be a, b, c, d"),
        ({"label": LABELS[:9]}, "30 images but 9 labels"),
    ],
)
def test_images_that_do_not_fit(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    source = write(tmp_path, **({"image": IMAGES, "label": LABELS} | change))
    with pytest.raises(InputError, match=says) as caught:
        extend(own(), source)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["", "npz:", "images.npz", "folder:images", "cifar10", "NPZ:file"])
def test_other_forms_of_source(source: str) -> None:
    with pytest.raises(InputError, match=f"extra images '{source}': write npz:FILE"):
        extend(own(), source)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"nowhere\.npz: no such file"):
        extend(own(), "npz:nowhere.npz")


def test_streamed_images_take_no_others(tmp_path: Path) -> None:
    files = Files(Paths(tmp_path, ("a.png",)), torch.tensor([0]), (3, 6, 7))
    with pytest.raises(InputError, match="pictures is streamed from disk"):
        extend(DataSet("pictures", ("a", "b"), files, files, files, "0" * 64), "npz:file.npz")


def test_the_published_files_are_within_the_limits() -> None:
    """A million images of CIFAR-10's shape, with labels of 64 bits."""
    assert npz.MAX_BYTES > 1_000_000 * (32 * 32 * 3 + 8)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("extra", "share"), [(0, 0.0), (0, 0.7), (50, 0.0)])
@pytest.mark.parametrize(("count", "batch_size"), [(100, 8), (100, 100), (7, 8)])
def test_nothing_mixed_in_is_the_plain_order(count: int, batch_size: int, extra: int, share: float) -> None:
    steps = count // batch_size
    expected = torch.randperm(count, generator=seeded())[: steps * batch_size].view(steps, batch_size)
    assert torch.equal(epoch_order(count, extra, batch_size, share, seeded()), expected)


@pytest.mark.parametrize(
    ("count", "extra", "batch_size", "share", "drawn"),
    [
        (100, 1000, 10, 0.7, 7),
        (100, 30, 10, 0.7, 7),  # 70 draws of 30
        (100, 7, 10, 0.7, 7),
        (100, 1, 10, 0.3, 3),
        (103, 50, 16, 0.5, 8),
        (100, 50, 10, 1.0, 10),
        (100, 50, 100, 0.006, 1),
        (9, 50, 10, 0.7, 7),  # fewer than a batch: no step
    ],
)
def test_a_mixed_epoch(count: int, extra: int, batch_size: int, share: float, drawn: int) -> None:
    order = epoch_order(count, extra, batch_size, share, seeded())
    steps = count // batch_size
    assert order.shape == (steps, batch_size)
    assert order.dtype == torch.int64
    assert torch.equal(order, epoch_order(count, extra, batch_size, share, seeded()))
    mixed_in = order >= count
    assert (mixed_in.sum(1) == drawn).all()
    ours, others = order[~mixed_in], order[mixed_in] - count
    assert len(ours.unique()) == len(ours)
    for run in others.split(extra):
        assert len(run.unique()) == len(run)
        assert (run < extra).all()
    if steps:
        assert not torch.equal(order, epoch_order(count, extra, batch_size, share, seeded(2)))
    if len(others) > 1 and extra > 1:
        assert others.tolist() != sorted(others.tolist())


def test_every_part_of_a_batch_has_its_share() -> None:
    """A process that takes some rows of each batch meets both kinds as often as any other."""
    mixed_in = epoch_order(640, 1000, 64, 0.7, seeded()) >= 640
    for size in (2, 4, 8, 16):
        parts = mixed_in.view(10, 64 // size, size).sum(2)
        assert parts.max() - parts.min() <= 1


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(InputError, match=f"must be from 0 to 1, got {share:g}"):
        epoch_order(100, 10, 10, share, seeded())


def test_a_share_of_less_than_one_image() -> None:
    with pytest.raises(InputError, match=r"a share of 0\.004 is no image of a batch of 100: at least 0\.01"):
        epoch_order(1000, 50, 100, 0.004, seeded())
