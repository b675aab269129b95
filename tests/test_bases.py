"""The methods' terms, held against what their papers write."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdml.adversary import inner_attack
from fdml.bases import BASES, Batch
from fdml.guidance import Advice
from fdml.recipe import Recipe
from fdml.recipes import recipe
from fdml.threat import Threat


def batch(forward: Callable[[Tensor], Tensor], *, advice: Advice | None = None) -> Batch:
    x = torch.rand(6, 1, 4, 4)
    y = torch.arange(6) % 3
    return Batch(x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1), y, F.one_hot(y, 3).float(), advice, forward)


def linear() -> Callable[[Tensor], Tensor]:
    layer = nn.Linear(16, 3)
    return lambda images: layer(images.flatten(1))


def terms(name: str, one: Batch) -> dict[str, Tensor]:
    return BASES[name](recipe(name) if name != "ce" else recipe("pgd-at"), one, one.forward(one.x_adv))


def test_every_base_that_a_recipe_may_name_is_there() -> None:
    for name in BASES:
        assert Recipe(name="any", base=name).base == name  # pyright: ignore[reportArgumentType]


def test_alp_pairs_the_logits() -> None:
    model = linear()
    one = batch(model)
    found = terms("alp", one)
    clean, adversarial = model(one.x), model(one.x_adv)
    both = (F.cross_entropy(clean, one.y) + F.cross_entropy(adversarial, one.y)) / 2
    torch.testing.assert_close(found["ce"], both)
    torch.testing.assert_close(found["alp"], 0.5 * (clean - adversarial).square().mean())


def test_hat_labels_images_beyond_the_adversarial_ones_by_the_teacher() -> None:
    model, asked = linear(), []

    def forward(images: Tensor) -> Tensor:
        asked.append(images)
        return model(images)

    teacher = torch.randn(6, 3)
    one = batch(forward, advice=Advice(torch.randn(6, 3), {}, teacher))
    found = terms("hat", one)
    helper = 2 * one.x_adv - one.x
    assert any(torch.allclose(images, helper) for images in asked)
    torch.testing.assert_close(found["helper"], 0.5 * F.cross_entropy(model(helper), teacher.argmax(1)))
    same = terms("trades", one)
    torch.testing.assert_close(found["ce"], same["ce"])
    torch.testing.assert_close(found["kl"] / 2.5, same["kl"] / 6)


def test_rslad_is_content_where_the_student_answers_as_the_teacher() -> None:
    answer = torch.randn(6, 3)
    found = terms("rslad", batch(lambda _images: answer, advice=Advice(answer, {})))
    assert all(float(term) == pytest.approx(0, abs=1e-6) for term in found.values())
    other = terms("rslad", batch(lambda _images: answer.flip(1), advice=Advice(answer, {})))
    p, q = answer.softmax(1), answer.flip(1).softmax(1)
    divergence = float((p * (p / q).log()).sum(1).mean())
    assert float(other["kl"]) == pytest.approx(5 / 6 * divergence, rel=1e-4)
    assert float(other["kl_clean"]) == pytest.approx(1 / 6 * divergence, rel=1e-4)


def test_the_inner_attack_of_rslad_leaves_the_teachers_answer() -> None:
    model = linear()
    x = torch.rand(6, 1, 4, 4)
    chosen = replace(recipe("rslad"), attack_steps=5)
    threat = Threat("linf", 0.1)
    answer = torch.randn(6, 3)
    x_adv = inner_attack(chosen, model, x, x, torch.zeros(6).long(), threat, advice=Advice(answer, {}))
    assert threat.contains(x_adv, x).all()

    def away(images: Tensor) -> Tensor:
        p = answer.softmax(1)
        return (p * (p.log() - model(images).log_softmax(1))).sum(1)

    assert (away(x_adv) > away(x)).all()
