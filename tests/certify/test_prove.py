"""``fdml.certify.prove.certify``: the way in for programs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fdml
from fdml import data
from fdml.certify.by_bounds import Bounding
from fdml.certify.by_smoothing import Sampling
from fdml.certify.prove import certify
from fdml.errors import InputError
from fdml.evaluate.session import onnx_of

DIGITS = data.load("digits")
X, Y = DIGITS.test.head(6).all().x, DIGITS.test.head(6).all().y
SAMPLING = Sampling(sigma=0.25, n=1000, seed=5)


class Own(nn.Module):
    """A user's classifier, nothing of fdml about it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def without_times(found: list) -> list:
    return [{**vars(c), "seconds": 0} for c in found]


def test_any_module_is_certified_by_either_method(tmp_path: Path) -> None:
    model = Own()
    smoothed = certify(model, X, SAMPLING)
    assert len(smoothed) == 6
    assert all(c.label is None and c.norm == "l2" for c in smoothed)
    bounded = certify(model, X, Bounding(norm="linf", eps=0.001, timeout=5), labels=torch.zeros(6, dtype=torch.int64))
    answers = model(X).argmax(1).tolist()
    assert [c.answer for c in bounded] == answers
    assert any(c.status == "certified" for c in bounded)
    path = tmp_path / "own.onnx"
    path.write_bytes(onnx_of(model.eval(), X))
    again = certify(path, X, Bounding(norm="linf", eps=0.001, timeout=5), labels=torch.zeros(6, dtype=torch.int64))
    assert [(c.status, c.radius) for c in again] == [(c.status, c.radius) for c in bounded]


def test_an_image_its_number_and_the_seed_make_the_certificate(noisy: Path) -> None:
    model = fdml.load(noisy)
    together = certify(model, X, SAMPLING, labels=Y)
    apart = [
        certify(model, X[place : place + 1], SAMPLING, labels=Y[place : place + 1], numbers=[place])[0]
        for place in reversed(range(6))
    ]
    assert without_times(together) == without_times(apart[::-1])
    other = certify(model, X, Sampling(sigma=0.25, n=1000, seed=6), labels=Y)
    assert without_times(other) != without_times(together)


def test_an_image_off_the_grid_pays_for_the_distance(noisy: Path) -> None:
    model = fdml.load(noisy)
    off = (X[:1] + 0.4 / 255).clamp(0, 1)
    fixed = replace(SAMPLING, sequential=False)
    (on,), (moved,) = certify(model, X[:1], fixed), certify(model, off, fixed)
    assert on.shift == 0
    assert moved.shift is not None
    assert moved.shift == pytest.approx(float((off - X[:1]).norm()), rel=1e-5)
    assert moved.hits == on.hits, "the grid point is the same"
    assert moved.radius == pytest.approx(on.radius - moved.shift)


def test_l2_bounds_lie_inside_linf_bounds(noisy: Path) -> None:
    # The L2 ball of radius eps lies in the box of eps: what the box proves, the ball must not lose.
    model = fdml.load(noisy)
    boxes = certify(model, X, Bounding(norm="linf", eps=0.01, timeout=2))
    balls = certify(model, X, Bounding(norm="l2", eps=0.01, timeout=2))
    for box, ball in zip(boxes, balls, strict=True):
        assert box.status != "certified" or ball.status == "certified"


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (X * 255, None, r"in \[0, 1\]"),
        (X * torch.nan, None, r"in \[0, 1\]"),
        (X.to(torch.uint8), None, "float"),
        (X[0], None, "b, c, h, w"),
        (X, torch.zeros(5, dtype=torch.int64), "6 images need"),
        (X, torch.full((6,), 3), "labels are 3 to 3, the classes 0 to 2"),
    ],
)
def test_what_is_no_image_or_label_is_refused(images: torch.Tensor, labels: torch.Tensor | None, message: str) -> None:
    for settings in (SAMPLING, Bounding(norm="linf", eps=0.01)):
        with pytest.raises(InputError, match=message):
            certify(Own(), images, settings, labels=labels)


def test_no_images_have_no_certificates() -> None:
    assert certify(Own(), X[:0], SAMPLING) == []


def test_a_module_that_bounds_do_not_cover_says_so_and_is_smoothed() -> None:
    class Odd(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(super().forward(x))

    with pytest.raises(InputError, match=r"Sin.*smoothing"):
        certify(Odd(), X, Bounding(norm="linf", eps=0.01))
    assert len(certify(Odd(), X, SAMPLING)) == 6
