"""An attack on a smoothed classifier: what bounds from above the accuracy that certificates bound from below."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fdml.attacks import Model
from fdml.certify.noise import LEVELS
from fdml.certify.smoothing import ABSTAIN, Smoother
from fdml.inference import inference
from fdml.threat import Threat

STEPS = 20
COPIES = 16
"""Noisy copies whose mean probability is attacked, and the steps: SmoothAdv-PGD (Salman et al. 2019, eq. 5)."""

CHECKED = 1000
"""Samples by which the attacked image is predicted."""


def fooled_at(
    smoother: Smoother, model: Model, image: Tensor, label: int, number: int, radii: Sequence[float]
) -> float | None:
    """The smallest of the ``radii`` (above 0) at which PGD on the smoothed probability changes the answer from
    ``label``; None for none.

    ``image`` is (c, h, w) uint8, and so is the image found: rounded toward the original, so that it stays within the
    radius. It counts where the smoothed classifier's own prediction is another class but for a chance of alpha.
    """
    x = image.float()[None] / LEVELS
    y = torch.tensor([label], device=x.device)
    start = x
    for radius in sorted(radii):
        threat = Threat("l2", radius)
        x_adv = threat.project(start, x)
        for step in range(STEPS):
            noise = smoother.noise.draw(image, number, step * COPIES, COPIES, "attack").pixels - x
            gradient = _gradient(model, x_adv, noise, y)
            x_adv = threat.project(threat.ascend(x_adv, gradient, 2.5 * radius / STEPS), x)
        delta = ((x_adv - x) * LEVELS).trunc()[0].to(torch.int16)
        found = (image.to(torch.int16) + delta).clamp(0, LEVELS).to(torch.uint8)
        if smoother.predict(found, number, CHECKED) not in (label, ABSTAIN):
            return radius
        start = x_adv
    return None


def _gradient(model: Model, x_adv: Tensor, noise: Tensor, y: Tensor) -> Tensor:
    """The gradient of −log of the label's mean probability over the copies."""
    x_adv = x_adv.detach().requires_grad_()
    with inference(model):
        probability = F.log_softmax(model(x_adv + noise), 1)[:, y].logsumexp(0)
        return torch.autograd.grad(-probability.sum(), x_adv)[0]
