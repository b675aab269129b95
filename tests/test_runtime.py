import io
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from command_line import call as command
from PIL import Image
from small_bundle import CLASSES, SHAPE, card, make, network

from fdml import bundle, runtime
from fdml.bundle import BundleError
from fdml.card import Card
from fdml.errors import InputError
from fdml.runtime import RobustClassifier
from fdml.suspicion import suspicion

ROOT = Path(__file__).parents[1]
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
GREY = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("runtime") / "bundle")


@pytest.fixture(scope="module")
def clf(folder: Path) -> RobustClassifier:
    return RobustClassifier.load(folder, threads=1)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> RobustClassifier:
    return RobustClassifier.load(make(tmp_path_factory.mktemp("runtime") / "grey", card((1, 8, 8))), threads=1)


def png(picture: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def batch(n: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(2).random((n, *shape), np.float32)


def fault(call: Callable[[], object], kind: type[InputError] = InputError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_bundle_says_is_there(clf: RobustClassifier, folder: Path) -> None:
    assert clf.card == card()
    assert clf.classes == CLASSES
    assert clf.input == SHAPE
    assert clf.provider == "cpu"
    assert clf.evidence == {"passed": True, "precision": "fp32"}
    assert repr(clf) == f"RobustClassifier({str(folder)!r}, provider='cpu')"
    import fdml

    assert fdml.RobustClassifier is RobustClassifier


def test_a_model_by_itself_is_loaded_too(clf: RobustClassifier, folder: Path) -> None:
    alone = RobustClassifier.load(folder / "model.onnx", provider="cpu", threads=1)
    assert alone.card == clf.card
    assert alone.evidence is None
    assert np.array_equal(alone.logits(batch(3)), clf.logits(batch(3)))


def test_every_kind_of_image_gives_the_same_answer(clf: RobustClassifier, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png(PICTURE))
    first = PICTURE.transpose(2, 0, 1)
    floats = PICTURE.astype(np.float32) / np.float32(255)
    kinds: list[Any] = [
        path,
        str(path),
        path.read_bytes(),
        Image.fromarray(PICTURE),
        PICTURE,
        first,
        np.ascontiguousarray(first),
        floats,
        floats.transpose(2, 0, 1),
        PICTURE / 255,  # float64
        np.asfortranarray(PICTURE),
        PICTURE[::-1][::-1],
    ]
    expected = clf.predict(path, top_k=4)
    exact = clf.logits(floats.transpose(2, 0, 1)[None].copy())[0]
    assert np.array_equal(expected.logits, exact)
    for kind in kinds:
        found = clf.predict(kind, 4)
        assert found == expected
        assert np.array_equal(found.logits, expected.logits)
    for several in (kinds, tuple(kinds), np.stack([PICTURE] * 3), np.stack([first] * 3), np.stack([floats] * 3)):
        found = clf.predict(several, 4)
        assert isinstance(found, list)
        assert len(found) == len(several)
        for each in found:
            assert each.index == expected.index
            assert np.allclose(each.logits, expected.logits, rtol=1e-5, atol=1e-5)
    with Image.open(path) as opened:  # decoded only when it is asked for
        assert clf.predict(opened, 4) == expected
    assert isinstance(clf.predict(PICTURE[None]), list)


def test_grey_images_may_lack_the_channel(grey: RobustClassifier, tmp_path: Path) -> None:
    (tmp_path / "grey.png").write_bytes(png(GREY))
    expected = grey.predict(tmp_path / "grey.png")
    for kind in (GREY, GREY[None], GREY[:, :, None], Image.fromarray(GREY), GREY / np.float32(255)):
        assert np.array_equal(grey.predict(kind).logits, expected.logits)
    assert len(grey.predict(GREY[None, None])) == 1
    assert len(grey.predict(GREY[None, :, :, None])) == 1


def test_a_prediction_names_the_most_probable_classes(clf: RobustClassifier) -> None:
    found = clf.predict(PICTURE, top_k=3)
    order = np.argsort(-found.logits)
    share = np.exp(found.logits - found.logits.max())
    share /= share.sum()
    assert found.index == order[0]
    assert found.label == CLASSES[order[0]]
    assert [name for name, _ in found.top] == [CLASSES[i] for i in order[:3]]
    assert [p for _, p in found.top] == pytest.approx(share[order[:3]], rel=1e-5)
    assert found.top[0] == (found.label, found.probability)
    assert clf.predict(PICTURE).top == found.top[:1]
    assert found.logits.dtype == np.float32
    for top_k in (0, 5, -1):
        assert "the model has 4 classes" in fault(lambda top_k=top_k: clf.predict(PICTURE, top_k))


def test_arrays_are_run_as_onnx_runtime_runs_them(clf: RobustClassifier, folder: Path) -> None:
    x = batch(10)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    expected = np.asarray(session.run(["logits"], {"images": x})[0])
    assert np.allclose(clf.logits(x), expected, rtol=1e-6, atol=1e-6)
    shares = clf.probabilities(x)
    assert np.allclose(shares.sum(1), 1)
    assert np.array_equal(shares.argmax(1), expected.argmax(1))


def test_large_batches_are_run_in_pieces(clf: RobustClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    x = batch(700)
    sizes = []
    run = clf._run
    monkeypatch.setattr(
        clf, "_run", lambda names, feed: (sizes.append(len(feed["images"])), run(names, feed))[1], raising=True
    )
    found = clf.logits(x)
    assert sizes == [256, 256, 188]
    assert np.allclose(found, np.concatenate([clf.logits(x[:1]), clf.logits(x[1:], batch=699)]), rtol=1e-5, atol=1e-5)
    sizes.clear()
    assert [each.index for each in clf.predict(x, batch=300)] == found.argmax(1).tolist()
    assert sizes == [300, 300, 100]
    assert "batch=0" in fault(lambda: clf.logits(x, batch=0))
    assert "batch=0" in fault(lambda: clf.predict(x, batch=0))


def test_many_files_keep_their_order(clf: RobustClassifier, tmp_path: Path) -> None:
    pictures = np.random.default_rng(3).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    items: list[Any] = []
    for i, picture in enumerate(pictures):
        (tmp_path / f"{i}.png").write_bytes(png(picture))
        items.append([tmp_path / f"{i}.png", png(picture), picture][i % 3])
    found = clf.predict(items, batch=8)
    exact = clf.logits(pictures.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
    assert np.allclose([each.logits for each in found], exact, rtol=1e-5, atol=1e-5)


def test_threads_answer_as_one_does(clf: RobustClassifier) -> None:
    x = batch(64)
    parts = [x[i : i + 4] for i in range(0, 64, 4)]
    serial = [clf.logits(part) for part in parts]
    shown = clf.predict(PICTURE, 4)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(clf.logits, parts * 4))
        pictures = list(pool.map(lambda _: clf.predict(PICTURE, 4), range(32)))
    for i, found in enumerate(together):
        assert np.array_equal(found, serial[i % len(parts)])
    assert all(found == shown and np.array_equal(found.logits, shown.logits) for found in pictures)


def _truncated(path: Path) -> Path:
    path.write_bytes(png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))[:3000])
    return path


def _animated(path: Path) -> Path:
    frames = [Image.fromarray(picture) for picture in (PICTURE, 255 - PICTURE)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path


def _text(path: Path) -> Path:
    path.write_text("no image", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("make_file", "said"),
    [
        (_truncated, "not a readable PNG"),
        (_animated, "an animation of 2 frames"),
        (_text, "not a readable PNG"),
        (lambda path: path, "no such file"),
    ],
)
def test_a_bad_file_is_named(
    clf: RobustClassifier, tmp_path: Path, make_file: Callable[[Path], Path], said: str
) -> None:
    path = make_file(tmp_path / "bad.png")
    good = tmp_path / "good.png"
    good.write_bytes(png(PICTURE))
    for images in (path, [good, path], [good] * 6 + [path]):
        found = fault(lambda images=images: clf.predict(images))
        assert str(path) in found
        assert said in found
    if path.exists():
        found = fault(lambda: clf.predict([good, path.read_bytes()]))
        assert found.startswith("images[1]: ")
        assert said in found
        assert fault(lambda: clf.predict(path.read_bytes())).startswith("the image: ")


def test_animations_of_pillows_are_refused_and_their_frames_are_not(clf: RobustClassifier, tmp_path: Path) -> None:
    for name in ("bad.webp", "bad.gif"):
        _animated(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert "an animation of 2 frames" in fault(lambda image=image: clf.predict(image))
            assert name in fault(lambda image=image: clf.predict([PICTURE, image]))
            clf.predict(image.convert("RGB"))


def test_a_telephones_photograph_is_no_animation(clf: RobustClassifier, tmp_path: Path) -> None:
    frames = [Image.fromarray(PICTURE), Image.fromarray(PICTURE[:4, :4])]
    frames[0].save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "photo.jpg") as image:
        assert getattr(image, "n_frames", 1) == 2
    clf.predict(tmp_path / "photo.jpg")


def test_a_decompression_bomb_is_refused(
    clf: RobustClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    Image.new("L", (3000, 3000)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    assert str(path) in fault(lambda: clf.predict(path))
    assert "exceeds limit" in fault(lambda: clf.predict(path.read_bytes()))
    assert "too many" in fault(lambda: clf.predict(Image.new("L", (3000, 3000))))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "0 images"),
        ((), "0 images"),
        (np.zeros((0, 3, 8, 8), np.uint8), "0 images"),
        (np.zeros((3, 9, 8), np.uint8), "(3, 9, 8): the model takes (3, 8, 8) or (8, 8, 3)"),
        (np.zeros((8, 8), np.uint8), "(8, 8): the model takes"),
        (np.zeros((8, 8, 4), np.uint8), "(8, 8, 4)"),
        (np.zeros((2, 8, 8, 1), np.uint8), "(2, 8, 8, 1)"),
        (np.zeros((2, 2, 3, 8, 8), np.uint8), "(2, 2, 3, 8, 8)"),
        (np.zeros(7, np.uint8), "(7,)"),
        (np.uint8(3), "uint8: give a path"),
        ([np.zeros((1, 3, 8, 8), np.uint8)], "images[0] has the shape (1, 3, 8, 8)"),
        (np.zeros((3, 8, 8), np.int64), "int64 is not a type of pixels"),
        (np.zeros((3, 8, 8), bool), "bool is not a type of pixels"),
        (np.full((3, 8, 8), 128.0), "the pixel 128: pixels are finite and in [0, 1]; divide bytes by 255"),
        (np.full((3, 8, 8), -0.1, np.float32), "the pixel -0.1"),
        (np.full((3, 8, 8), np.nan, np.float32), "the pixel nan"),
        (np.full((3, 8, 8), np.inf, np.float16), "the pixel inf"),
        (np.full((3, 8, 8), 1e300), "the pixel inf"),
        ([PICTURE, PICTURE / 255 * 1.01 + 0.1], "images[1] has the pixel 1."),
        (3, "int: give a path"),
        (None, "NoneType: give a path"),
        ([PICTURE, {"a": 1}], "images[1] is of type dict"),
        (iter([PICTURE]), "give a path"),
        (Image.new("I;16", (8, 8)), "mode I;16 is not supported"),
        (Image.new("RGB", (0, 8)), "0x8 pixels are no image"),
        ("", "not a readable"),
        (b"", "not a readable PNG"),
    ],
)
def test_what_is_no_image_is_refused(clf: RobustClassifier, images: Any, said: str) -> None:
    if isinstance(images, str):
        said = "Is a directory"  # Path("") is the current folder
    assert said in fault(lambda: clf.predict(images))


def test_the_place_of_a_bad_pixel_in_a_batch_is_named(clf: RobustClassifier) -> None:
    for value in (np.nan, np.inf, -np.inf, 1.001, -1e-30):
        x = batch(300)
        x[270, 1, 2, 3] = value
        for call in (clf.predict, clf.logits, clf.probabilities):
            found = fault(lambda call=call, x=x: call(x))
            assert found.startswith("images[270] has the pixel ")
    x = np.full((2, *SHAPE), -0.0, np.float32)
    assert np.isfinite(clf.logits(x)).all()
    x[1] = 1
    assert np.isfinite(clf.logits(x)).all()


def test_a_shape_that_could_be_both_is_not_guessed(tmp_path: Path) -> None:
    cube = RobustClassifier.load(make(tmp_path / "cube", card((3, 3, 3))), threads=1)
    assert "does not tell where the channels are" in fault(lambda: cube.predict(np.zeros((3, 3, 3), np.uint8)))
    assert cube.logits(np.zeros((1, 3, 3, 3), np.float32)).shape == (1, 4)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.zeros((0, *SHAPE), np.float32), "0 images"),
        (np.zeros((1, *SHAPE)), "float64: a float32 array is needed"),
        (np.zeros((1, *SHAPE), np.uint8), "uint8: a float32 array is needed"),
        (np.zeros(SHAPE, np.float32), "shape (3, 8, 8): (n, 3, 8, 8) is needed"),
        (np.zeros((1, 8, 8, 3), np.float32), "shape (1, 8, 8, 3)"),
        ([[0.0]], "list: a float32 array is needed"),
    ],
)
def test_the_fast_path_takes_one_kind_of_array(clf: RobustClassifier, x: Any, said: str) -> None:
    assert said in fault(lambda: clf.logits(x))
    assert said in fault(lambda: clf.probabilities(x))


def test_a_file_that_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    def load(name: str, content: bytes | None = None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        found = fault(lambda: RobustClassifier.load(tmp_path / name), BundleError)
        assert str(tmp_path / name) in found
        return found

    of, whole = card(), (folder / "model.onnx").read_bytes()
    assert "cannot read it" in load("corrupt.onnx", whole[: len(whole) // 2])
    assert "cannot read it" in load("noise.onnx", b"\x00\xff" * 500)
    assert "cannot read it" in load("empty.onnx", b"")
    assert "has no fdml card" in load("foreign.onnx", network(of, metadata=None))
    assert "lacks the field" in load("hollow.onnx", network(of, metadata="{}"))
    assert "[batch, 3, 8, 8]" in load("channels.onnx", network(of, channels=1))
    assert "no such file or folder" in load("nowhere.onnx")
    assert "is no .onnx file" in load("model.safetensors", b"x")
    assert "has no SHA256SUMS" in fault(lambda: RobustClassifier.load(tmp_path), BundleError)
    (tmp_path / "sub").mkdir()
    assert "has no SHA256SUMS" in load("sub")


def test_a_bundle_must_be_whole_and_have_passed(tmp_path: Path) -> None:
    folder = make(tmp_path / "bundle")
    other = make(tmp_path / "other", card(classes=("a", "b", "c", "d")))
    (folder / "card.json").write_bytes((other / "card.json").read_bytes())
    assert "card.json: its SHA-256" in fault(lambda: RobustClassifier.load(folder), BundleError)
    from fdml.bundle import write_sums

    write_sums(folder)
    assert "its card is not the one of card.json" in fault(lambda: RobustClassifier.load(folder), BundleError)
    failed = make(tmp_path / "failed", evidence={"passed": False, "precision": "fp32"})
    assert "failed its checks" in fault(lambda: RobustClassifier.load(failed), BundleError)
    assert RobustClassifier.load(failed, allow_failed=True).predict(PICTURE).label in CLASSES


def test_a_model_that_overflows_says_so(tmp_path: Path) -> None:
    clf = RobustClassifier.load(make(tmp_path / "large", scale=4e38), threads=1)
    assert "not finite" in fault(lambda: clf.predict(PICTURE), BundleError)


def test_a_provider_that_cannot_be_had_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did you mean 'cuda'" in fault(lambda: RobustClassifier.load(folder, "cudo"))
    assert "threads=0" in fault(lambda: RobustClassifier.load(folder, threads=0))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for name in ("cuda", "tensorrt"):
        found = fault(lambda name=name: RobustClassifier.load(folder, name), BundleError)
        assert "onnxruntime here has no" in found
        assert "fdml[gpu]" in found


def test_a_silent_fall_back_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU build without its libraries: the provider is listed, and the session is on the CPU without a word."""
    real = onnxruntime.InferenceSession
    tried = []

    def session(path: str, options: Any, providers: list, **how: Any) -> Any:
        tried.append([name for name, _ in providers])
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    assert "could not be loaded" in fault(lambda: RobustClassifier.load(folder, "cuda"), BundleError)
    assert RobustClassifier.load(folder).provider == "cpu"
    assert tried[-2:] == [["CUDAExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"]]


def test_certificates_repeat_with_a_seed_and_differ_without(clf: RobustClassifier) -> None:
    images = [PICTURE, 255 - PICTURE]
    first = clf.predict_certified(images, n=600, seed=1)
    assert first == clf.predict_certified(np.stack(images), n=600, seed=1)
    assert len(first) == 2
    for found in first:
        assert (found.alpha, found.sigma) == (0.001, 0.25)
        assert 0 <= found.hits <= found.n <= 600
        assert found.abstained == (found.label is None) == (found.index is None) == (found.radius == 0)
        if found.index is not None:
            assert found.label == CLASSES[found.index]
    one = clf.predict_certified(PICTURE, n=600, seed=1)
    assert one == first[:1]
    seeds = []
    draw = runtime.secrets.randbits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.secrets, "randbits", lambda bits: seeds.append(draw(bits)) or seeds[-1])
        clf.predict_certified(PICTURE, n=100)
        clf.predict_certified(PICTURE, n=100)
    assert len(set(seeds)) == 2


def test_certificates_are_those_of_certify(clf: RobustClassifier) -> None:
    import torch

    from fdml.certify.noise import GridNoise
    from fdml.certify.smoothing import ABSTAIN, Smoother

    def classify(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(clf._logits(x.numpy(), 256))

    images = np.random.default_rng(4).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    found = clf.predict_certified(images, sigma=0.1, n=2000, radii=(0.05, 0.1, 0.2), seed=3, force=True)
    theirs = Smoother(classify, len(CLASSES), GridNoise(0.1, 3), batch=256)
    for number, image in enumerate(images):
        expected = theirs.sequential(torch.from_numpy(image), number, (0.05, 0.1, 0.2), samples=2000)
        ours = found[number]
        assert (ABSTAIN if ours.index is None else ours.index) == expected.answer
        assert (ours.radius, ours.hits, ours.n) == (expected.radius, expected.hits, expected.count)
    assert any(not each.abstained for each in found)


def test_certificates_need_a_model_that_knows_the_noise(clf: RobustClassifier, tmp_path: Path) -> None:
    assert "trained with sigma=0.25" in fault(lambda: clf.predict_certified(PICTURE, 0.5))
    assert clf.predict_certified(PICTURE, 0.5, n=100, force=True)[0].sigma == 0.5
    plain = RobustClassifier.load(make(tmp_path / "plain", card(sigma=0)), threads=1)
    assert "trained with no noise" in fault(lambda: plain.predict_certified(PICTURE))
    assert "trained with no noise" in fault(lambda: plain.predict_certified(PICTURE, 0.25))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"sigma": 5.0}, "sigma=5"),
        ({"alpha": 0.5}, "alpha=0.5"),
        ({"n": 99}, "n=99"),
        ({"radii": [-1.0]}, "radius=-1"),
        ({"radii": [float("nan")]}, "radius=nan"),
    ],
)
def test_smoothing_has_its_limits(clf: RobustClassifier, how: dict[str, Any], said: str) -> None:
    assert said in fault(lambda: clf.predict_certified(PICTURE, **{"force": True, **how}))
    assert "0 images" in fault(lambda: clf.predict_certified([]))


def test_neither_torch_nor_scipy_is_imported(folder: Path) -> None:
    code = f"""
import sys
import numpy as np
from fdml import RobustClassifier
clf = RobustClassifier.load({str(folder)!r})
clf.predict(np.zeros((8, 8, 3), np.uint8))
clf.predict_certified(np.zeros((8, 8, 3), np.uint8), n=200)
print([name for name in ("torch", "scipy", "safetensors", "rich", "typer") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert not done.stderr


def test_a_missing_onnxruntime_is_said_with_what_to_install(folder: Path) -> None:
    code = f"""
import sys
sys.modules["onnxruntime"] = None  # what an import system without it answers
from fdml import RobustClassifier
try:
    RobustClassifier.load({str(folder)!r})
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("running a bundle needs onnxruntime: pip install"), done.stderr


def with_teacher(folder: Path, of: Card | None = None) -> Path:
    """The bundle in ``folder`` with a teacher, by default of the same classes and other weights."""
    (folder / bundle.TEACHER).write_bytes(network(of or card(), scale=1.0))
    bundle.write_sums(folder)
    return folder


def test_suspicion_is_the_disagreement_with_the_teacher(tmp_path: Path) -> None:
    folder = with_teacher(make(tmp_path / "pair"))
    pair = RobustClassifier.load(folder, threads=1)
    images = batch(5)
    assert pair.has_teacher
    teacher = pair.teacher_logits(images)
    alone = RobustClassifier.load(folder / "teacher.onnx", threads=1)
    assert np.array_equal(teacher, alone.logits(images))
    expected = suspicion(pair.logits(images), teacher)
    assert expected.max() > 0.01
    for size in (2, 256):
        found = pair.suspicion(images, batch=size)
        assert found.dtype == np.float32
        assert np.allclose(found, expected, atol=1e-5)
    (tmp_path / "picture.png").write_bytes(png(PICTURE))
    one = pair.suspicion(PICTURE)
    assert one.shape == (1,)
    assert np.array_equal(one, pair.suspicion(tmp_path / "picture.png"))
    assert "0 images" in fault(lambda: pair.suspicion([]))
    with ThreadPoolExecutor(4) as pool:
        fresh = RobustClassifier.load(folder, threads=1)
        assert all(np.array_equal(each, one) for each in pool.map(lambda _: fresh.suspicion(PICTURE), range(8)))


def test_predict_shows_the_suspicion(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(png(PICTURE))
    folder = make(tmp_path / "pair")
    _, plain, _ = command("predict", folder, tmp_path / "picture.png")
    assert "suspect" not in plain
    with_teacher(folder)
    code, text, err = command("predict", folder, tmp_path / "picture.png", "--top", 2, "--json")
    assert (code, err) == (0, "")
    (answer,) = json.loads(text)
    expected = float(RobustClassifier.load(folder).suspicion(PICTURE)[0])
    assert answer["suspect"] == pytest.approx(expected, abs=1e-5)
    code, text, _ = command("predict", folder, tmp_path / "picture.png", "--top", 2)
    assert code == 0
    assert "suspect" in text
    assert f"{expected:.2f}" in text


def test_a_bundle_without_a_teacher_has_no_suspicion(clf: RobustClassifier, folder: Path) -> None:
    alone = RobustClassifier.load(folder / "model.onnx", provider="cpu", threads=1)
    for each in (clf, alone):
        assert not each.has_teacher
        for ask in (each.suspicion, each.teacher_logits):
            assert "fdml export --teacher writes it" in fault(lambda ask=ask: ask(batch(1)))


@pytest.mark.parametrize("of", [card(classes=("cat", "dog", "owl")), card(classes=CLASSES[::-1]), card((3, 9, 9))])
def test_a_teacher_of_something_else_is_refused(of: Card, tmp_path: Path) -> None:
    pair = RobustClassifier.load(with_teacher(make(tmp_path / "pair"), of), threads=1)
    said = fault(lambda: pair.suspicion(batch(1)), BundleError)
    assert "teacher.onnx: takes other images or has other classes" in said


def test_a_teacher_that_was_exchanged_or_is_damaged_is_refused(tmp_path: Path) -> None:
    folder = with_teacher(make(tmp_path / "pair"))
    pair = RobustClassifier.load(folder, threads=1)
    (folder / "teacher.onnx").write_bytes(b"something else")
    assert "exchanged" in fault(lambda: pair.suspicion(batch(1)), BundleError)
    bundle.write_sums(folder)
    pair = RobustClassifier.load(folder, threads=1)
    assert "cannot read it" in fault(lambda: pair.suspicion(batch(1)), BundleError)
    (folder / "teacher.onnx").write_bytes(network(card(), metadata=None))
    bundle.write_sums(folder)
    pair = RobustClassifier.load(folder, threads=1)
    assert "no fdml card" in fault(lambda: pair.teacher_logits(batch(1)), BundleError)
