"""The inner attack: the adversarial images that the student learns from, and the noise that it sees them through."""

from collections.abc import Callable

import torch
from torch import Tensor

from fdml import losses
from fdml.attacks import n_fgsm, pgd
from fdml.attacks.objective import CHUNK, Objective, answer
from fdml.guidance import Advice
from fdml.inference import inference
from fdml.recipe import BY_KL, Recipe
from fdml.threat import Threat

Model = Callable[[Tensor], Tensor]


def attack_start(recipe: Recipe, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    """Where the inner attack on ``x`` begins. Drawn for the global batch, so that processes share one randomness."""
    if recipe.attack == "none":
        return x
    if recipe.attack == "n-fgsm":
        return x + torch.empty_like(x).uniform_(-2 * threat.eps, 2 * threat.eps, generator=generator)
    if recipe.attack_start == "near" or (recipe.attack_start == "published" and recipe.base in BY_KL):
        # The KL has no gradient at the clean image itself; the published codes start a hair beside it.
        return (x + 0.001 * torch.empty_like(x).normal_(generator=generator)).clamp_(0, 1)
    return threat.random(x, generator)


def draw_noise(recipe: Recipe, x: Tensor, generator: torch.Generator) -> Tensor | None:
    """Gaussian noise of deviation ``sigma`` for images (b, c, h, w): (copies, b, c, h, w), or None without a sigma.

    Drawn for the global batch too, after the start of the attack.
    """
    if not recipe.sigma:
        return None
    return x.new_empty((recipe.noise_copies, *x.shape)).normal_(generator=generator).mul_(recipe.sigma)


def see_through(
    noise: Tensor, x: Tensor, x_adv: Tensor, y: Tensor, advice: Advice | None
) -> tuple[Tensor, Tensor, Tensor, Advice | None]:
    """The batch as a student sees it through each draw of ``noise`` (copies, b, c, h, w), one draw after the other.

    Both kinds of images gain the same noise and are not clipped; what the teacher says is of the image without it.
    """
    count = len(noise)
    if advice is not None:
        taps = {name: tap.repeat(count, *[1] * (tap.ndim - 1)) for name, tap in advice.taps.items()}
        adversarial = None if advice.adversarial is None else advice.adversarial.repeat(count, 1)
        advice = Advice(advice.logits.repeat(count, 1), taps, adversarial)
    return _through(noise, x), _through(noise, x_adv), y.repeat(count), advice


def inner_attack(
    recipe: Recipe,
    model: Model,
    x: Tensor,
    start: Tensor,
    y: Tensor,
    threat: Threat,
    noise: Tensor | None = None,
    advice: Advice | None = None,
    goal: Tensor | None = None,
) -> Tensor:
    """Adversarial images of ``x`` against ``model`` as it is: gradients of the input alone, BatchNorm in eval mode.

    ``y`` are labels (b,) or distributions (b, classes). With ``goal`` (b,) the attack lowers the cross-entropy to these
    classes. With ``noise`` (copies, b, c, h, w) it is on the mean of the softmax over the draws, the very ones that the
    student will learn through (SmoothAdv, Salman et al. 2019).
    """
    if recipe.attack == "none":
        return x
    with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        if noise is None:
            return _attack(recipe, model, x, start, y, threat, advice, goal)
        # An image keeps its noise: parts that the attack looks at whole.
        rows = max(1, CHUNK // len(noise)) if x.device.type == "cpu" else len(x)
        with inference(model):
            parts = zip(noise.split(rows, dim=1), x.split(rows), start.split(rows), y.split(rows), strict=True)
            return torch.cat([_attack(recipe, _smoothed(model, n), part, s, t, threat) for n, part, s, t in parts])


def most_confused(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """The wrong class (b,) that the model as it is holds most likely for each clean image."""
    with inference(model):
        return losses.most_confused(answer(model, x), y)


def _attack(
    recipe: Recipe,
    model: Model,
    x: Tensor,
    start: Tensor,
    y: Tensor,
    threat: Threat,
    advice: Advice | None = None,
    goal: Tensor | None = None,
) -> Tensor:
    if recipe.attack == "n-fgsm":
        return n_fgsm(model, x, y, threat, start=start)
    objective: str | Objective = "kl" if recipe.base in BY_KL else "ce"
    if recipe.base == "rslad":  # away from the teacher's answer to x (Zi et al. 2021, eq. 5)
        assert advice is not None
        y, objective = advice.logits, lambda logits, answer: losses.kl_divergence(answer, logits)
    steps, step_size = recipe.attack_steps, recipe.attack_step * threat.eps
    return pgd(
        model, x, y, threat, steps=steps, step_size=step_size, objective=objective, target=goal, start=start,
        keep="last",
    )  # fmt: skip


def _smoothed(model: Model, noise: Tensor) -> Model:
    """From images to the logarithm of the mean softmax over their draws of noise, up to a constant."""

    def logits(x: Tensor) -> Tensor:
        answers = model(_through(noise, x)).log_softmax(1)
        return answers.view(len(noise), len(x), -1).logsumexp(0)

    return logits


def _through(noise: Tensor, x: Tensor) -> Tensor:
    return (x + noise).flatten(0, 1).contiguous(memory_format=torch.channels_last)
