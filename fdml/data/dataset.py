"""Images and labels as the training loop sees them: batches on a device, in the order that the caller asks for."""

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fdml import pictures
from fdml.errors import InputError

Device = torch.device | str


class Batch(NamedTuple):
    """One step's images, all on one device: ``index`` is the place in the split, ``x`` is float32 in [0, 1]."""

    index: Int64[Tensor, " b"]  # pyright: ignore[reportIncompatibleMethodOverride]  (hides tuple.index: meant)
    x: Float[Tensor, "b c h w"]
    y: Int64[Tensor, " b"]


@final
@dataclass(frozen=True, eq=False)
class Arrays:
    """A split that lies in memory as uint8, on the device that it was last moved to.

    Raises ``InputError`` when the two tensors do not fit each other.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise InputError(f"images must be uint8 n c h w, got {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            wanted, got = f"int64 ({len(self.images)},)", f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise InputError(f"labels must be {wanted}, one an image, got {got}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of every image."""
        c, h, w = self.images.shape[1:]
        return c, h, w

    def to(self, device: Device) -> "Arrays":
        """The same split on ``device``: moved once, as bytes."""
        return Arrays(self.images.to(device), self.labels.to(device))

    def take(self, index: Int64[Tensor, " k"]) -> "Arrays":
        """The images at ``index``, in that order."""
        index = index.to(self.images.device)
        return Arrays(self.images.index_select(0, index), self.labels.index_select(0, index))

    def head(self, n: int) -> "Arrays":
        """The first ``n`` images, or all there are."""
        return Arrays(self.images[:n], self.labels[:n])

    def all(self) -> Batch:
        """Every image, as one batch."""
        return next(self.batches([torch.arange(len(self))]))

    def batches(self, indices: Sequence[Int64[Tensor, " _"]]) -> Iterator[Batch]:
        """One batch an index tensor, in the order given. Bytes become floats on the device."""
        for chosen in indices:
            index = chosen.to(self.images.device)
            x = self.images.index_select(0, index).float().div_(255)
            yield Batch(index, x, self.labels.index_select(0, index))


@runtime_checkable
class Sources(Protocol):
    """Where the images of a split lie, encoded: the files of a folder, the rows of a table."""

    def __len__(self) -> int: ...

    def take(self, index: Int64[Tensor, " k"]) -> "Sources":
        """The images at ``index``, in that order."""
        ...

    def encoded(self, index: Sequence[int]) -> tuple[list[Path | bytes], list[str]]:
        """The files at ``index``, or their content, and what errors call them. Raises ``InputError``."""
        ...

    def listed(self) -> Iterable[tuple[str, int]]:
        """What stays the same on every machine: the name of each image and its encoded size in bytes."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Files:
    """A split that stays on disk: worker processes decode each batch when its turn comes, one batch each ahead.

    ``labels`` is on the CPU; every image is brought to ``shape`` (c, h, h). The worker processes read ``sources`` and
    nothing else: they draw no random numbers and never see the device.
    """

    sources: Sources
    labels: Int64[Tensor, " n"]
    shape: tuple[int, int, int]
    device: Device = "cpu"

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.labels):
            raise InputError(f"{len(self.sources)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: Device) -> "Files":
        """The same split, whose batches will arrive on ``device``."""
        return replace(self, device=device)

    def take(self, index: Int64[Tensor, " k"]) -> "Files":
        """The files at ``index``, in that order."""
        index = index.cpu()
        return replace(self, sources=self.sources.take(index), labels=self.labels.index_select(0, index))

    def head(self, n: int) -> Arrays:
        """The first ``n`` images, or all there are, decoded into memory. Raises ``InputError`` as ``batches``."""
        labels = self.labels[:n].clone()
        decoded = np.empty((len(labels), *self.shape), dtype=np.uint8)
        for begin in range(0, len(labels), 1000):  # what is encoded may be held in memory as well, so not all at once
            block = range(begin, min(begin + 1000, len(labels)))
            decoded[block.start : block.stop] = _read(self.sources, block, self.shape)
        return Arrays(torch.from_numpy(decoded), labels).to(self.device)

    def batches(self, indices: Sequence[Int64[Tensor, " _"]]) -> Iterator[Batch]:
        """One batch an index tensor, in the order given. Raises ``InputError`` that names an unreadable image."""
        for index, decoded in zip(indices, self._decoded(indices), strict=True):
            x = torch.from_numpy(decoded).to(self.device).float().div_(255)
            index = index.to("cpu")
            y = self.labels.index_select(0, index)
            yield Batch(index.to(self.device), x, y.to(self.device))

    def _decoded(self, indices: Sequence[Tensor]) -> Iterator[np.ndarray]:
        if not len(indices):
            return
        loader = DataLoader(
            _Decoder(self.sources, self.shape),
            sampler=[index.tolist() for index in indices],
            batch_size=None,
            num_workers=min(pictures.cpus(), 8, len(indices)),
            prefetch_factor=1,  # one batch a worker, so that memory stays bounded
            # Arrays travel through a pipe; tensors would need shared memory, of which a container may have 64 MB.
            collate_fn=_unchanged,  # pyright: ignore[reportArgumentType]  (torch types it for lists of samples only)
            # A generator of its own, else the loader draws a seed from the global one and disturbs the training run.
            generator=torch.Generator(),
            # Elsewhere, and from Python 3.14 on, each worker would import torch anew in every epoch.
            multiprocessing_context="fork" if sys.platform == "linux" else None,
        )
        with warnings.catch_warnings():
            # Python 3.12 and later warn of any fork beside threads; these workers only read files and call Pillow.
            warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
            arriving = iter(loader)
        for decoded in arriving:
            if isinstance(decoded, str):
                raise InputError(decoded)
            yield decoded


Split = Arrays | Files


@dataclass(frozen=True, eq=False)
class DataSet:
    """Three splits of one data set. ``fingerprint`` is the SHA-256 of their content, in hex.

    ``extra``: how many of the last training images are not the data set's own (``fdml.data.extra``).
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    fingerprint: str
    extra: int = 0

    def to(self, device: Device) -> "DataSet":
        """The same data set, whose batches arrive on ``device``."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    @property
    def input(self) -> tuple[int, int, int]:
        """(c, h, w) of every image."""
        return self.train.shape

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel of the own training images, in [0, 1]."""
        return self._statistics[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel of the own training images, in units of [0, 1]."""
        return self._statistics[1]

    @cached_property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        own = self.train.head(len(self.train) - self.extra) if self.extra else self.train
        return channel_statistics(own)


def channel_statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, in units of [0, 1].

    Over the whole split for ``Arrays``; over its first 2,000 images for ``Files``. Sums are exact, so the result is the
    same on every device. A deviation below one grey level is raised to it (1/255), so that dividing by it is safe.
    """
    counts = torch.zeros(split.shape[0], 256, dtype=torch.int64)
    for block in _blocks(split):
        for channel, pixels in enumerate(block.unbind(1)):
            counts[channel] += torch.bincount(pixels.flatten(), minlength=256).cpu()
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp(min=1 / 255).tolist())


def _blocks(split: Split) -> Iterator[UInt8[Tensor, "k c h w"]]:
    if isinstance(split, Arrays):
        yield from split.images.split(4096)
        return
    steps = torch.arange(min(len(split), 2000)).split(64)
    for decoded in split._decoded(steps):
        yield torch.from_numpy(decoded)


class _Decoder(Dataset[np.ndarray | str]):
    """What a worker process runs: a list of places in, that batch as bytes out, or the message of what went wrong.

    The message travels as text because the loader rebuilds a raised exception with a worker's traceback inside it.
    """

    def __init__(self, sources: Sources, shape: tuple[int, int, int]) -> None:
        self.sources, self.shape = sources, shape

    def __getitem__(self, index: list[int]) -> np.ndarray | str:
        try:
            return _read(self.sources, index, self.shape, threads=1)
        except InputError as error:
            return str(error)


def _read(
    sources: Sources, index: Sequence[int], shape: tuple[int, int, int], threads: int | None = None
) -> np.ndarray:
    encoded, names = sources.encoded(index)
    return pictures.read_all(encoded, shape, names, threads)


def _unchanged(decoded: np.ndarray | str) -> np.ndarray | str:
    return decoded
