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
from fdml.data.dataset import Arrays, Files
from fdml.errors import InputError
from fdml.world import World


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


def rows(
    datasets: Any, n: int, labels: list[int] | None = None, seed: int = 0, images: list | None = None, **columns: Any
) -> Any:
    """``images``: the content of files, or paths, in place of made-up pictures."""
    images = [png(seed + i) for i in range(n)] if images is None else images
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])}
    content = {
        "image": [x if isinstance(x, str) else {"bytes": x, "path": None} for x in images],
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
    }
    broken = [png(i) if i != 5 else b"noise" for i in range(9)]
    bad["train, row 5: not a readable PNG"] = rows(datasets, 9, images=broken)
    for i, (says, content) in enumerate(bad.items()):
        content.save_to_disk(tmp_path / str(i))
        with pytest.raises(InputError, match=says) as caught:
            load(f"hf:{tmp_path / str(i)}")
        assert "\n" not in str(caught.value)
    assert load(f"hf:{save(two_images, tmp_path)}").input == (3, 8, 8)


def save(content: Any, folder: Path) -> Path:
    content.save_to_disk(folder / "named")
    return folder / "named"


def test_streamed_rows_are_those_in_memory(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same images, labels, order and statistics, from worker processes; the same cuts."""
    splits = datasets.DatasetDict(train=rows(datasets, 40).with_format("torch"), test=rows(datasets, 9, seed=100))
    name = f"hf:{save(splits, tmp_path)}"
    held = load(name, val_fraction=0.2)
    monkeypatch.setattr(hub, "IN_MEMORY", 1000)
    streamed = load(name, val_fraction=0.2)
    state = torch.get_rng_state()
    for one, two in ((held.train, streamed.train), (held.val, streamed.val), (held.test, streamed.test)):
        assert isinstance(one, Arrays)
        assert isinstance(two, Files)
        assert two.shape == one.shape
        asked = [torch.tensor([3, 0]), torch.tensor([5]), torch.tensor([1, 2, 3, 4])]
        for mine, other in zip(one.batches(asked), two.batches(asked), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        assert torch.equal(one.images, two.head(99).images)
    assert torch.equal(torch.get_rng_state(), state)
    assert (held.mean, held.std) == (streamed.mean, streamed.std)


def test_the_fingerprint_of_streamed_rows(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the content: not of the place, the form or the other columns; but of every size and label."""
    monkeypatch.setattr(hub, "IN_MEMORY", 1000)

    def fingerprint(content: Any, form: str) -> str:
        folder = tmp_path / form
        content.save_to_disk(folder) if form != "parquet" else content.to_parquet(folder / "train.parquet")
        return load(f"hf:{folder}").fingerprint

    here = fingerprint(rows(datasets, 30), "here")
    assert here == fingerprint(rows(datasets, 30, extra=(datasets.Value("int64"), [1] * 30)), "elsewhere")
    assert here == fingerprint(rows(datasets, 30), "parquet")
    assert here != fingerprint(rows(datasets, 30, [*([0, 1, 2] * 9), 0, 1, 1]), "label")
    assert here != fingerprint(rows(datasets, 30, images=[png(i) + bytes(i == 7) for i in range(30)]), "size")


def test_rows_that_name_files(datasets: Any, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(png(i))
    content = rows(datasets, 3, images=[str(path) for path in paths])
    named = hub.Rows.of("hf:x", "train", content, "image")
    held = hub.Rows.of("hf:x", "train", rows(datasets, 3), "image")
    assert list(named.listed()) == list(held.listed())
    assert named.encoded([2, 0])[0] == [paths[2], paths[0]]
    assert held.encoded([2, 0]) == ([png(2), png(0)], ["hf:x: train, row 2", "hf:x: train, row 0"])
    paths[1].unlink()
    with pytest.raises(InputError, match=r"hf:x: train, row 1: no such file as .*1\.png"):
        hub.Rows.of("hf:x", "train", content, "image")


def test_each_process_reads_its_own_rows(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image of the second process is damaged: the first does not notice. Resuming gives what is left."""
    monkeypatch.setattr(hub, "IN_MEMORY", 1000)
    whole = load(f"hf:{save(rows(datasets, 40), tmp_path)}").train
    assert isinstance(whole, Files)
    assert isinstance(whole.sources, hub.Rows)
    batches = torch.randperm(len(whole))[:24].view(3, 8)
    first, second = (World(rank, 2, torch.device("cpu")).rows(8) for rank in (0, 1))
    bad = {int(whole.sources.places[i]) for i in batches[:, second].flatten()} - {0}  # which gives the shape
    content = rows(datasets, 40, images=[b"noise" if i in bad else png(i) for i in range(40)])
    damaged = load(f"hf:{save(content, tmp_path / 'damaged')}").train
    read = list(damaged.batches(list(batches[:, first])))
    for batch, expected in zip(read, whole.batches(list(batches)), strict=True):
        assert torch.equal(batch.x, expected.x[first])
        assert torch.equal(batch.y, expected.y[first])
    resumed = list(damaged.batches(list(batches[1:, first])))
    assert all(torch.equal(a.x, b.x) for a, b in zip(resumed, read[1:], strict=True))
    with pytest.raises(InputError, match=r"hf:.*damaged/named: train, row \d+: not a readable PNG") as caught:
        list(damaged.batches(list(batches[:, second])))
    assert "\n" not in str(caught.value)


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
