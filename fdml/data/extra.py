"""More training images beside a data set's own, generated ones say, and how the two are mixed."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from fdml.data import npz
from fdml.data.dataset import Arrays, DataSet
from fdml.data.splits import fingerprint
from fdml.errors import InputError


def extend(data: DataSet, source: str) -> DataSet:
    """``data`` whose ``train`` is its own images followed by those of ``source``, ``npz:FILE`` (see ``npz.read``).

    Of the file only the training images are taken (all of them, where it has no splits), in its order. ``extra`` says
    how many they are; the fingerprint covers both. Name, classes, ``val`` and ``test`` stay, and so do ``mean`` and
    ``std``, which are those of the own images. The file's images move to the device of the own ones; while this runs,
    about twice their bytes are in memory.

    Raises ``InputError`` for another form of ``source``, for a file that ``npz.read`` refuses, for images of another
    shape, for labels or names of classes that ``data`` does not have, and for own images that are streamed from disk.
    """
    form, _, file = source.partition(":")
    if form != "npz" or not file:
        raise InputError(f"extra images {source!r}: write npz:FILE, a file with the arrays image and label")
    if not isinstance(data.train, Arrays):
        raise InputError(
            f"extra images {source!r}: {data.name} is streamed from disk; they go with sets in memory only"
        )
    found = npz.read(Path(file).expanduser())
    more = found.train
    assert isinstance(more, Arrays)
    if more.shape != data.input:
        raise InputError(f"{source}: images are {more.shape}, must be {data.input} as {data.name} has them (c, h, w)")
    highest = int(more.labels.max())
    if highest >= len(data.classes):
        raise InputError(f"{source}: label {highest} is out of range; {data.name} has 0 to {len(data.classes) - 1}")
    unnamed = tuple(str(k) for k in range(len(found.classes)))
    if found.classes not in (unnamed, data.classes):
        raise InputError(f"{source}: classes are {', '.join(found.classes)}, must be {', '.join(data.classes)}")
    both = hashlib.sha256(f"{data.fingerprint} {fingerprint(more)}".encode()).hexdigest()
    images, labels = data.train.images, data.train.labels
    train = Arrays(
        torch.cat([images, more.images.to(images.device)]), torch.cat([labels, more.labels.to(labels.device)])
    )
    return replace(data, train=train, fingerprint=both, extra=data.extra + len(more))


def epoch_order(
    count: int, extra: int, batch_size: int, share: float, generator: torch.Generator | None
) -> Int64[Tensor, "steps batch"]:
    """The places of one epoch's batches in a split of ``count`` own images followed by ``extra`` others.

    An epoch has ``count // batch_size`` steps, whatever is mixed in. Each batch has round(``batch_size * share``) extra
    images, 0 <= ``share`` <= 1, and own ones else (Rebuffi et al. 2021 and Gowal et al. 2021 take 0.7 generated ones on
    CIFAR-10). Both come in random order: no own image twice, and no extra one again before all have been drawn,
    after which they are shuffled anew. The extra ones are spread evenly over a batch, so that processes which take a
    part of it each have their share. Without extra images, or at a share of 0, it is the plain random order of the own
    ones; whether extra images that are never drawn are a mistake is the caller's to say.

    Raises ``InputError`` for a share outside [0, 1], or above 0 yet too small for one image a batch.
    """
    if not 0 <= share <= 1:
        raise InputError(f"the share of extra images must be from 0 to 1, got {share:g}")
    steps = count // batch_size
    drawn = round(batch_size * share) if extra else 0
    if extra and share > 0 and not drawn:
        raise InputError(f"a share of {share:g} is no image of a batch of {batch_size}: at least {1 / batch_size:.2g}")
    own = batch_size - drawn
    order = torch.randperm(count, generator=generator)[: steps * own].view(steps, own)
    if not drawn:
        return order
    rounds = steps * drawn // extra + 1
    others = torch.cat([torch.randperm(extra, generator=generator) for _ in range(rounds)])[: steps * drawn]
    mixed = torch.empty(steps, batch_size, dtype=torch.int64)
    is_extra = (torch.arange(batch_size + 1) * drawn // batch_size).diff().bool()
    mixed[:, ~is_extra] = order
    mixed[:, is_extra] = count + others.view(steps, drawn)
    return mixed
