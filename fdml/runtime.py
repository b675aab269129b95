"""A deployed model inside an application: ONNX Runtime and numpy, no torch.

    from fdml import RobustClassifier

    clf = RobustClassifier.load("bundle")
    print(clf.predict("cat.png").label)

docs/embedding.md has a web handler, a batch job and a loop over the frames of a video.
"""

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from fdml import bundle as bundles
from fdml.boxed import Boxed, BoxProof
from fdml.bundle import Bundle, BundleError
from fdml.card import Card
from fdml.errors import InputError
from fdml.pixels import File, Intake, Picture, Pictures, check_batch
from fdml.session import Opened, check_file, open_session
from fdml.smoothed import ArraySmoother, Certified, Smoothing, sigma_of
from fdml.suspicion import suspicion

BATCH = 256
"""Images that are run at once, unless told otherwise."""

_OUTPUTS = ["logits"]


@dataclass(frozen=True)
class Prediction:
    """The answer about one image: the most probable class by name and by ``index``, and its ``probability``.

    ``top`` holds the names and probabilities of as many classes as were asked for, the most probable first. ``logits``
    (classes,) float32 are what the probabilities are the softmax of; they do not count when predictions are compared.
    """

    label: str
    index: int
    probability: float
    top: tuple[tuple[str, float], ...]
    logits: np.ndarray = field(compare=False, repr=False)


class RobustClassifier:
    """An exported model, ready to classify. ``load`` makes one.

    ``card`` says what the model is, ``classes`` names its answers, ``input`` is (c, h, w), ``provider`` is what
    computes it: "tensorrt", "cuda" or "cpu". ``evidence`` is what was measured of it, None for a bare ``.onnx`` file.
    All methods may be called from several threads at once.
    """

    def __init__(
        self, opened: Opened, source: Path, bundle: Bundle | None, threads: int | None, *, spin: bool = True
    ) -> None:
        self.card: Card = opened.card
        self.classes: tuple[str, ...] = opened.card.classes
        self.input: tuple[int, int, int] = opened.card.input
        self.provider: str = opened.provider
        self.evidence: dict[str, Any] | None = None if bundle is None else bundle.evidence
        self._source, self._bundle, self._threads, self._spin = source, bundle, threads, spin
        self._opened = opened
        self._run: Any = opened.session.run  # its type allows outputs that are no arrays

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the network's file, in hex: which weights answer."""
        return bundles.sha256(self._source) if self._bundle is None else self._bundle.files[bundles.MODEL]

    def __repr__(self) -> str:
        return f"RobustClassifier({os.fspath(self._source)!r}, provider={self.provider!r})"

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        provider: str = "auto",
        threads: int | None = None,
        *,
        allow_failed: bool = False,
        spin: bool = True,
    ) -> "RobustClassifier":
        """Loads a bundle, after checking its sums, or an ``.onnx`` file of `fdml export` by itself.

        ``provider`` is "cpu", "cuda", "tensorrt", or "auto" for the fastest that is there; TensorRT counts only where
        the bundle has engines for it, as building them takes minutes. ``threads`` compute one batch: give a small
        number where many requests run at once; None leaves it to ONNX Runtime. Without ``spin`` they sleep between
        batches, which leaves the cores to what else the application does.

        Raises ``BundleError``, an ``InputError``, in one line that names the file: for a bundle that is damaged or
        incomplete, a file without an fdml card, a provider that cannot be had, and a bundle whose evidence says that
        the exported network failed its checks, unless ``allow_failed``.
        """
        path = Path(path)
        found = bundles.read(path) if path.is_dir() else None
        model = path if found is None else found.model
        if found is None:
            check_file(path)
        elif not found.passed and not allow_failed:
            raise BundleError(
                f"{path / bundles.EVIDENCE}: the exported network failed its checks: export it anew, or load it with"
                " allow_failed=True"
            )
        opened = open_session(model, found, provider, threads, spin=spin)
        if found is not None and opened.card != found.card:
            raise BundleError(f"{model}: its card is not the one of {bundles.CARD}; export the model anew")
        return cls(opened, path, found, threads, spin=spin)

    # Whether an array is one image or several is seen by its axes, not by its type.
    @overload
    def predict(self, images: np.ndarray, top_k: int = 1, *, batch: int = BATCH) -> Any: ...

    @overload
    def predict(self, images: File, top_k: int = 1, *, batch: int = BATCH) -> Prediction: ...

    @overload
    def predict(self, images: Sequence[Picture], top_k: int = 1, *, batch: int = BATCH) -> list[Prediction]: ...

    def predict(self, images: Pictures, top_k: int = 1, *, batch: int = BATCH) -> Prediction | list[Prediction]:
        """The class of an image, or a list of the classes of several, in their order.

        An image is a path, the bytes of a file, an image of Pillow's or a numpy array; several are a list or tuple of
        such, or one array (n, c, h, w) or (n, h, w, c), which gives a list even for n = 1. Files and images of Pillow's
        are turned as their EXIF says, resized and centre-cropped to the model's size, as in training. Arrays must have
        that size: uint8, or floats in [0, 1]; (c, h, w), (h, w, c) or, for a model of grey images, (h, w).

        ``top_k`` classes are named in ``Prediction.top``. At most ``batch`` images are held decoded at once. Raises
        ``InputError``, in one line that names the file or the image's place: for a file that is no readable PNG, JPEG,
        WebP or BMP image, for an animation, an array of another size, type or range, and for 0 images.
        """
        if not 1 <= top_k <= len(self.classes):
            raise InputError(f"top_k={top_k} is out of range: the model has {len(self.classes)} classes")
        _check_chunk(batch)
        intake = Intake(images, self.input)
        found: list[Prediction] = []
        for first in range(0, len(intake), batch):
            logits = self._logits(intake.pixels(first, batch), batch)
            found += self._named(logits, top_k)
        return found[0] if intake.one else found

    def logits(self, images: np.ndarray, *, batch: int = BATCH) -> np.ndarray:
        """The logits (n, classes), float32, of images (n, c, h, w), float32 in [0, 1], ``batch`` at a time.

        Raises ``InputError`` for another shape or dtype, for 0 images, and for pixels that are NaN or outside [0, 1].
        """
        check_batch(images, self.input)
        _check_chunk(batch)
        return self._logits(images, batch)

    def run(self, images: np.ndarray) -> np.ndarray:
        """The logits (n, classes) of images (n, c, h, w), float32, with nothing checked: for servers, which check
        pixels in a way of their own, and for random copies, whose pixels lie outside [0, 1]."""
        return self._logits(images, BATCH, finite=False)

    def probabilities(self, images: np.ndarray, *, batch: int = BATCH) -> np.ndarray:
        """The softmax of ``logits``, (n, classes)."""
        return _softmax(self.logits(images, batch=batch))

    def predict_certified(
        self,
        images: Pictures,
        sigma: float | None = None,
        n: int = 10_000,
        alpha: float = 0.001,
        radii: Sequence[float] | None = None,
        seed: int | None = None,
        *,
        force: bool = False,
    ) -> list[Certified]:
        """The answers of the smoothed classifier with a proven L2 radius each, a list even for one image.

        ``images`` are as in ``predict``. Noise of ``sigma``, by default that of the model's training, is added to
        copies of each image, until it is decided which of the ``radii`` (by default one, two and three sigma) are
        certified, at most ``n`` copies, besides the 100 that choose the class. Each answer is wrong about the smoothed
        classifier with a chance of at most ``alpha`` (Cohen et al. 2019; docs/certify.md has the proof).

        The guarantee needs noise that whoever chose the image does not know. Without ``seed`` it is drawn anew in each
        call from the system's secure randomness; give a seed only to repeat a result, as the same seed gives an image
        at the same place the same noise, that of ``fdml certify``.

        Raises ``InputError`` for what ``predict`` refuses, for a value out of its range, and for a model that was not
        trained with noise of ``sigma``, unless ``force``: it would mostly abstain.
        """
        sigma = sigma_of(self.card, sigma, force=force)
        asked = tuple(round(k * sigma, 12) for k in (1, 2, 3)) if radii is None else tuple(radii)
        how = Smoothing(sigma, n, alpha, asked, secrets.randbits(63) if seed is None else seed)
        intake = Intake(images, self.input)
        smoother = ArraySmoother(lambda x: self._logits(x, BATCH, finite=False), self.classes, how, BATCH)
        return [smoother.certify(intake.pixels(number, 1)[0], number) for number in range(len(intake))]

    def certified_linf(self, images: Pictures, eps: float) -> list[BoxProof]:
        """The answers of the network, each with whether every image within ``eps`` (linf, pixel units) of the one that
        was given is proved to be answered alike; a list even for one image.

        ``images`` are as in ``predict``. The proof is by interval bounds with rounding included (docs/certify.md): it
        is certain, it needs no samples, and it takes a few forward passes. It shows something of networks that were
        trained for it, such as those of the recipes ``ibp`` and ``fdml-ibp``.

        Raises ``InputError`` for what ``predict`` refuses, for an eps outside [0, 1], for a bundle without bounds.onnx,
        which ``fdml export --bounds`` writes, and where another provider than "cpu" computes the network, which may
        round in ways that the bounds do not cover.
        """
        if self.provider != "cpu":
            raise InputError(f"bounds hold on a CPU, not on {self.provider}: load the bundle with provider='cpu'")
        boxed = self._boxed
        if boxed is None:
            raise InputError(f"{self._source}: has no {bundles.BOUNDS} to certify by: fdml export --bounds writes it")
        intake = Intake(images, self.input)
        return [boxed.bound(intake.pixels(number, 1)[0], eps) for number in range(len(intake))]

    @property
    def has_bounds(self) -> bool:
        """Whether ``certified_linf`` can be asked."""
        return self.provider == "cpu" and self._bundle is not None and bundles.BOUNDS in self._bundle.files

    @cached_property
    def _boxed(self) -> Boxed | None:
        return None if self._bundle is None else Boxed.load(self._bundle, self._threads, spin=self._spin)

    @property
    def has_teacher(self) -> bool:
        """Whether the bundle holds the clean teacher, which ``suspicion`` needs; nothing is opened to tell."""
        return self._bundle is not None and bundles.TEACHER in self._bundle.files

    def suspicion(self, images: Pictures, *, batch: int = BATCH) -> np.ndarray:
        """How suspicious each image is of being adversarial: (n,), float32 in [0, 1], one entry even for one image.

        It is how far the network and the clean teacher that it was trained beside disagree (``fdml.suspicion``): a
        hint, which an attacker who knows it gets around (docs/suspect.md). Of the clean images of the export one in
        twenty is above ``evidence["teacher"]["suspicion"]["p95"]``.

        ``images`` are as in ``predict``, ``batch`` are run at a time. Raises ``InputError`` for what ``predict``
        refuses, and as ``teacher_logits`` does.
        """
        _check_chunk(batch)
        intake = Intake(images, self.input)
        parts = []
        for first in range(0, len(intake), batch):
            pixels = intake.pixels(first, batch)
            parts.append(suspicion(self._logits(pixels, batch), self.teacher_logits(pixels)))
        return np.concatenate(parts)

    def teacher_logits(self, images: np.ndarray) -> np.ndarray:
        """The clean teacher's logits (n, classes) of images (n, c, h, w), float32, with nothing checked, as ``run``.

        The teacher is opened at the first call. Raises ``InputError`` for a bundle without teacher.onnx, which
        ``fdml export --teacher`` writes; ``BundleError`` for one that was exchanged, cannot be read, or takes other
        images or has other classes than the network.
        """
        return self._teacher.session.run(_OUTPUTS, {"images": images})[0]  # pyright: ignore[reportReturnType]

    @cached_property
    def _teacher(self) -> Opened:
        if self._bundle is None or not self.has_teacher:
            raise InputError(
                f"{self._source}: has no {bundles.TEACHER} to compare with: fdml export --teacher writes it"
            )
        path = self._bundle.folder / bundles.TEACHER
        if bundles.sha256(path) != self._bundle.files[bundles.TEACHER]:
            raise BundleError(f"{path}: was exchanged since the bundle was loaded: load it anew")
        # The bundle's engines are the network's, not the teacher's.
        provider = "auto" if self.provider == "tensorrt" else self.provider
        opened = open_session(path, None, provider, self._threads, spin=self._spin)
        if (opened.card.input, opened.card.classes) != (self.input, self.classes):
            raise BundleError(f"{path}: takes other images or has other classes than {bundles.MODEL}; export it anew")
        return opened

    def _logits(self, images: np.ndarray, batch: int, *, finite: bool = True) -> np.ndarray:
        batch = min(batch, self._opened.largest or batch)
        if len(images) <= batch:
            logits = self._run(_OUTPUTS, {"images": images})[0]
        else:
            parts = [images[first : first + batch] for first in range(0, len(images), batch)]
            logits = np.concatenate([self._run(_OUTPUTS, {"images": part})[0] for part in parts])
        if finite and not np.isfinite(logits).all():
            raise BundleError(f"{self._source}: the model gave a logit that is not finite; export it as fp32")
        return logits

    def _named(self, logits: np.ndarray, top_k: int) -> list[Prediction]:
        probabilities = _softmax(logits)
        # Stable, so that of equal classes the first comes first, as argmax has it.
        order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
        found = []
        for row, best in enumerate(order.tolist()):
            top = tuple((self.classes[index], float(probabilities[row, index])) for index in best)
            found.append(Prediction(top[0][0], best[0], top[0][1], top, logits[row]))
        return found


def _check_chunk(batch: int) -> None:
    if batch < 1:
        raise InputError(f"batch={batch} is out of range: at least 1 image is run at once")


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
