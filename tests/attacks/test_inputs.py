"""What every attack refuses, and what it leaves as it was: the defects of its peers, each a regression test."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdml import attacks
from fdml.attacks.objective import check
from fdml.errors import InputError
from fdml.randomness import Streams
from fdml.threat import Images, Threat

THREAT = Threat("linf", 0.1)
GUIDES = {"guides": torch.rand(12, 1, 8, 8), "guide_y": torch.arange(12) % 3}

# Every attack in a form of a few steps, as a function of (model, x, y, generator).
EVERY: dict[str, Callable[..., Images]] = {
    "fgsm": partial(attacks.fgsm, threat=THREAT),
    "pgd": partial(attacks.pgd, threat=THREAT, steps=3, restarts=2),
    "apgd": partial(attacks.apgd, threat=THREAT, steps=5),
    "apgd-t": partial(attacks.apgd_targeted, threat=THREAT, steps=5),
    "fab": partial(attacks.fab, norm="linf", steps=4),
    "deepfool": partial(attacks.deepfool, norm="l2", steps=4),
    "cw": partial(attacks.cw, norm="l2", steps=6),
    "alma": partial(attacks.alma, norm="l2", steps=8),
    "fmn": partial(attacks.fmn, norm="linf", steps=8),
    "square": partial(attacks.square, threat=THREAT, budget=20),
    "nes": partial(attacks.nes, threat=THREAT, budget=30, samples=10),
    "spsa": partial(attacks.spsa, threat=THREAT, budget=30, samples=10),
    "hopskipjump": partial(attacks.hopskipjump, norm="l2", budget=100),
    "mi-fgsm": partial(attacks.mi_fgsm, threat=THREAT, steps=3),
    "di-ti": partial(attacks.di_ti, threat=THREAT, steps=3),
    "feature": partial(attacks.feature, threat=THREAT, steps=3, **GUIDES),
    "metric": partial(attacks.metric, threat=THREAT, steps=3, **GUIDES),
    "noise": partial(attacks.noise, threat=THREAT, draws=4),
    "spatial": partial(attacks.spatial, grid=(3, 3)),
}

every_attack = pytest.mark.parametrize("name", EVERY)


class Small(nn.Module):
    """Two layers, BatchNorm and dropout: whatever an attack could leave changed."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(36, classes)

    def outputs(self, x: Tensor) -> Any:
        from fdml.models import Outputs

        features = self.features(x)
        return Outputs(self.head(self.drop(features)), {"features": features})

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits


def run(name: str, model: Callable, x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    options = {} if name == "spatial" else {"generator": Streams.of(torch.arange(len(x)), seed)}
    return EVERY[name](model, x, y, **options)


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.rand(count, 1, 8, 8)
    return x, Small().eval()(x).argmax(1)


@every_attack
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 255, y), "255"),
        (lambda x, y: (x - 0.5, y), r"\[0, 1\]"),
        (lambda x, y: (x * torch.nan, y), "nan"),
        (lambda x, y: (x, y - 3), "at least 0"),
    ],
    ids=["bytes", "centred", "nan", "negative"],
)
def test_images_and_labels_out_of_range_are_refused(name: str, change: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(name, Small(), *change(*batch()))


def test_images_of_bytes_and_labels_of_another_count() -> None:
    x, y = batch()
    with pytest.raises(InputError, match="uint8"):
        check((x * 255).byte(), y)
    with pytest.raises(InputError, match=r"\(5,\)"):
        check(x, y[:5])
    with pytest.raises(InputError, match="float"):
        check(x, y.float())


@every_attack
def test_the_model_and_the_world_stay_as_they_were(name: str) -> None:
    model = Small().train()
    model.drop.eval()  # a part that its owner froze
    model.head.weight.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    before = torch.random.get_rng_state()
    x, y = batch()
    kept = x.clone()
    x_adv = run(name, model, x, y)
    assert torch.equal(x, kept)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False, True]
    assert not x_adv.requires_grad
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1


@every_attack
def test_an_image_is_attacked_as_if_it_were_alone(name: str) -> None:
    """With a stream an image, company changes no more than rounding does."""
    model = Small().double().eval()
    x, y = batch()
    x = x.double()
    streams = Streams.of(torch.arange(len(x)), 0)
    guides = {"guides": GUIDES["guides"].double()} if name in ("feature", "metric") else {}
    options = guides if name == "spatial" else {**guides, "generator": streams}
    together = EVERY[name](model, x, y, **options)
    for place in (0, 4):
        index = torch.tensor([place])
        own = guides if name == "spatial" else {**guides, "generator": Streams.of(index, 0)}
        alone = EVERY[name](model, x[index], y[index], **own)
        torch.testing.assert_close(alone[0], together[place], atol=1e-6, rtol=0)


@every_attack
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(name: str, classes: int) -> None:
    model = Small(classes).eval()
    x, _ = batch()
    y = model(x).argmax(1)
    if name in ("feature", "metric"):
        found = EVERY[name](model, x, y, guide_y=GUIDES["guide_y"] % classes, generator=Streams.of(torch.arange(6), 0))
    else:
        found = run(name, model, x, y)
    assert found.shape == x.shape
