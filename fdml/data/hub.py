"""Data sets of the Hugging Face hub, or local ones, through the optional library ``datasets``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from fdml import pictures
from fdml.data.dataset import Files, Split
from fdml.data.splits import Parts, check
from fdml.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

IN_MEMORY = 4 << 30
"""Decoded size in bytes up to which the images are kept in memory; larger data sets are streamed from disk."""

_VAL = ("validation", "valid", "val", "dev")


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a table that the library maps into memory: only those asked for are read, in any order.

    ``table`` has the column ``image`` alone, undecoded: the library itself would decode without our limits. ``places``
    (n,) are rows of it, ``sizes`` (n,) the encoded bytes of each; ``kind`` is train, val or test.
    """

    where: str
    kind: str
    table: "Dataset"
    image: str
    places: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, where: str, kind: str, rows: "Dataset", image: str) -> "Rows":
        """All ``rows``. Raises ``InputError`` for one without an image, found without reading the others' content."""
        import datasets

        table = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        return cls(where, kind, table, image, np.arange(len(table)), _sizes(f"{where}: {kind}", table, image))

    def __len__(self) -> int:
        return len(self.places)

    def take(self, index: Int64[Tensor, " k"]) -> "Rows":
        """The rows at ``index``, in that order."""
        return replace(self, places=self.places[index.numpy()], sizes=self.sizes[index.numpy()])

    def encoded(self, index: Sequence[int]) -> tuple[list[Path | bytes], list[str]]:
        """The image files at ``index``, as bytes or where the row names a file its path, and what errors call them."""
        places = self.places[list(index)].tolist()
        cells = self.table[places][self.image]
        names = [f"{self.where}: {self.kind}, row {place}" for place in places]
        return [cell["bytes"] or Path(cell["path"]) for cell in cells], names

    def listed(self) -> Iterator[tuple[str, int]]:
        """The split and row, and the size in bytes of each image: no paths, which differ between machines."""
        places, sizes = self.places.tolist(), self.sizes.tolist()
        return ((f"{self.kind}, row {place}", size) for place, size in zip(places, sizes, strict=True))


def read(name: str, size: int | None, *, download: bool) -> Parts:
    """The data set ``name`` or ``name:config`` of the hub; or a folder saved by ``save_to_disk`` or of parquet files.

    The image column and the label column (a ClassLabel) are found by their types. The test split is ``test``, else the
    validation split, else cut from train; a split without labels (all -1) counts as missing. Code that comes with a
    data set is never run. Images are decoded like those of a folder, in a fixed random order: into memory, or above 4
    GiB of decoded images batch by batch, from the files that the library keeps on disk.

    Raises ``InputError`` without the library, for a data set that cannot be had (``download`` false: that is not on
    this machine), for columns that are missing or ambiguous, for a row without image or label, and for an unreadable
    image (once it is read, in a data set that is streamed).
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
    labels = {kind: _labels(f"hf:{name}: {kind}", rows, label) for kind, rows in wanted.items()}
    sources = {kind: Rows.of(f"hf:{name}", kind, rows, image) for kind, rows in wanted.items()}
    (first,), (shown,) = sources["train"].encoded([0])
    shape = pictures.shape_of(first, size, shown)
    in_memory = sum(len(rows) for rows in sources.values()) * shape[0] * shape[1] * shape[2] <= IN_MEMORY
    parts: dict[str, Split] = {}
    for kind, rows in sources.items():
        files = Files(rows, labels[kind], shape)
        parts[kind] = files.head(len(files)) if in_memory else files
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
        loaded = {"train": loaded}
    # A saved data set may ask for its rows as tensors of some framework.
    return {str(split): rows.with_format(None) for split, rows in loaded.items()}


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
    return any(value != -1 for value in rows[label][:])


def _labels(where: str, rows: "Dataset", label: str) -> Int64[Tensor, " n"]:
    labels = rows[label][:]
    if None in labels:
        raise InputError(f"{where}: row {labels.index(None)} has no label")
    check(rows, np.array(labels, dtype=np.int64), len(rows.features[label].names), where)
    return torch.tensor(labels)


def _sizes(where: str, table: "Dataset", image: str) -> np.ndarray:
    """The encoded bytes of each image (n,), from the table's offsets or the file that a row names."""
    from pyarrow.compute import call_function

    sizes = np.empty(len(table), dtype=np.int64)
    for begin in range(0, len(table), 10_000):
        block: Any = table.with_format("arrow")[begin : begin + 10_000]
        columns = block.flatten()
        paths = columns[f"{image}.path"]
        lengths = call_function("binary_length", [columns[f"{image}.bytes"]]).fill_null(0).to_numpy()
        sizes[begin : begin + len(lengths)] = lengths
        for i in np.flatnonzero(lengths == 0).tolist():
            path = paths[i].as_py()
            if not path:
                raise InputError(f"{where}: row {begin + i} has no image")
            try:
                sizes[begin + i] = Path(path).stat().st_size
            except (OSError, ValueError) as error:
                raise InputError(f"{where}, row {begin + i}: no such file as {path!r}") from error
    return sizes
