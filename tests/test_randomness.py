"""Streams: each image's own numbers, whatever the company; and numbers that are random."""

import math

import pytest
import torch

from fdml.randomness import Generator, Streams, integers, normal, signs, take, uniform

IMAGES = torch.arange(2000)


def like(count: int = 2000, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(count, 1, dtype=dtype)


def test_an_image_draws_the_same_in_any_company() -> None:
    whole = uniform(like(), Streams.of(IMAGES, 0, "pgd"), 3, 4)
    for part in (IMAGES[7:8], IMAGES[[3, 900, 12]], IMAGES.flip(0)):
        assert torch.equal(uniform(like(len(part)), Streams.of(part, 0, "pgd"), 3, 4), whole[part])


def test_some_images_go_on_where_they_stopped() -> None:
    streams, twin = Streams.of(IMAGES[:5], 0), Streams.of(IMAGES[:5], 0)
    first, second = uniform(like(5), twin, 2), uniform(like(5), twin, 2)
    left = torch.tensor([1, 4])
    assert torch.equal(uniform(like(5), streams, 2), first)
    assert torch.equal(uniform(like(2), streams[left], 2), second[left])
    last = streams[left][torch.tensor([1])]  # a part of a part
    third = uniform(like(5), twin, 2)
    assert torch.equal(uniform(like(1), last, 2), third[[4]])
    # The others have not moved on meanwhile.
    assert torch.equal(uniform(like(1), streams[torch.tensor([0])], 2), second[[0]])


def test_seeds_names_and_images_have_streams_of_their_own() -> None:
    drawn = [
        uniform(like(3), streams, 4)
        for streams in (
            Streams.of(IMAGES[:3], 0, "pgd"),
            Streams.of(IMAGES[:3], 1, "pgd"),
            Streams.of(IMAGES[:3], 0, "square"),
            Streams.of(IMAGES[3:6], 0, "pgd"),
        )
    ]
    values = torch.cat(drawn).flatten()
    assert len(values.unique()) == len(values)


def test_forks_are_apart_and_follow_the_image() -> None:
    forked = uniform(like(6), Streams.of(IMAGES[:2], 0).fork(3), 4)
    alone = uniform(like(3), Streams.of(IMAGES[1:2], 0).fork(3), 4)
    assert torch.equal(forked[3:], alone)
    assert len(forked.flatten().unique()) == forked.numel()


@pytest.mark.parametrize("generator", [Streams.of(IMAGES, 0), torch.Generator().manual_seed(0), None])
def test_the_numbers_are_random(generator: Generator) -> None:
    u, z = uniform(like(), generator, 100), normal(like(), generator, 100)
    assert 0 <= float(u.min()) < 1e-3
    assert 0.999 < float(u.max()) < 1
    count = u.numel()
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * count)
    assert abs(float(z.mean())) < 5 / math.sqrt(count)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((z > 1.96).double().mean()) - 0.025) < 0.002
    # Neither neighbours in one image nor the same place in neighbouring images have anything to do with each other.
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 5 / math.sqrt(count)
    shares = torch.bincount(integers(like(), generator, 7, 100).flatten(), minlength=7) / count
    assert float((shares - 1 / 7).abs().max()) < 5 * math.sqrt(1 / 7 / count)
    assert set(signs(like(), generator, 100).unique().tolist()) == {-1.0, 1.0}


def test_double_precision_has_all_its_bits() -> None:
    u = uniform(like(50, torch.float64), Streams.of(IMAGES[:50], 0), 4)
    assert u.dtype == torch.float64
    assert bool((u != u.float().double()).any())


def test_one_generator_serves_any_images() -> None:
    generator = torch.Generator()
    assert take(generator, torch.tensor([0])) is generator
    assert take(None, torch.tensor([0])) is None
