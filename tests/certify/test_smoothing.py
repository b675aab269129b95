import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fdml.certify.confidence import clopper_pearson
from fdml.certify.noise import LEVELS, GridNoise
from fdml.certify.smoothing import ABSTAIN, Smoother
from fdml.sequence import LOOK, probability_of

SIGMA = 0.25
RADII = (0.25, 0.5, 0.75)


def linear(weight: Tensor, bias: float) -> tuple:
    """A linear classifier of two classes, and the exact distance of an image from where its answer changes."""

    def classify(x: Tensor) -> Tensor:
        score = x.flatten(1) @ weight + bias
        return torch.stack([score, -score], 1)

    def distance(image: Tensor) -> float:
        return float((image.double().flatten() / LEVELS @ weight.double() + bias) / weight.double().norm())

    return classify, distance


@pytest.fixture
def problem() -> tuple:
    torch.manual_seed(0)
    weight = torch.randn(64)
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    return (*linear(weight, -float(weight.sum()) / 2), images)


def smoother(classify, **options) -> Smoother:
    return Smoother(classify, 2, GridNoise(SIGMA, options.pop("seed", 0)), **options)


@pytest.mark.parametrize("method", ["cohen", "sequential"])
def test_a_linear_classifier_is_certified_up_to_its_distance_and_no_farther(problem: tuple, method: str) -> None:
    # For a linear classifier Cohen's radius is the exact distance, as the number of samples grows.
    classify, distance, images = problem
    smooth = smoother(classify)
    for number, image in enumerate(images):
        exact = distance(image)
        if method == "cohen":
            found = smooth.cohen(image, number, samples=4000)
        else:
            found = smooth.sequential(image, number, RADII, samples=40_000)
        assert found.radius <= abs(exact)
        if found.answer != ABSTAIN:
            assert found.answer == (0 if exact > 0 else 1)
        if abs(exact) > 0.1:
            assert found.answer != ABSTAIN
        if method == "sequential":
            asked = [r for r in RADII if r < abs(exact) - 0.06]
            assert found.radius >= max(asked, default=0)


def test_no_batch_size_changes_a_result(problem: tuple) -> None:
    classify, _, images = problem
    for image in images[:6]:
        found = [smoother(classify, batch=batch).sequential(image, 3, RADII) for batch in (1, 128, 300, 4096)]
        assert len(set(found)) == 1
        counted = [smoother(classify, batch=batch).cohen(image, 3, samples=1000) for batch in (7, 128, 5000)]
        assert len(set(counted)) == 1


def test_the_sequential_method_needs_fewer_samples_where_the_outcome_is_clear(problem: tuple) -> None:
    classify, distance, images = problem
    far = max(images, key=lambda image: abs(distance(image)))
    found = smoother(classify).sequential(far, 0, (0.25,), samples=100_000)
    assert found.radius >= 0.25
    assert found.count % LOOK == 0
    assert found.count < 2000
    hopeless = smoother(classify).sequential(far, 0, (abs(distance(far)) + 0.3,), samples=100_000)
    assert hopeless.count < 20_000, "a radius beyond reach is given up"
    assert hopeless.radius <= abs(distance(far))


def test_answers_that_are_no_numbers_and_unsure_copies_count_as_misses(problem: tuple) -> None:
    classify, distance, images = problem
    image = max(images, key=lambda image: abs(distance(image)))
    plain = smoother(classify).cohen(image, 0, samples=1000)

    def sometimes(x: Tensor) -> Tensor:
        logits = classify(x)
        logits[::10] = math.nan
        return logits

    assert smoother(sometimes, batch=100).cohen(image, 0, samples=1000).hits <= plain.hits - 90
    assert smoother(lambda x: torch.full((len(x), 2), math.nan)).cohen(image, 0, samples=1000).answer == ABSTAIN


def test_predictions_abstain_where_two_classes_are_close() -> None:
    def tossed(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, 0, 0] - 0.5, 0.5 - x[:, 0, 0, 0]], 1)

    close, clear = (torch.full((1, 2, 2), level, dtype=torch.uint8) for level in (127, 255))
    assert smoother(tossed).predict(close, 0) == ABSTAIN
    assert smoother(tossed).predict(clear, 0) == 0
    assert smoother(lambda x: torch.full((len(x), 2), math.nan)).predict(clear, 0) == ABSTAIN


@pytest.mark.parametrize("method", ["cohen", "sequential"])
def test_wrong_certificates_are_as_rare_as_alpha_says(method: str) -> None:
    # A classifier whose probability is known: it answers 0 where the first pixel's noise is below a threshold. Asked
    # about exactly the radius that is true, a certificate beyond it is an error.
    alpha, trials, p = 0.02, 600, 0.9
    threshold = float(stats.norm.ppf(p)) * SIGMA

    def classify(x: Tensor) -> Tensor:
        score = threshold + 0.5 / LEVELS - (x[:, 0, 0, 0] - 128 / LEVELS)
        return torch.stack([score, -score], 1)

    image = torch.full((1, 1, 1), 128, dtype=torch.uint8)
    # The grid moves the threshold to the next multiple of 1/255: the probability there is the true one.
    cut = math.floor(threshold * LEVELS + 0.5)
    true = float(stats.norm.cdf((cut + 0.5) / LEVELS / SIGMA))
    radius = float(SIGMA * stats.norm.ppf(true))
    smooth = smoother(classify, alpha=alpha)
    wrong = 0
    for number in range(trials):
        if method == "cohen":
            found = smooth.cohen(image, number, selection=10, samples=512)
        else:
            found = smooth.sequential(image, number, (radius,), selection=10, samples=2048)
        wrong += found.radius > radius * (1 + 1e-9)
    assert wrong <= stats.binom.ppf(0.999, trials, alpha)


def test_traces_of_the_image_in_floating_point_noise_deceive_no_certificate() -> None:
    # Voracek and Hein 2023: x + noise in floating point betrays x. This classifier answers 1 where the low bits of two
    # pixels are such as a sum with those of b has, and 0 elsewhere. Under float noise b is answered 1 for certain, and
    # a, which lies well inside the radius that this certifies, 0. On the grid their sums are alike.
    a = torch.zeros(1, 8, 8, dtype=torch.uint8)
    b = a.clone()
    b[0, 0, :2] = 90
    origin = b.float() / LEVELS

    def traced(x: Tensor) -> Tensor:
        could = ((x - origin) + origin == x)[:, 0, 0, :2].all(1).float()
        return torch.stack([1 - could, could], 1)

    torch.manual_seed(0)

    def under_float_noise(image: Tensor) -> np.ndarray:
        x = image.float() / LEVELS
        return np.bincount(traced(x + SIGMA * torch.randn(2000, 1, 8, 8)).argmax(1).numpy(), minlength=2) / 2000

    distance = float((a.double() - b.double()).norm()) / LEVELS
    certified = SIGMA * stats.norm.ppf(float(clopper_pearson(int(2000 * under_float_noise(b)[1]), 2000, 0.001)))
    assert certified > 1.2 * distance
    assert under_float_noise(a)[0] > 0.6, "the attack is real: a lies in the radius of b, and is answered otherwise"

    smooth = smoother(traced)
    one, two = smooth.cohen(a, 0, samples=2000), smooth.cohen(b, 1, samples=2000)
    assert one.answer == two.answer or ABSTAIN in (one.answer, two.answer) or one.radius + two.radius <= distance


def test_a_rounding_search_finds_nothing_inside_the_radius() -> None:
    # Jin et al. 2022: a radius and a norm computed in floating point let points just inside the radius be answered
    # otherwise. Walk toward the border of a linear classifier in grid steps and try every point that its own float
    # norm puts inside the certified radius.
    torch.manual_seed(1)
    weight = torch.randn(16)
    classify, distance = linear(weight, -float(weight.sum()) / 2)
    direction = weight / weight.norm()
    for number in range(12):
        image = torch.randint(0, 256, (1, 4, 4), dtype=torch.uint8)
        found = smoother(classify).cohen(image, number, samples=2000)
        if found.answer == ABSTAIN:
            continue
        sign = -1 if found.answer == 0 else 1
        for scale in np.linspace(0.9, 1.0, 50):
            step = (sign * scale * found.radius * direction * LEVELS).round().int().view(1, 4, 4)
            moved = (image.int() + step).clamp(0, LEVELS)
            norm = np.float32(np.linalg.norm(((moved - image.int()) / LEVELS).float().flatten().numpy()))
            if norm < np.float32(found.radius):
                exact = distance(moved)
                assert (exact > 0) == (found.answer == 0)


def test_the_probability_behind_a_radius_is_rounded_up() -> None:
    for radius in (0.1, 0.5, 1.0, 1.9):
        assert probability_of(radius, SIGMA) >= stats.norm.cdf(radius / SIGMA)
    assert probability_of(100.0, SIGMA) == 1.0
