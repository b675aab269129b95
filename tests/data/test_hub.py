"""Data sets of the `datasets` library, built here: nothing is downloaded."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fdml.data import hub, load
from fdml.errors import InputError


def png(seed: int, side: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def datasets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))
    library.disable_progress_bars()
    return library


def rows(datasets: Any, n: int, labels: list[int] | None = None, seed: int = 0, **columns: Any) -> Any:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])}
    content = {
        "image": [{"bytes": png(seed + i), "path": None} for i in range(n)],
        "label": [i % 3 for i in range(n)] if labels is None else labels,
    }
    for name, (feature, values) in columns.items():
        features[name], content[name] = feature, values
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def test_saved_to_disk(datasets: Any, tmp_path: Path) -> None:
    splits = datasets.DatasetDict(train=rows(datasets, 30), test=rows(datasets, 9, seed=100))
    splits.save_to_disk(tmp_path / "set")
    data = load(f"hf:{tmp_path / 'set'}", val_fraction=0.2)
    assert data.classes == ("ant", "bee", "cat")
    assert data.input == (3, 8, 8)
    assert [len(part) for part in (data.train, data.val, data.test)] == [24, 6, 9]
    expected = {np.asarray(Image.open(io.BytesIO(png(100 + i)))).transpose(2, 0, 1).tobytes(): i % 3 for i in range(9)}
    test = data.test.head(9)
    got = {image.numpy().tobytes(): label for image, label in zip(test.images, test.labels.tolist(), strict=True)}
    assert got == expected
    assert load(f"hf:{tmp_path / 'set'}", size=6).input == (3, 6, 6)


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        ({"train": 30}, [21, 3, 6]),
        ({"train": 30, "validation": 6}, [26, 4, 6]),
        ({"train": 30, "validation": 6, "test": 9}, [30, 6, 9]),
    ],
)
def test_splits(datasets: Any, tmp_path: Path, splits: dict[str, int], sizes: list[int]) -> None:
    saved = datasets.DatasetDict({name: rows(datasets, n, seed=n) for name, n in splits.items()})
    saved.save_to_disk(tmp_path / "set")
    data = load(f"hf:{tmp_path / 'set'}", val_fraction=0.12)
    assert [len(part) for part in (data.train, data.val, data.test)] == sizes


def test_an_unlabelled_test_split_counts_as_missing(datasets: Any, tmp_path: Path) -> None:
    train, val, test = rows(datasets, 30), rows(datasets, 6, seed=50), rows(datasets, 9, [-1] * 9, seed=90)
    datasets.DatasetDict(train=train, validation=val, test=test).save_to_disk(tmp_path / "set")
    assert len(load(f"hf:{tmp_path / 'set'}").test) == 6


def test_a_single_saved_split_and_a_parquet_folder(datasets: Any, tmp_path: Path) -> None:
    rows(datasets, 30).save_to_disk(tmp_path / "saved")
    rows(datasets, 30).to_parquet(tmp_path / "parquet" / "train.parquet")
    one, two = load(f"hf:{tmp_path / 'saved'}"), load(f"hf:{tmp_path / 'parquet'}")
    assert one.fingerprint == two.fingerprint
    assert torch.equal(one.train.labels, two.train.labels)


def test_columns_that_do_not_fit(datasets: Any, tmp_path: Path) -> None:
    two_images = rows(datasets, 9, mask=(datasets.Image(), [{"bytes": png(1), "path": None}] * 9))
    bad = {
        "0 image columns": rows(datasets, 9).remove_columns("image"),
        "0 ClassLabel columns": rows(datasets, 9).cast_column("label", datasets.Value("int64")),
        "2 image columns": two_images.rename_column("image", "photo"),
        "no split 'train'; has other": datasets.DatasetDict(other=rows(datasets, 9)),
        "train, row 4 has no image|row 4 has no image": rows(datasets, 9).map(
            lambda row, i: {"image": None if i == 4 else row["image"]}, with_indices=True, load_from_cache_file=False
        ),
        "row 3 has no label": rows(datasets, 9, [0, 1, 2, None, 0, 1, 2, 0, 1]),  # pyright: ignore
        "label -1 is out of range": rows(datasets, 9, [0, 1, 2, -1, 0, 1, 2, 0, 1]),
        "train, row 5: not a readable PNG": rows(datasets, 5, [0] * 5),
    }
    broken = [{"bytes": png(i) if i != 5 else b"noise", "path": None} for i in range(9)]
    bad["train, row 5: not a readable PNG"] = datasets.Dataset.from_dict(
        {"image": broken, "label": [0, 1, 2] * 3}, features=rows(datasets, 1).features
    )
    for i, (says, content) in enumerate(bad.items()):
        content.save_to_disk(tmp_path / str(i))
        with pytest.raises(InputError, match=says) as caught:
            load(f"hf:{tmp_path / str(i)}")
        assert "\n" not in str(caught.value)
    assert load(f"hf:{save(two_images, tmp_path)}").input == (3, 8, 8)


def save(content: Any, folder: Path) -> Path:
    content.save_to_disk(folder / "named")
    return folder / "named"


def test_too_much_is_refused(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="GiB decoded"):
        load(f"hf:{save(rows(datasets, 30), tmp_path)}")


def test_what_is_not_there(datasets: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hf:.*cannot be loaded") as caught:
        load(f"hf:{tmp_path / 'nothing'}", download=False)
    assert "\n" not in str(caught.value)


def test_code_beside_the_data_is_not_run(datasets: Any, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(f"hf:{folder}", download=False)
    assert not marker.exists()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"hf:mnist needs the `datasets` library: pip install 'fdml\[hub\]'"):
        load("hf:mnist")
