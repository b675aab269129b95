"""The evidence finds what an export has changed."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fdml.export.evidence import Parity, gather, most_different_layer
from fdml.threat import Threat

torch.manual_seed(0)
WEIGHT = torch.randn(3, 16)
INDEX = torch.arange(100, 140)
IMAGES = torch.rand(40, 1, 4, 4)
LABELS = (IMAGES.flatten(1) @ WEIGHT.T).argmax(1)


class Linear(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ WEIGHT.T


def evidence(artefact: Callable[[Tensor], Tensor], precision: str = "fp32", eps: float = 0.03) -> dict:
    threat = Threat("linf", eps)
    return gather(Linear(), artefact, INDEX, IMAGES, LABELS, threat, precision)


def test_the_same_model_passes() -> None:
    found = evidence(Linear())
    assert found["passed"] is True
    assert found["reason"] is None
    assert found["clean"]["largest"] == found["adversarial"]["largest"] == 0
    assert found["clean"]["agreement"] == 1
    assert found["robust_accuracy"]["source"] == found["robust_accuracy"]["artefact"] < 1
    assert found["accuracy"] == {"source": 1.0, "artefact": 1.0}


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-4), ("fp16", 1e-2)])
def test_a_difference_beyond_the_precision_fails_and_names_the_image(precision: str, allowed: float) -> None:
    def shifted(by: float) -> Callable[[Tensor], Tensor]:
        def model(x: Tensor) -> Tensor:
            logits = Linear()(x)
            hit = (x == IMAGES[7]).flatten(1).all(1)
            return torch.where(hit[:, None], logits + by, logits)

        return model

    assert evidence(shifted(0.5 * allowed), precision)["passed"]
    found = evidence(shifted(2 * allowed), precision)
    assert not found["passed"]
    assert found["clean"]["worst_image"] == 107
    assert "clean image 107 differ by" in found["reason"]
    assert precision in found["reason"]


def test_what_is_weaker_under_attack_alone_fails_in_eight_bits() -> None:
    """An artefact that masks nothing of PGD on the source, but falls to Square on itself."""

    def brittle(x: Tensor) -> Tensor:
        logits = Linear()(x)
        square = (x.flatten(1) * 255 % 1 > 1e-4).any(1)  # images that are no bytes any more
        return torch.where(square[:, None], logits.roll(1, 1), logits)

    images = (IMAGES * 255).round() / 255
    found = gather(Linear(), brittle, INDEX, images, Linear()(images).argmax(1), Threat("linf", 0.01), "int8")
    assert found["robust_accuracy"]["artefact"] < found["robust_accuracy"]["source"] - 0.01
    assert not found["passed"]
    assert "robust accuracy is" in found["reason"]
    assert evidence(lambda x: Linear()(x) + 0.5, "int8")["passed"], "logits may move, answers not"


def test_what_is_no_number_fails() -> None:
    found = evidence(lambda x: Linear()(x) * math.nan)
    assert not found["passed"]
    assert found["clean"]["largest"] is None, "JSON has no infinity"
    assert "differ by inf" in found["reason"]


def test_parity_counts_answers() -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.9]])
    after = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 1.0]])
    found = Parity.of(before, after, torch.tensor([4, 5, 6]))
    assert found.differ == (6,)
    assert found.worst == 6
    assert found.largest == pytest.approx(0.1)
    assert found.agreement == pytest.approx(2 / 3)


def test_the_layer_is_that_of_the_largest_relative_difference() -> None:
    source = {"one": torch.tensor([[100.0, 0.0]]), "two": torch.tensor([[1.0, 0.0]])}
    artefact = {"one": torch.tensor([[101.0, 0.0]]), "two": torch.tensor([[1.0, 0.5]])}
    assert most_different_layer(source, artefact) == ("two", 0.5)
