"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), in the binary version or the python version."""

import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fdml.data.download import Remote
from fdml.data.places import find
from fdml.data.splits import Parts, arrays, check
from fdml.errors import InputError

_FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CLASSES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(_FINE.split()),
}
PIXELS = 3 * 32 * 32
MAX_BYTES = 1 << 28

# (binary version, python version): the files to train with, then the one to test with.
_FORMS = {
    "cifar10": (
        (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
    ),
    "cifar100": (("train.bin", "test.bin"), ("train", "test")),
}
# Sizes and SHA-256 of the binary archives; their MD5, as the authors' page states them, are
# c32a1d4ab5d03f1284b67883e8d87530 and 03b5dce01913d631647c71ecec9e9cb8.
_REMOTES = {
    "cifar10": Remote(
        "cifar-10-binary.tar.gz",
        ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
        170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        tuple((f"cifar-10-batches-bin/{file}", 10_000 * (1 + PIXELS)) for file in _FORMS["cifar10"][0]),
    ),
    "cifar100": Remote(
        "cifar-100-binary.tar.gz",
        ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
        168_513_733,
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        (
            ("cifar-100-binary/train.bin", 50_000 * (2 + PIXELS)),
            ("cifar-100-binary/test.bin", 10_000 * (2 + PIXELS)),
        ),
    ),
}


def read(name: str, data_dir: Path | None, *, download: bool) -> Parts:
    """``cifar10`` or ``cifar100`` (fine labels): 50,000 training and 10,000 test images, 32x32 RGB.

    Raises ``InputError`` for files that are missing, damaged, of a wrong length, or pickles with anything but arrays.
    """
    *train, test = find(name, _FORMS[name], [_REMOTES[name]], data_dir, download=download)
    splits = [[_records(path, name) for path in paths] for paths in (train, [test])]
    whole = [
        arrays(
            np.concatenate([images for images, _ in split]),
            np.concatenate([labels for _, labels in split]),
            len(CLASSES[name]),
            f"{test.parent}: {name}",
        )
        for split in splits
    ]
    return Parts(CLASSES[name], whole[0], whole[1])


def _records(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) and labels (n,) of one file of either version."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes")
    images, labels = _from_binary(path, content, name) if path.suffix == ".bin" else _from_pickle(path, content, name)
    check(images, labels, len(CLASSES[name]), str(path))
    return images, labels


def _from_binary(path: Path, content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    prefix = 1 if name == "cifar10" else 2  # cifar100: the coarse label, then the fine one
    record = prefix + PIXELS
    if not content or len(content) % record:
        raise InputError(f"{path}: {len(content):,} bytes are not a whole number of {record}-byte records")
    table = np.frombuffer(content, np.uint8).reshape(-1, record)
    return table[:, prefix:].reshape(-1, 3, 32, 32), table[:, prefix - 1]


def _from_pickle(path: Path, content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    batch = unpickle(content, path)
    if not isinstance(batch, dict):
        raise InputError(f"{path}: holds a {type(batch).__name__}, not a batch of {name}")
    batch = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    data, labels = batch.get("data"), batch.get("labels" if name == "cifar10" else "fine_labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        raise InputError(f"{path}: 'data' is not a uint8 array of n x {PIXELS}")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise InputError(f"{path}: the labels are not a list of small numbers")
    return data.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def unpickle(content: bytes, path: Path) -> object:
    """What a pickle of plain data holds: dict, list, str, bytes, int, and uint8 arrays. Nothing of it is executed.

    A pickle is a program. Of its instructions only those that build plain data are let through, and of the functions
    that it may name only three, each replaced by one of ours that accepts just what numpy writes for uint8 arrays.

    Raises ``InputError`` for everything else.
    """
    try:
        for instruction, argument, _ in pickletools.genops(content):
            if instruction.name not in _INSTRUCTIONS:
                raise pickle.UnpicklingError(f"instruction {instruction.name}")
            # The memo is a table: without the bound one instruction could make it billions of entries long.
            if instruction.name.endswith("PUT") and not 0 <= int(argument or 0) <= len(content):
                raise pickle.UnpicklingError(f"memo place {argument}")
        return _Plain(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a hostile or damaged pickle makes these two parsers raise nearly anything
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise InputError(f"{path}: refused, this pickle holds more than plain data or is damaged ({reason})") from error


_INSTRUCTIONS = frozenset(
    (
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE"),
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
        *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    )
)


class _Admitted:
    """A function that a pickle may call. Not a plain function, because a pickle can set attributes of what it names."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("changes a function")


def _empty_array(_kind: object, shape: object, dtype: object) -> np.ndarray:
    if shape != (0,) or dtype not in (b"b", "b"):
        raise pickle.UnpicklingError("an array that numpy does not write so")
    return np.empty(0, np.uint8)


def _dtype(code: object, *_flags: object) -> np.dtype:
    if code not in (b"u1", "u1", b"|u1", "|u1"):
        raise pickle.UnpicklingError(f"an array of {code!r}")
    return np.dtype(np.uint8)


def _encode(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("an encoding other than latin1")
    return text.encode("latin1")


_RECONSTRUCT = _Admitted(_empty_array)
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): None,  # only ever handed to _reconstruct, which ignores it
    ("numpy", "dtype"): _Admitted(_dtype),
    ("_codecs", "encode"): _Admitted(_encode),
}


class _Plain(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> object:
        if (module_name, global_name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"names {module_name}.{global_name}")
        return _ADMITTED[module_name, global_name]
