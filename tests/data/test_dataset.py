"""Batches, the three splits of one set, the statistics and the fingerprint."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fdml.data import load
from fdml.data.dataset import Arrays, Batch, DataSet, Files, channel_statistics
from fdml.data.folder import Paths
from fdml.data.splits import Parts, assemble, fingerprint, stratified
from fdml.errors import InputError


def made_up(n: int = 20, classes: int = 4, shape: tuple[int, int, int] = (3, 4, 5), seed: int = 0) -> Arrays:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator)
    return Arrays(images, torch.arange(n) % classes)


def test_batches_come_in_the_order_asked_for() -> None:
    split = made_up().to("cpu")
    asked = [torch.tensor([3, 1, 2]), torch.tensor([19]), torch.tensor([1, 1])]
    got = list(split.batches(asked))
    assert [batch.index.tolist() for batch in got] == [[3, 1, 2], [19], [1, 1]]
    for batch in got:
        assert isinstance(batch, Batch)
        assert batch.x.dtype == torch.float32
        assert torch.equal((batch.x * 255).round().byte(), split.images[batch.index])
        assert torch.equal(batch.y, split.labels[batch.index])
    assert torch.equal(next(split.batches(asked[1:])).x, got[1].x)


def test_all_of_black_to_white_is_within_0_and_1() -> None:
    split = Arrays(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), torch.zeros(1, dtype=torch.int64))
    x = next(split.batches([torch.tensor([0])])).x
    assert x.min() == 0
    assert x.max() == 1


def test_head_and_take() -> None:
    split = made_up()
    assert len(split.head(7)) == 7
    assert len(split.head(1000)) == len(split)
    assert split.shape == (3, 4, 5)
    assert split.take(torch.tensor([5, 0])).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64), "uint8"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "n c h w"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "one an image"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2), "int64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(images: torch.Tensor, labels: torch.Tensor, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Arrays(images, labels)


def test_statistics_are_those_of_the_pixels() -> None:
    split = made_up(n=50)
    mean, std = channel_statistics(split)
    pixels = split.images.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_a_constant_channel_can_still_be_divided_by() -> None:
    black = Arrays(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    assert channel_statistics(black) == ((0.0,), (1 / 255,))


def test_statistics_see_no_test_data() -> None:
    train, other = made_up(n=40), made_up(n=40, seed=1)
    one, two = (assemble("made up", Parts(tuple("abcd"), train, test), 0.25) for test in (train, other))
    assert (one.mean, one.std) == (two.mean, two.std)
    assert (one.mean, one.std) == channel_statistics(one.train)
    assert one.input == (3, 4, 5)


@pytest.mark.parametrize("count", [0, 1, 7, 10, 93, 97])
def test_a_cut_is_exact_disjoint_and_in_proportion(count: int) -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [3] * 20)
    rest, cut = stratified(labels, count)
    assert len(cut) == count
    assert sorted(rest.tolist() + cut.tolist()) == list(range(100))
    assert rest.tolist() == sorted(rest.tolist())
    for k, size in ((0, 50), (1, 30), (3, 20)):
        assert abs((labels[cut] == k).sum().item() - count * size / 100) < 1 or count > 90
        assert (labels[rest] == k).any()
    assert torch.equal(stratified(labels, count)[1], cut)


def test_a_cut_of_more_than_there_is_fails() -> None:
    with pytest.raises(ValueError, match="keep one a class"):
        stratified(torch.tensor([0, 0, 1]), 2)


def test_splits_are_cut_by_class_and_share_nothing() -> None:
    whole = made_up(n=200)
    data = assemble("made up", Parts(tuple("abcd"), whole, shuffle=True), 0.1)
    assert [len(part) for part in (data.train, data.val, data.test)] == [144, 16, 40]
    seen = [image.numpy().tobytes() for part in (data.train, data.val, data.test) for image in part.head(200).images]
    assert len(set(seen)) == 200
    assert torch.bincount(data.val.labels).tolist() == [4] * 4
    again = assemble("made up", Parts(tuple("abcd"), whole, shuffle=True), 0.1)
    assert again.fingerprint == data.fingerprint


def test_shuffling_makes_the_head_a_fair_sample() -> None:
    by_class = Arrays(made_up(n=400).images, torch.arange(400) // 100)
    data = assemble("made up", Parts(tuple("abcd"), by_class, by_class, by_class, shuffle=True), 0.1)
    assert all(len(part.head(40).labels.unique()) == 4 for part in (data.train, data.val, data.test))


def test_shapes_of_splits_must_agree() -> None:
    with pytest.raises(InputError, match="train images are"):
        assemble("made up", Parts(tuple("abcd"), made_up(), made_up(shape=(1, 4, 5))), 0.1)


def test_too_few_images_to_cut() -> None:
    with pytest.raises(InputError, match="too few images"):
        assemble("made up", Parts(tuple("abcd"), made_up(n=4), made_up()), 0.1)


def test_fingerprint_sees_pixels_labels_shapes_and_order() -> None:
    split = made_up()
    images, labels = split.images.clone(), split.labels.clone()
    images[0, 0, 0, 0] ^= 1
    labels[0] += 1
    variants = [
        split,
        Arrays(images, split.labels),
        Arrays(split.images, labels),
        Arrays(split.images.view(20, 3, 5, 4), split.labels),
        split.take(torch.arange(19, -1, -1)),
    ]
    prints = [fingerprint(variant) for variant in variants]
    assert len(set(prints)) == len(prints)
    assert fingerprint(made_up()) == prints[0]
    assert len(prints[0]) == 64


def test_digits_are_whole_and_always_the_same() -> None:
    data = load("digits")
    assert isinstance(data, DataSet)
    assert [len(part) for part in (data.train, data.val, data.test)] == [1293, 144, 360]
    assert data.input == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    whole = [part.head(2000).images for part in (data.train, data.val, data.test)]
    assert set(torch.cat(whole).unique().tolist()) == {int(np.rint(v * 255 / 16)) for v in range(17)}
    assert max(torch.bincount(data.test.labels)) - min(torch.bincount(data.test.labels)) <= 2
    assert data.fingerprint == load("digits").fingerprint
    other = load("digits", val_fraction=0.2)
    assert other.fingerprint != data.fingerprint
    assert fingerprint(other.test) == fingerprint(data.test)


def test_files_and_labels_must_agree(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 images but 2 labels"):
        Files(Paths(tmp_path, ("a.png",)), torch.tensor([0, 1]), (1, 8, 8))
