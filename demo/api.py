"""The demo's functions for programs: documented endpoints that `gradio_client` calls."""

import base64
import binascii
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fdml import pictures
from fdml.demo.exhibit import Exhibit
from fdml.demo.quick import endpoint_of, gr
from fdml.errors import InputError

if TYPE_CHECKING:
    from fdml.demo.labs import Labs

MAX_PICTURE = 8 << 20
"""Bytes of a picture that is given as text."""

_PREFIX = "data:image/"


def picture(text: str, exhibit: Exhibit) -> np.ndarray:
    """The picture that ``text`` names, uint8 (c, h, w): the place of one of the exhibit's own (``"3"``), or the file of
    an image as ``data:image/png;base64,…``. Raises ``InputError`` for anything else."""
    if text.isascii() and text.isdigit() and len(text) < 10:
        place = int(text)
        if place >= len(exhibit.images):
            raise InputError(f"there is no picture {place}: this exhibit has {len(exhibit.images)}, counted from 0")
        return exhibit.images[place]
    head, _, body = text.partition(",")
    if not head.startswith(_PREFIX) or not head.endswith(";base64"):
        raise InputError(f"the picture {text[:40]!r} is neither a number nor data:image/png;base64,…")
    if len(body) > MAX_PICTURE * 4 // 3:
        raise InputError(f"the picture is larger than {MAX_PICTURE >> 20} MiB")
    try:
        content = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise InputError("the picture is not valid base64") from None
    return pictures.read(content, exhibit.input, "the picture")


def add(labs: "Labs") -> None:
    """Adds the endpoints to the app that is being built."""

    def models() -> list[dict[str, Any]]:
        """The models that are loaded: name, classes, input (channels, height, width), threat, how many pictures."""
        return [
            {
                "name": exhibit.name,
                "models": [
                    {"key": side.key, "name": side.name, "about": side.about, "sha256": side.sha256}
                    for side in exhibit.sides
                ],
                "classes": list(exhibit.classes),
                "input": list(exhibit.input),
                "threat": {"norm": exhibit.norm, "eps": exhibit.eps},
                "pictures": len(exhibit.images),
            }
            for exhibit in labs.exhibits.values()
        ]

    def classify(exhibit: str, image: str) -> dict[str, Any]:
        """What each model makes of a picture: the class and the probabilities in the order of the classes. ``image`` is
        the number of one of the exhibit's pictures, or data:image/png;base64,…"""
        with _told():
            _check(text={"image": image})
            lab = labs[exhibit]
            found = lab.unattacked(picture(image, lab.exhibit), None)
            return {faced.side.key: _answer(lab.exhibit, faced.clean) for faced in found}

    def attack(
        exhibit: str,
        image: str,
        attack: str = "pgd-best",
        norm: str = "",
        eps: float = -1.0,
        steps: int = 0,
        target: str = "",
        label: str = "",
        whom: str = "each",
        seed: int = 0,
    ) -> dict[str, Any]:
        """Attacks a picture. ``norm`` and ``eps`` (pixel units, pixels in [0, 1]) are the threat, by default the one
        that the models were trained for; ``steps`` 0 is the attack's usual number; ``target`` and ``label`` are class
        names, empty for any other class and the model's own answer; ``whom`` is each, clean or defended. Gives, for
        each model, its answers before and after, the distances reached in each norm, and the attacked picture as
        data:image/png;base64,…"""
        with _told():
            _check(whole={"steps": steps, "seed": seed}, number={"eps": eps})
            _check(text={"image": image, "attack": attack, "norm": norm, "target": target, "label": label})
            lab = labs[exhibit]
            asked = lab.asked(
                picture(image, lab.exhibit),
                method=attack,
                norm=norm or lab.exhibit.norm,
                eps=lab.usual_eps(norm or lab.exhibit.norm) if eps == -1 else eps,
                steps=steps or None,
                target=target or None,
                label=label or None,
                whom=whom,
                seed=seed,
            )
            moment = list(lab.attack(asked))[-1]
            return {
                "state": moment.state,
                "seconds": round(moment.seconds, 3),
                "looks": moment.looks,
                "models": {faced.side.key: _faced(lab.exhibit, faced) for faced in moment.faced},
            }

    def certify(
        exhibit: str, image: str, model: str = "defended", sigma: float = 0.0, samples: int = 10_000, seed: int = -1
    ) -> dict[str, Any]:
        """Certifies a picture by randomised smoothing: no change of an l2 norm below ``radius`` makes the smoothed
        model answer another class, but for a chance of ``alpha``. ``sigma`` 0 is the usual noise; ``seed`` -1 draws
        one. ``label`` is null where nothing was shown. ``broken`` is the radius of an attack that succeeded, or
        null."""
        with _told():
            _check(whole={"samples": samples, "seed": seed}, number={"sigma": sigma}, text={"image": image})
            if seed < -1:
                raise InputError(f"seed {seed} is out of range: 0 and above, or -1 to draw one")
            lab = labs[exhibit]
            found = list(
                lab.certify(
                    picture(image, lab.exhibit),
                    model,
                    sigma=sigma or lab.exhibit.sigma,
                    samples=samples,
                    seed=None if seed < 0 else seed,
                )
            )[-1]
            return {
                "label": None if found.answer is None else lab.exhibit.classes[found.answer],
                "norm": "l2",
                "radius": found.radius,
                "broken": found.broken,
                "hits": found.hits,
                "samples": found.count,
                "sigma": found.sigma,
                "alpha": found.alpha,
                "seed": found.seed,
            }

    def accuracy(exhibit: str, norm: str = "") -> dict[str, Any]:
        """Accuracy of each model over eps on the exhibit's pictures, under PGD-20 against itself: [eps, share] each."""
        with _told():
            lab = labs[exhibit]
            found = list(lab.curves(norm or lab.exhibit.norm))[-1]
            return {key: [list(point) for point in points] for key, points in found.items()}

    def leaderboard() -> list[dict[str, Any]]:
        """What evaluations found of the models that are loaded: shares of test images answered rightly."""
        return [row for exhibit in labs.exhibits.values() for row in exhibit.scores]

    for endpoint in (models, classify, leaderboard):
        endpoint_of(endpoint, api_name=endpoint.__name__)
    for endpoint in (attack, certify, accuracy):
        endpoint_of(endpoint, api_name=endpoint.__name__, concurrency_id="compute")


def _check(
    *,
    whole: dict[str, Any] | None = None,
    number: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> None:
    """Raises ``InputError`` for a value of another type than its parameter has: gradio lets any JSON through."""
    for kind, types, values in (
        ("a whole number", (int,), whole),
        ("a number", (int, float), number),
        ("text", (str,), text),
    ):
        for name, value in (values or {}).items():
            if isinstance(value, bool) or not isinstance(value, types):
                raise InputError(f"{name} must be {kind}, got {str(value)[:40]!r}")


@contextmanager
def _told() -> Iterator[None]:
    """Turns what is wrong with an input into an error that a client is shown."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _answer(exhibit: Exhibit, seen: Any) -> dict[str, Any]:
    return {
        "class": exhibit.classes[seen.answer],
        "probabilities": [round(value, 6) for value in seen.probabilities.tolist()],
    }


def _faced(exhibit: Exhibit, faced: Any) -> dict[str, Any]:
    from fdml.showing import pixels

    return {
        "label": exhibit.classes[faced.label],
        "before": _answer(exhibit, faced.clean),
        "after": _answer(exhibit, faced.attacked),
        "fooled": faced.attacked.answer != faced.label,
        "distances": faced.distances,
        "picture": pixels(faced.attacked.x.numpy(), max(faced.attacked.x.shape)),
    }
