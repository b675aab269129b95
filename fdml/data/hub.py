"""Data sets of the Hugging Face hub, or local ones, through the optional library ``datasets``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fdml import pictures
from fdml.data.dataset import Arrays
from fdml.data.splits import Parts, arrays
from fdml.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

MAX_BYTES = 4 << 30
_VAL = ("validation", "valid", "val", "dev")


def read(name: str, size: int | None, *, download: bool) -> Parts:
    """The data set ``name`` or ``name:config`` of the hub; or a folder saved by ``save_to_disk`` or of parquet files.

    The image column and the label column (a ClassLabel) are found by their types. The test split is ``test``, else the
    validation split, else cut from train; a split without labels (all -1) counts as missing. Code that comes with a
    data set is never run. Images are decoded like those of a folder and kept in memory, in a fixed random order.

    Raises ``InputError`` without the library, for a data set that cannot be had (``download`` false: that is not on
    this machine), for columns that are missing or ambiguous, and for more than 4 GiB of decoded images.
    """
    splits = _load(name, download)
    if "train" not in splits:
        raise InputError(f"hf:{name}: no split 'train'; has {', '.join(splits)}")
    image, label = _columns(name, splits["train"])
    classes = tuple(splits["train"].features[label].names)
    if len(classes) < 2:
        raise InputError(f"hf:{name}: column {label!r} has {len(classes)} classes; a classifier needs at least two")
    wanted = {"train": splits["train"]}
    for kind, names in (("test", ("test",)), ("val", _VAL)):
        found = next((splits[split] for split in names if split in splits and _labelled(splits[split], label)), None)
        if found is not None:
            wanted[kind] = found
    first = _encoded(f"hf:{name}", splits["train"], image, [0])[0]
    shape = pictures.shape_of(first, size, f"hf:{name}: train, row 0")
    total = sum(len(split) for split in wanted.values()) * shape[0] * shape[1] * shape[2]
    if total > MAX_BYTES:
        raise InputError(
            f"hf:{name}: {total / 2**30:.1f} GiB decoded, more than {MAX_BYTES >> 30}; save it as a folder"
        )
    parts = {kind: _decoded(f"hf:{name}: {kind}", split, image, label, shape) for kind, split in wanted.items()}
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    return Parts(classes, parts["train"], parts.get("test"), parts.get("val"), shuffle=True)


def _load(name: str, download: bool) -> "dict[str, Dataset]":
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"hf:{name} needs the `datasets` library: pip install 'fdml[hub]'") from error
    path, _, config = name.partition(":") if not Path(name).exists() else (name, "", "")
    saved = any((Path(path) / marker).is_file() for marker in ("dataset_dict.json", "state.json"))
    # Before version 4 the library could run a data set's own code, if allowed to; later it cannot.
    code: dict[str, Any] = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
    only_local = datasets.DownloadConfig(local_files_only=not download)
    try:
        loaded = (
            datasets.load_from_disk(path)
            if saved
            else datasets.load_dataset(path, config or None, download_config=only_local, **code)
        )
    except Exception as error:  # the library, the network and the file formats below it raise nearly anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"hf:{name}: cannot be loaded ({reason})") from error
    if isinstance(loaded, datasets.Dataset):
        return {"train": loaded}
    return {str(split): rows for split, rows in loaded.items()}


def _columns(name: str, rows: "Dataset") -> tuple[str, str]:
    import datasets

    chosen: list[str] = []
    for what, kind, usual in (
        ("image", datasets.Image, ("image", "img")),
        ("ClassLabel", datasets.ClassLabel, ("label", "labels", "fine_label")),
    ):
        found = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
        named = [column for column in usual if column in found]
        if len(found) != 1 and not named:
            have = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in rows.features.items())
            raise InputError(f"hf:{name}: {len(found)} {what} columns, needs one; has {have}")
        chosen.append(named[0] if named else found[0])
    return chosen[0], chosen[1]


def _labelled(rows: "Dataset", label: str) -> bool:
    return any(value != -1 for value in rows[label])


def _encoded(where: str, rows: "Dataset", image: str, places: list[int]) -> list[bytes | Path]:
    """The image files at ``places``, undecoded: the library itself would decode without our limits."""
    import datasets

    encoded: list[bytes | Path] = []
    for place, cell in zip(places, rows.cast_column(image, datasets.Image(decode=False))[places][image], strict=True):
        if not cell or not (cell["bytes"] or cell["path"]):
            raise InputError(f"{where}: row {place} has no image")
        encoded.append(cell["bytes"] or Path(cell["path"]))
    return encoded


def _decoded(where: str, rows: "Dataset", image: str, label: str, shape: tuple[int, int, int]) -> Arrays:
    labels = rows[label][:]
    if None in labels:
        raise InputError(f"{where}: row {labels.index(None)} has no label")
    decoded = np.empty((len(rows), *shape), dtype=np.uint8)
    for begin in range(0, len(rows), 1000):
        places = list(range(begin, min(begin + 1000, len(rows))))
        names = [f"{where}, row {place}" for place in places]
        decoded[begin : begin + len(places)] = pictures.read_all(_encoded(where, rows, image, places), shape, names)
    return arrays(decoded, np.array(labels, dtype=np.int64), len(rows.features[label].names), where)
