"""Random numbers for attacks: a stream of its own for every image, so that company changes no image's outcome.

An attack takes ``generator``: ``Streams``, a ``torch.Generator`` (one stream for the batch, in the order of its
images), or None (torch's global stream), and draws with the functions of this module, which serve all three.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

# Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", the constants of SplitMix64, as the
# signed numbers that torch has.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


class Streams:
    """One stream of random numbers an image, by counter: the n-th number is a hash of the image's key and n.

    ``streams[index]`` are the streams of some of the images, and drawing from them moves these images on wherever they
    are held. What an image draws thus depends on its key and on how much it drew before, never on the other images,
    the size of the batch or the device.
    """

    def __init__(self, keys: Int[Tensor, " b"]) -> None:
        self._keys = keys
        self._counts = torch.zeros_like(keys)
        self._rows: Tensor | None = None

    @classmethod
    def of(cls, images: Int[Tensor, " b"], seed: int, *names: str | int) -> "Streams":
        """The streams of images that are known by their numbers in a data set; others for each seed and names."""
        digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
        salt = int.from_bytes(digest, "big", signed=True)
        return cls(_mix(_mix(images.long() * _GOLDEN) ^ salt))

    def __len__(self) -> int:
        return len(self._keys if self._rows is None else self._rows)

    def __getitem__(self, index: Tensor) -> "Streams":
        part = Streams.__new__(Streams)
        part._keys, part._counts = self._keys, self._counts
        rows = torch.arange(len(self._keys), device=self._keys.device) if self._rows is None else self._rows
        part._rows = rows[index]
        return part

    def fork(self, ways: int) -> "Streams":
        """``ways`` new streams an image, each its own: the first image's, then the second's, and so on."""
        return Streams(self.bits((ways,)).flatten())

    def bits(self, shape: Sequence[int]) -> Int[Tensor, "b ..."]:
        """The next 64 random bits for each place of ``shape`` in each image: (b, *shape)."""
        count = math.prod(shape)
        rows = slice(None) if self._rows is None else self._rows
        keys = self._keys[rows]
        steps = self._counts[rows][:, None] + torch.arange(1, count + 1, device=keys.device)
        drawn = _mix(keys[:, None] + steps * _GOLDEN)
        self._counts[rows] += count
        return drawn.view(len(keys), *shape)


Generator = torch.Generator | Streams | None


def uniform(like: Tensor, generator: Generator, *shape: int) -> Tensor:
    """Uniform in [0, 1), of shape (b, *shape): b, dtype and device are those of ``like``."""
    if isinstance(generator, Streams):
        exponent = 53 if like.dtype == torch.float64 else 24
        return _shifted(generator.bits(shape), 64 - exponent).to(like.dtype) * 2.0**-exponent
    return torch.rand((len(like), *shape), dtype=like.dtype, device=like.device, generator=generator)


def normal(like: Tensor, generator: Generator, *shape: int) -> Tensor:
    """Standard normal, of shape (b, *shape)."""
    if isinstance(generator, Streams):
        radius = (-2 * torch.log1p(-uniform(like, generator, *shape))).sqrt()
        return radius * torch.cos(2 * math.pi * uniform(like, generator, *shape))
    return torch.randn((len(like), *shape), dtype=like.dtype, device=like.device, generator=generator)


def integers(like: Tensor, generator: Generator, high: int, *shape: int) -> Tensor:
    """Whole numbers from 0 to ``high`` − 1 (below 2^31), of shape (b, *shape) and dtype int64."""
    if isinstance(generator, Streams):
        return (_shifted(generator.bits(shape), 32) * high) >> 32
    return torch.randint(high, (len(like), *shape), device=like.device, generator=generator)


def signs(like: Tensor, generator: Generator, *shape: int) -> Tensor:
    """−1 or 1, of shape (b, *shape) and the dtype of ``like``."""
    return (2 * integers(like, generator, 2, *shape) - 1).to(like.dtype)


def take(generator: Generator, index: Tensor) -> Generator:
    """The generator for some of the images: their own streams, or the one generator that all draw from."""
    return generator[index] if isinstance(generator, Streams) else generator


def mixed(key: int, places: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """64 random bits for each place of the stream ``key``: a hash of both, whatever else is drawn."""
    return _mix(places * _GOLDEN + key)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (variant 13 of Stafford), on int64 that wraps."""
    z = (z ^ _shifted(z, 30)) * _MIX[0]
    z = (z ^ _shifted(z, 27)) * _MIX[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """The logical shift to the right, which torch lacks: its own carries the sign along."""
    return (z >> by) & ((1 << (64 - by)) - 1)
