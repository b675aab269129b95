"""The methods' terms, held against what their papers write."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdml import losses
from fdml.adversary import attack_start, inner_attack, most_confused
from fdml.bases import BASES, Step, further
from fdml.errors import InputError
from fdml.guidance import Advice
from fdml.recipe import Recipe
from fdml.recipes import recipe
from fdml.threat import Threat
from fdml.train_batch import TrainBatch

Forward = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class Small(nn.Module):
    """Logits and two taps of 6 grey images of 4x4."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial, self.head = nn.Conv2d(1, 5, 1), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        spatial = self.spatial(images).relu()
        pooled = spatial.mean((2, 3))
        return self.head(pooled), {"stage": spatial, "features": pooled}


def no_peer(_images: Tensor) -> Tensor:
    raise AssertionError("this method has no peer")


def step_of(forward: Forward, *, advice: Advice | None = None, peer: Callable = no_peer, **more: Tensor) -> Step:
    x = torch.rand(6, 1, 4, 4)
    y = torch.arange(6) % 3
    batch = TrainBatch(x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1), y, advice, **more)  # pyright: ignore[reportArgumentType]
    logits, taps = forward(batch.x_adv)
    target = F.one_hot(y, 3).float()
    return Step(batch, logits, taps, target, (), peer, lambda rows: rows, ("stage", "features"))


def terms(name: str, step: Step, forward: Forward, **changes: float) -> dict[str, Tensor]:
    chosen = replace(recipe(name), **changes)  # pyright: ignore[reportArgumentType]
    others = tuple(forward(images) for images in further(chosen, step.batch))
    return BASES[name](chosen, replace(step, others=others))


def test_every_base_that_a_recipe_may_name_is_there() -> None:
    for name in BASES:
        assert Recipe(name="any", base=name).base == name  # pyright: ignore[reportArgumentType]


def test_alp_pairs_the_logits() -> None:
    model = Small()
    step = step_of(model)
    found = terms("alp", step, model)
    clean, adversarial = model(step.batch.x)[0], model(step.batch.x_adv)[0]
    both = (F.cross_entropy(clean, step.batch.y) + F.cross_entropy(adversarial, step.batch.y)) / 2
    torch.testing.assert_close(found["ce"], both)
    torch.testing.assert_close(found["alp"], 0.5 * (clean - adversarial).square().mean())


def test_hat_labels_images_beyond_the_adversarial_ones_by_the_teacher() -> None:
    model, asked = Small(), []

    def forward(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        asked.append(images)
        return model(images)

    teacher = torch.randn(6, 3)
    step = step_of(forward, advice=Advice(torch.randn(6, 3), {}, teacher))
    found = terms("hat", step, forward)
    helper = 2 * step.batch.x_adv - step.batch.x
    assert any(torch.allclose(images, helper) for images in asked)
    torch.testing.assert_close(found["helper"], 0.5 * F.cross_entropy(model(helper)[0], teacher.argmax(1)))
    same = terms("trades", step, model)
    torch.testing.assert_close(found["ce"], same["ce"])
    torch.testing.assert_close(found["kl"] / 2.5, same["kl"] / 6)


def test_rslad_is_content_where_the_student_answers_as_the_teacher() -> None:
    answer = torch.randn(6, 3)

    def as_teacher(_images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return answer, {}

    def otherwise(_images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return answer.flip(1), {}

    found = terms("rslad", step_of(as_teacher, advice=Advice(answer, {})), as_teacher)
    assert all(float(term) == pytest.approx(0, abs=1e-6) for term in found.values())
    other = terms("rslad", step_of(otherwise, advice=Advice(answer, {})), otherwise)
    p, q = answer.softmax(1), answer.flip(1).softmax(1)
    divergence = float((p * (p / q).log()).sum(1).mean())
    assert float(other["kl"]) == pytest.approx(5 / 6 * divergence, rel=1e-4)
    assert float(other["kl_clean"]) == pytest.approx(1 / 6 * divergence, rel=1e-4)


def test_the_inner_attack_of_rslad_leaves_the_teachers_answer() -> None:
    model = logits_of(Small())
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


def test_tla_has_a_triplet_with_the_own_image_and_one_with_another_of_the_class() -> None:
    model = Small()
    beside, choice = torch.rand(6, 1, 4, 4), torch.rand(6, 6)
    step = step_of(model, beside=beside, choice=choice)
    found = terms("tla", step, model)
    y = step.batch.y
    anchor, candidates = step.taps["features"].detach(), model(beside)[1]["features"].detach()

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(a, b, dim=0)

    wanted = torch.tensor(0.0)
    for i in range(6):
        others = [j for j in range(6) if y[j] != y[i]]
        negative = min(others, key=lambda j, i=i: float(distance(anchor[i], candidates[j])))
        same = max((j for j in range(6) if y[j] == y[i]), key=lambda j, i=i: float(choice[i, j]))
        for positive in (i, same):
            hinge = 0.03 + distance(anchor[i], candidates[positive]) - distance(anchor[i], candidates[negative])
            parts = (anchor[i], candidates[positive], candidates[negative])
            wanted = wanted + hinge.relu() / 6 + 1e-3 * sum(part.square().mean() for part in parts) / 18
    torch.testing.assert_close(found["triplet"].detach(), 2.0 * wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["ce"], F.cross_entropy(step.logits, y))


def test_agkd_bml_is_content_with_the_teachers_attention() -> None:
    model = Small()
    step = step_of(model, beside=torch.rand(6, 1, 4, 4))
    backward = step.batch.beside
    assert backward is not None

    def answers(images: Tensor, scale: float) -> Advice:
        return Advice(torch.randn(6, 3), {"stage": scale * model(images)[1]["stage"]})

    batch = replace(step.batch, advice=answers(step.batch.x_adv, 3.0), beside_advice=answers(backward, 0.5))
    found = terms("agkd-bml", replace(step, batch=batch), model)
    assert found.keys() == {"ce", "bce", "kl", "attention", "triplet"}
    # A map is brought to [0, 1], whatever its scale.
    assert float(found["attention"].detach()) == pytest.approx(0, abs=1e-5)
    batch = replace(batch, advice=Advice(torch.randn(6, 3), {"stage": torch.rand(6, 5, 4, 4)}))
    assert float(terms("agkd-bml", replace(step, batch=batch), model)["attention"].detach()) > 0.01
    clean = model(step.batch.x)[0].softmax(1)
    p = step.logits.softmax(1)
    mart = -torch.log(1.0001 - p.scatter(1, batch.y[:, None], 0).amax(1)).mean()
    torch.testing.assert_close(found["bce"], mart)
    drift = (clean * (clean / p).log()).sum(1) * (1 - clean.gather(1, batch.y[:, None]).squeeze(1))
    torch.testing.assert_close(found["kl"], 6 * drift.mean(), atol=1e-6, rtol=1e-4)


def test_lbgat_pulls_student_and_peer_together() -> None:
    model, peer = Small(), Small()
    step = step_of(model, peer=lambda images: peer(images)[0])
    found = terms("lbgat", step, model)
    assert found.keys() == {"mse", "ce"}
    natural = peer(step.batch.x)[0]
    torch.testing.assert_close(found["mse"], (step.logits - natural).square().mean())
    torch.testing.assert_close(found["ce"], F.cross_entropy(natural, step.batch.y))
    gradients = torch.autograd.grad(found["mse"], [*peer.parameters(), *model.parameters()])
    assert all(bool(gradient.any()) for gradient in gradients)
    six = terms("lbgat", step, model, beta=6.0)
    torch.testing.assert_close(six["kl"], terms("trades", step, model)["kl"])


def test_a_targeted_inner_attack_approaches_the_confused_class() -> None:
    model = logits_of(Small())
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    goal = most_confused(model, x, y)
    assert bool((goal != y).all())
    others = model(x).detach().scatter(1, y[:, None], -torch.inf)
    torch.testing.assert_close(others.gather(1, goal[:, None]).squeeze(1), others.amax(1))
    chosen, threat = replace(recipe("pgd-at"), attack_steps=5, attack_target="confused"), Threat("linf", 0.1)
    x_adv = inner_attack(chosen, model, x, x, y, threat, goal=goal)
    assert threat.contains(x_adv, x).all()
    assert bool((losses.cross_entropy(model(x_adv), goal) < losses.cross_entropy(model(x), goal)).all())


@pytest.mark.parametrize(
    ("name", "start", "near"),
    [
        ("pgd-at", "published", False),
        ("trades", "published", True),
        ("rslad", "published", True),
        ("trades", "random", False),
        ("pgd-at", "near", True),
    ],
)
def test_where_the_inner_attack_starts(name: str, start: str, near: bool) -> None:
    x, threat = torch.full((4, 1, 8, 8), 0.5), Threat("linf", 0.1)
    chosen = replace(recipe(name), attack_start=start)
    move = (attack_start(chosen, x, threat, torch.Generator().manual_seed(0)) - x).abs()
    assert 0 < float(move.max()) <= (0.01 if near else 0.1)
    assert near or float(move.max()) > 0.09


@pytest.mark.parametrize(
    "changes",
    [
        {"base": "trades", "attack_target": "confused"},
        {"attack": "n-fgsm", "attack_target": "confused"},
        {"sigma": 0.25, "base": "tla"},
        {"sigma": 0.25, "augment": "flip,cutmix"},
        {"base": "rslad", "attack": "n-fgsm"},
    ],
)
def test_what_is_not_defined_together_is_refused(changes: dict) -> None:
    with pytest.raises(InputError):
        Recipe(name="mine", **changes)


def logits_of(model: Small) -> Callable[[Tensor], Tensor]:
    return lambda images: model(images)[0]
