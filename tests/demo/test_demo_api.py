"""The demo's functions for programs: the pictures that they take, and what they answer."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pairs import CLOTHES, DIGITS, PLACE
from PIL import Image

from fdml.demo import api
from fdml.demo.api import MAX_PICTURE, picture
from fdml.demo.labs import Labs
from fdml.demo.quick import gr
from fdml.errors import InputError

LABEL = DIGITS.classes[DIGITS.labels[PLACE]]


def uri(image: np.ndarray, kind: str = "png") -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_a_picture_is_named_by_its_place() -> None:
    for text, place in (("0", 0), ("7", 7), ("99", 99), ("007", 7)):
        assert np.array_equal(picture(text, DIGITS), DIGITS.images[place])


def test_a_picture_is_given_as_a_file() -> None:
    assert np.array_equal(picture(uri(DIGITS.images[3, 0]), DIGITS), DIGITS.images[3])
    large = np.full((50, 70, 3), 128, np.uint8)
    assert picture(uri(large), CLOTHES).shape == CLOTHES.input
    assert picture(uri(large, "jpeg"), CLOTHES).dtype == np.uint8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("100", "no picture 100: this exhibit has 100, counted from 0"),
        ("-1", "'-1' is neither a number nor data:image/png;base64,…"),
        ("1.0", "neither a number"),
        ("1e1", "neither a number"),
        ("", "neither a number"),
        ("٣", "'٣' is neither a number"),
        ("²", "neither a number"),
        ("1" * 5000, "neither a number"),
        ("https://example.org/cat.png", "neither a number"),
        ("data:text/html;base64,AAAA", "neither a number"),
        ("data:image/png,AAAA", "neither a number"),
        ("data:image/png;base64", "neither a number|not a readable"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,AAA", "not valid base64"),
        ("data:image/png;base64,ÄÖÜß", "not valid base64"),
        ("data:image/png;base64,AAAA", "not a readable PNG, JPEG, WebP or BMP"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "not a readable PNG, JPEG, WebP or BMP"),
        ("data:image/png;base64," + "A" * (MAX_PICTURE * 4 // 3 + 4), "larger than 8 MiB"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_no_picture(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        picture(text, DIGITS)


# The endpoints

Endpoints = dict[str, Callable[..., Any]]


@pytest.fixture(scope="module")
def endpoints() -> Iterator[Endpoints]:
    """The functions as they are given to gradio, by their names."""
    found: Endpoints = {}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "endpoint_of", lambda function, *, api_name, **_: found.update({api_name: function}))
        api.add(Labs([DIGITS]))
    yield found
    torch.set_num_threads(threads)


def test_the_endpoints_are_these_and_say_what_they_do(endpoints: Endpoints) -> None:
    assert set(endpoints) == {"models", "classify", "attack", "certify", "accuracy", "leaderboard"}
    assert all(endpoint.__doc__ for endpoint in endpoints.values())


def test_models_and_scores_are_those_that_are_shown(endpoints: Endpoints) -> None:
    (found,) = endpoints["models"]()
    assert (found["name"], found["input"], found["pictures"]) == ("digits", [1, 8, 8], 100)
    assert found["threat"] == {"norm": "linf", "eps": 0.2}
    assert [model["sha256"] for model in found["models"]] == [side.sha256 for side in DIGITS.sides]
    assert endpoints["leaderboard"]() == DIGITS.scores
    json.dumps([found, endpoints["leaderboard"]()], allow_nan=False)


def test_a_picture_is_classified(endpoints: Endpoints) -> None:
    found = endpoints["classify"]("digits", str(PLACE))
    assert [answer["class"] for answer in found.values()] == [LABEL, LABEL]
    assert endpoints["classify"]("digits", uri(DIGITS.images[PLACE, 0])) == found
    assert all(sum(answer["probabilities"]) == pytest.approx(1, abs=1e-4) for answer in found.values())


def test_an_attacked_picture_comes_back_as_a_file(endpoints: Endpoints) -> None:
    found = endpoints["attack"]("digits", str(PLACE), steps=5)
    assert (found["state"], list(found["models"])) == ("done", ["clean", "defended"])
    for key, model in found["models"].items():
        again = endpoints["classify"]("digits", model["picture"])
        assert again[key] == model["after"]
        assert model["fooled"] == (model["after"]["class"] != LABEL)
        assert model["distances"]["linf"] <= 0.2 + 1e-6
    named = endpoints["attack"]("digits", str(PLACE), norm="linf", eps=0.2, steps=5, label=LABEL)
    assert named["models"] == found["models"], "these are what it begins with"
    json.dumps(found, allow_nan=False)


def test_a_picture_is_certified(endpoints: Endpoints) -> None:
    found = endpoints["certify"]("digits", "0", sigma=0.25, samples=1000, seed=1)
    assert (found["label"], found["samples"], found["seed"]) == ("0", 1000, 1)
    assert 0 < found["radius"] < found["broken"]
    assert endpoints["certify"]("digits", "0", sigma=4.0, samples=100)["label"] is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("classify", {"exhibit": "letters"}, "unknown models 'letters': one of digits"),
        ("classify", {"image": "cat"}, "neither a number nor"),
        ("attack", {"attack": "pgd"}, "unknown attack 'pgd'"),
        ("attack", {"eps": -0.2}, "eps must be a finite number of at least 0, got -0.2"),
        ("attack", {"eps": float("nan")}, "eps must be a finite number of at least 0, got nan"),
        ("attack", {"norm": "l0"}, "unknown norm 'l0'"),
        ("attack", {"norm": "l0", "eps": 0.1}, "unknown norm 'l0'"),
        ("attack", {"target": "ten"}, "unknown class 'ten'"),
        ("attack", {"steps": -1}, "-1 steps are out of range"),
        ("certify", {"sigma": -1.0}, "noise of -1 is out of range"),
        ("certify", {"samples": 1}, "1 samples are out of range"),
        ("certify", {"model": "both"}, "no model 'both' here"),
        ("accuracy", {"norm": "l0"}, "unknown norm 'l0'"),
    ],
)
def test_a_client_is_told_what_is_wrong(name: str, options: dict[str, Any], message: str, endpoints: Endpoints) -> None:
    given = {"exhibit": "digits", "image": "0"} if name != "accuracy" else {"exhibit": "digits"}
    with pytest.raises(gr.Error) as error:
        endpoints[name](**(given | options))
    assert message in str(error.value)
