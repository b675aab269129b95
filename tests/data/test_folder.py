"""Folders of images: in memory, and streamed."""

import multiprocessing
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import class_folder, picture
from PIL import Image

from fdml import pictures as images
from fdml.data import folder, load
from fdml.data.dataset import Arrays, Files, channel_statistics
from fdml.errors import InputError


def test_classes_are_the_sorted_names(tmp_path: Path) -> None:
    data = load(f"folder:{class_folder(tmp_path / 'pictures', {'emu': 20, 'ant': 10, 'Cat': 20})}", val_fraction=0.25)
    assert data.classes == ("Cat", "ant", "emu")
    assert data.input == (3, 8, 8)
    assert [len(part) for part in (data.train, data.val, data.test)] == [30, 10, 10]
    assert torch.bincount(data.test.labels).tolist() == [4, 2, 4]


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ({"train/a": 10, "train/b": 10}, [14, 2, 4]),
        ({"train/a": 10, "train/b": 10, "test/a": 3, "test/b": 3}, [18, 2, 6]),
        ({"train/a": 10, "train/b": 10, "valid/a": 3, "valid/b": 4}, [18, 2, 7]),
        ({"train/a": 10, "train/b": 10, "validation/a": 3, "test/b": 4}, [20, 3, 4]),
        ({"train/a/deep/er": 10, "train/b": 10, "val/a": 3, "test/b": 4, "notes": 0}, [20, 3, 4]),
        ({"test": 10, "good": 10}, [14, 2, 4]),
    ],
)
def test_splits(tmp_path: Path, counts: dict[str, int], sizes: list[int]) -> None:
    data = load(f"folder:{class_folder(tmp_path / 'pictures', counts)}")
    assert [len(part) for part in (data.train, data.val, data.test)] == sizes


def test_pixels_labels_and_files_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder in memory and streamed: same images, labels, order and statistics."""
    root = class_folder(tmp_path / "pictures", {"a": 12, "b": 12})
    arrays = load(f"folder:{root}")
    monkeypatch.setattr(folder, "IN_MEMORY", 0)
    files = load(f"folder:{root}")
    assert isinstance(arrays.train, Arrays)
    assert isinstance(files.train, Files)
    assert isinstance(files.train.sources, folder.Paths)
    assert files.train.to("cpu").shape == arrays.train.shape
    asked = [torch.tensor([3, 0]), torch.tensor([5]), torch.tensor([1, 2, 3, 4])]
    state = torch.get_rng_state()
    for one, two in zip(arrays.train.batches(asked), files.train.batches(asked), strict=True):
        assert all(torch.equal(mine, other) for mine, other in zip(one, two, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(files.test.head(3).images, arrays.test.head(3).images)
    assert channel_statistics(files.train) == channel_statistics(arrays.train)
    for index, name in enumerate(files.train.sources.names):
        with Image.open(root / name) as image:
            assert torch.equal(files.train.head(99).images[index].permute(1, 2, 0), torch.tensor(np.asarray(image)))
        assert files.classes[files.train.labels[index]] == name.split("/")[0]
    assert list(files.train.batches([])) == []
    assert files.fingerprint == load(f"folder:{root}").fingerprint
    first = root / files.train.sources.names[0]
    first.write_bytes(first.read_bytes() + b"more")
    assert files.fingerprint != load(f"folder:{root}").fingerprint


def test_stopping_early_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "IN_MEMORY", 0)
    train = load(f"folder:{class_folder(tmp_path / 'pictures', {'a': 12, 'b': 12})}").train
    batches = train.batches([torch.tensor([i]) for i in range(10)])
    next(batches)
    del batches
    assert multiprocessing.active_children() == []


def test_grey_or_colour_is_decided_by_the_first_image(tmp_path: Path) -> None:
    for name, first, second in (("grey", "L", "RGB"), ("colour", "RGB", "L")):
        root = tmp_path / name
        for place, mode in (("a/0.png", first), ("a/1.bmp", second), ("b/0.jpg", first), ("b/1.webp", second)):
            picture(root / place, mode=mode)
        for place in ("a", "b"):
            for extra in range(2, 8):
                picture(root / place / f"{extra}.jpeg", mode="L", seed=extra)
        (root / "a" / ".hidden.png").write_bytes(b"not an image")
        (root / "b" / "notes.txt").write_bytes(b"not an image")
        assert load(f"folder:{root}").input == ((1 if first == "L" else 3), 8, 8)


def test_images_are_brought_to_one_size(tmp_path: Path) -> None:
    for i, size in enumerate([(8, 8), (16, 8), (8, 24), (5, 7), (64, 48), (9, 9)] * 2):
        picture(tmp_path / "ab"[i % 2] / f"{i:02}.png", size=size, seed=i)
    assert load(f"folder:{tmp_path}").input == (3, 8, 8)
    assert load(f"folder:{tmp_path}", size=12).input == (3, 12, 12)
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (images.read(tmp_path / "wide.png", (3, 8, 8)) == 200).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(path)
    for channels in (1, 3):
        pixels = images.read(path, (channels, 4, 4))
        assert pixels.shape == (channels, 4, 4)
        assert pixels.dtype == np.uint8
        assert (pixels == 255).all()


def test_a_palette_with_transparency_does_not_warn(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([9, 9, 9] * 256)
    image.save(tmp_path / "image.png", transparency=bytes(range(256)))
    assert (images.read(tmp_path / "image.png", (3, 4, 4)) == 9).all()


def test_the_camera_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("L", (4, 2))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show it upright
    image.save(tmp_path / "image.png", exif=exif)
    assert images.shape_of(tmp_path / "image.png", 4) == (1, 4, 4)
    assert images.read(tmp_path / "image.png", (1, 4, 2))[0, 0, 1] == 255


def damage(root: Path, what: str) -> None:
    victim = root / "b" / "003.png"
    if what == "truncated":
        victim.write_bytes(victim.read_bytes()[:60])
    elif what == "noise":
        victim.write_bytes(os.urandom(300))
    elif what == "empty":
        victim.write_bytes(b"")
    elif what == "16 bits":
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(victim)
    elif what == "another format":
        Image.new("RGB", (8, 8)).save(victim, format="GIF")
    else:
        victim.write_bytes(BOMB)


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


# A PNG that announces 60,000 x 60,000 pixels.
SIDES = (60_000).to_bytes(4, "big") * 2
BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", SIDES + bytes((8, 0, 0, 0, 0))) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("what", "streamed", "says"),
    [
        ("truncated", False, "not a readable PNG"),
        ("noise", False, "not a readable PNG"),
        ("empty", False, "not a readable PNG"),
        ("16 bits", False, "convert the image to 8 bits"),
        ("another format", False, "not a readable PNG"),
        ("bomb", False, "decompression bomb"),
        ("truncated", True, "not a readable PNG"),
        ("bomb", True, "decompression bomb"),
    ],
)
def test_an_unreadable_image_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, streamed: bool, says: str
) -> None:
    root = class_folder(tmp_path / "pictures", {"a": 6, "b": 6})
    damage(root, what)

    def read_all() -> None:
        data = load(f"folder:{root}")
        for part in (data.train, data.val, data.test):
            list(part.batches([torch.arange(len(part))]))

    if streamed:
        monkeypatch.setattr(folder, "IN_MEMORY", 0)
        load(f"folder:{root}")  # fails only when the image's turn comes
    with pytest.raises(InputError, match=says) as caught:
        read_all()
    assert "003.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_above_pillows_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture(tmp_path / "image.png", size=(30, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert images.read(path, (3, 8, 8)).shape == (3, 8, 8)
    for limit in (599, 100):  # where Pillow warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match=r"image\.png"):
            images.read(path, (3, 8, 8))


@pytest.mark.parametrize(
    ("counts", "options", "says"),
    [
        ({}, {}, "no such folder"),
        ({"a": 0}, {}, "at least two classes, has 1"),
        ({"a": 5}, {}, "at least two classes, has 1"),
        ({"train/a": 5}, {}, "at least two classes, has 1"),
        ({"a": 5, "b": 0}, {}, "b: no images"),
        ({"train/a": 5, "train/b": 5, "test/a": 5, "test/b": 0}, {}, "b: no images"),
        ({"train/a": 5, "train/b": 5, "test/c": 5}, {}, "train has no class 'c'"),
        ({"train/a": 5, "train/b": 5, "test": 0}, {}, "test: no images"),
        ({"train/a": 5, "train/b": 5, "val/a": 5, "valid/a": 5}, {}, "both val/ and valid/"),
        ({"test/a": 5, "test/b": 5, "val/a": 5}, {}, "but no train/"),
        ({"a": 5, "b": 5}, {"size": (9, 8)}, "the first image is 9x8; give a size"),
        ({"a": 1, "b": 1}, {"size": (1025, 1025), "mode": "L"}, "the first image is 1025x1025"),
        ({"a": 1, "b": 1}, {}, "too few images"),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, counts: dict[str, int], options: dict[str, Any], says: str) -> None:
    if counts:
        class_folder(tmp_path / "pictures", counts, **options)
    with pytest.raises(InputError, match=says) as caught:
        load(f"folder:{tmp_path / 'pictures'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, -1, 1025])
def test_sizes_out_of_range(tmp_path: Path, size: int) -> None:
    with pytest.raises(InputError, match="size must be from 1 to 1024"):
        load(f"folder:{class_folder(tmp_path / 'pictures', {'a': 5, 'b': 5})}", size=size)


@pytest.mark.parametrize("kind", ["file out", "file in", "class", "deep", "dangling out", "dangling in", "pipe"])
def test_links(tmp_path: Path, kind: str) -> None:
    root = class_folder(tmp_path / "pictures", {"a": 6, "b": 6})
    outside = picture(tmp_path / "elsewhere" / "secret.png")
    link, target = {
        "file out": (root / "a" / "link.png", outside),
        "file in": (root / "a" / "link.png", root / "b" / "000.png"),
        "class": (root / "c", outside.parent),
        "deep": (root / "a" / "more", root / "b"),
        "dangling out": (root / "a" / "link.png", tmp_path / "nothing.png"),
        "dangling in": (root / "a" / "link.png", root / "nothing.png"),
        "pipe": (root / "a" / "link.png", root / "pipe"),
    }[kind]
    link.symlink_to(target)
    if kind == "pipe":
        os.mkfifo(target)
    if kind == "file in":
        data = load(f"folder:{root}")
        assert len(data.train) + len(data.val) + len(data.test) == 13
        return
    says = "not a file" if target.parent == root and link.suffix else "leads out of" if link.suffix else "linked folder"
    with pytest.raises(InputError, match=says) as caught:
        load(f"folder:{root}")
    assert str(link) in str(caught.value)
