"""Street View House Numbers, cropped digits (Netzer et al. 2011), in MATLAB files."""

from pathlib import Path

import numpy as np

from fdml.data.dataset import Arrays
from fdml.data.download import Remote
from fdml.data.places import find
from fdml.data.splits import Parts, arrays
from fdml.errors import InputError

FILES = ("train_32x32.mat", "test_32x32.mat")
MAX_IMAGES = 1_000_000

# Size and SHA-256 as in torchvision and others; the MD5 are e26dedcc434d2e4c54c9b2d4a06d8373 and
# eb5a983be6a315427106f1b164d9cef3.
_REMOTES = tuple(
    Remote(file, (f"http://ufldl.stanford.edu/housenumbers/{file}",), size, sha256)
    for file, size, sha256 in (
        (FILES[0], 182_040_794, "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),
        (FILES[1], 64_275_384, "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"),
    )
)


def read(data_dir: Path | None, *, download: bool) -> Parts:
    """73,257 training and 26,032 test images, 32x32 RGB; class k is digit k (the files call zero 10).

    Raises ``InputError`` for files that are missing, damaged or of other shapes.
    """
    train, test = find("svhn", [FILES], _REMOTES, data_dir, download=download)
    return Parts(tuple("0123456789"), _split(train), _split(test))


def _split(path: Path) -> Arrays:
    from scipy.io import loadmat, whosmat

    # scipy raises nearly anything on a damaged file, so the two calls that parse one catch everything.
    try:
        announced = {name: (shape, kind) for name, shape, kind in whosmat(str(path))}
    except Exception as error:
        raise InputError(_damaged(path, error)) from error
    if not {"X", "y"} <= announced.keys():
        raise InputError(f"{path}: needs X and y, has {', '.join(announced) or 'nothing'}; it may be cut short")
    (images_shape, images_kind), (labels_shape, _) = announced["X"], announced["y"]
    if len(images_shape) != 4 or images_shape[:3] != (32, 32, 3) or images_kind != "uint8":
        raise InputError(f"{path}: X must be uint8 32x32x3xN, got {images_kind} {'x'.join(map(str, images_shape))}")
    count = images_shape[3]
    if count > MAX_IMAGES:
        raise InputError(f"{path}: announces {count:,} images, more than {MAX_IMAGES:,}")
    if labels_shape not in ((count, 1), (1, count)):
        raise InputError(f"{path}: {count} images but labels y of shape {'x'.join(map(str, labels_shape))}")
    try:
        content = loadmat(str(path), variable_names=["X", "y"])
    except Exception as error:
        raise InputError(_damaged(path, error)) from error
    images, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    return arrays(images.transpose(3, 2, 0, 1), np.where(labels == 10, 0, labels), 10, str(path))


def _damaged(path: Path, error: Exception) -> str:
    return f"{path}: not a readable MATLAB file ({type(error).__name__}: {error})".replace("\n", " ")
