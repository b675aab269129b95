"""What the tests of the data sets share: an empty machine (no cache, no network) and small made-up images."""

import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdml.data import places


@pytest.fixture(autouse=True)
def empty_machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import it where a test could otherwise find real files or start a download."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("FDML_DATA", raising=False)
    monkeypatch.setattr(places, "_SYSTEM", {})

    def refuse(*_args: object, **_options: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> Path:
    """Writes an image of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def class_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    """Writes folders of images: ``{"train/cat": 3}`` gives three different ones there."""
    seed = 0
    for place, count in counts.items():
        (root / place).mkdir(parents=True)
        for i in range(count):
            seed += 1
            picture(root / place / f"{i:03}.png", size, mode, seed)
    return root
