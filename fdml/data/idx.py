"""MNIST and Fashion-MNIST in their own format, IDX (described at the end of Y. LeCun's page of MNIST)."""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np

from fdml.data.dataset import Arrays
from fdml.data.download import Remote
from fdml.data.places import find
from fdml.data.splits import Parts, arrays
from fdml.errors import InputError

CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MAX_BYTES = 1 << 30

_MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
}
# Size and SHA-256 of FILES with .gz; these are the files whose MD5 torchvision publishes.
_CHECKSUMS = {
    "mnist": (
        (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    ),
    "fashion-mnist": (
        (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    ),
}
# The two sets share their file names; the SHA-256 of the unpacked training labels tells them apart.
_TRAIN_LABELS = {
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5": "mnist",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9": "fashion-mnist",
}


def read(name: str, data_dir: Path | None, *, download: bool) -> Parts:
    """``mnist`` or ``fashion-mnist``: 60,000 training and 10,000 test images, 28x28 grey; ``.gz`` or unpacked.

    Raises ``InputError`` for files that are missing, damaged, do not fit each other, or are those of the other set.
    """
    remotes = [
        Remote(f"{file}.gz", tuple(f"{mirror}{file}.gz" for mirror in _MIRRORS[name]), size, sha256)
        for file, (size, sha256) in zip(FILES, _CHECKSUMS[name], strict=True)
    ]
    train_images, train_labels, test_images, test_labels = find(name, [FILES], remotes, data_dir, download=download)
    train = _split(train_images, train_labels, name)
    return Parts(CLASSES[name], train, _split(test_images, test_labels, name))


def read_array(path: Path, ndim: int) -> np.ndarray:
    """The uint8 array of ``ndim`` dimensions in an IDX file, gzipped or not.

    Raises ``InputError`` for a file that is not IDX of bytes, has other dimensions, announces more than 1 GiB, or holds
    fewer or more bytes than it announces.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            header = file.read(4)
            if header != bytes((0, 0, 8, ndim)):
                wanted = bytes((0, 0, 8, ndim)).hex()
                raise InputError(f"{path}: not IDX of {ndim}-dimensional bytes (begins {header.hex()}, not {wanted})")
            sizes = file.read(4 * ndim)
            if len(sizes) != 4 * ndim:
                raise InputError(f"{path}: ends inside its header")
            shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
            announced = math.prod(shape)
            if announced > MAX_BYTES:
                raise InputError(f"{path}: announces {'x'.join(map(str, shape))} bytes, more than 1 GiB")
            content = file.read(announced + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: truncated or damaged gzip file ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(content) != announced:
        has = "more" if len(content) > announced else f"only {len(content):,}"
        raise InputError(f"{path}: announces {announced:,} bytes but has {has}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _split(images_path: Path, labels_path: Path, name: str) -> Arrays:
    images, labels = read_array(images_path, 3), read_array(labels_path, 1)
    if images.shape[1:] != (28, 28):
        raise InputError(f"{images_path}: images are {images.shape[1]}x{images.shape[2]}, expected 28x28")
    header = bytes((0, 0, 8, 1)) + len(labels).to_bytes(4, "big")
    other = _TRAIN_LABELS.get(hashlib.sha256(header + labels.tobytes()).hexdigest(), name)
    if other != name:
        raise InputError(f"{labels_path}: these are the files of {other}, not of {name}")
    return arrays(images[:, None], labels, 10, str(labels_path))
