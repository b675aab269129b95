"""Pure losses. Every one is a mean over the batch, so that the mean over processes is the loss of the global batch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Logits = Float[Tensor, "b classes"]
Labels = Int[Tensor, " b"]
PerImage = Float[Tensor, " b"]
Scalar = Float[Tensor, ""]
Targets = Int[Tensor, " b"] | Float[Tensor, "b classes"]
"""Labels, or distributions over the classes."""


def cross_entropy(logits: Logits, y: Targets) -> PerImage:
    """−log p_y, per image; its mean under ``y`` where that is a distribution."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Logits, y: Labels) -> PerImage:
    """max_{k≠y} z_k − z_y, per image: above 0 where the answer is wrong (Carlini and Wagner 2017, f6, sign turned)."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    return logits.scatter(1, y[:, None], float("-inf")).amax(1) - true


def dlr(logits: Logits, y: Labels) -> PerImage:
    """Difference of logits ratio, per image: −(z_y − max_{k≠y} z_k) / (z_(1) − z_(3)) (Croce and Hein 2020, eq. 6).

    Invariant to shift and scale of the logits. With two classes there is no third logit: the divisor is z_(1) − z_(2),
    so that the value is ±1 and its gradient, nowhere informative, is replaced by the margin's.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: Logits, y: Labels, target: Labels) -> PerImage:
    """−(z_y − z_target) / (z_(1) − (z_(3) + z_(4)) / 2), per image (Croce and Hein 2020, eq. 7).

    With three classes the divisor is z_(1) − z_(3); with two, where none is informative, it is 1.
    """
    gap = logits.gather(1, target[:, None]).squeeze(1) - logits.gather(1, y[:, None]).squeeze(1)
    if logits.shape[1] < 3:
        return gap
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    return gap / (top[:, 0] - (top[:, 2] + top[:, -1]) / 2 + 1e-12)


def kl_divergence(from_logits: Logits, to_logits: Logits) -> PerImage:
    """KL(p ‖ q) with p = softmax(from_logits), q = softmax(to_logits), summed over classes, per image.

    The TRADES term (Zhang et al. 2019) is KL(S(x) ‖ S(x')): ``from_logits`` are those of the clean image.
    """
    log_p = F.log_softmax(from_logits, 1)
    return (log_p.exp() * (log_p - F.log_softmax(to_logits, 1))).sum(1)


def most_confused(logits: Logits, y: Labels) -> Labels:
    """The wrong class of the largest logit, per image: what it is, or is nearest to be, mistaken for."""
    return logits.scatter(1, y[:, None], float("-inf")).argmax(1)


def wrong_confidence(logits: Logits, y: Labels) -> PerImage:
    """−log(1 − max_{k≠y} p_k), per image (the second term of MART's BCE, Wang et al. 2020)."""
    wrong = logits.softmax(1).scatter(1, y[:, None], 0.0).amax(1)
    return -torch.log(1.0001 - wrong)


def boosted_cross_entropy(logits: Logits, y: Labels) -> PerImage:
    """−log p_y − log(1 − max_{k≠y} p_k), per image (MART, Wang et al. 2020)."""
    return cross_entropy(logits, y) + wrong_confidence(logits, y)


def soft_target(
    y: Targets,
    classes: int,
    *,
    smoothing: float = 0.0,
    answer: Logits | None = None,
    weight: float = 0.0,
    temperature: float = 1.0,
) -> Logits:
    """The distribution to learn: (1 − weight) · smoothed label + weight · softmax(answer / temperature).

    ``answer`` are the teacher's logits of the clean image: what Hinton et al. 2015 call the softened answer, here one
    more tap of the teacher. ``y`` may be a distribution itself, of a mixed image. ``smoothing`` spreads that share of
    the label over all classes (Szegedy et al. 2016).
    """
    if y.is_floating_point():
        label = y * (1 - smoothing) + smoothing / classes
    else:
        label = torch.full((len(y), classes), smoothing / classes, device=y.device)
        label.scatter_(1, y[:, None], 1 - smoothing + smoothing / classes)
    if answer is None or weight == 0:
        return label
    return label.lerp((answer / temperature).softmax(1), weight)


def attention_distance(student: Tensor, teacher: Tensor) -> Scalar:
    """The mean absolute difference of two attention maps (Wang et al. 2021, AGKD-BML): the sum of a spatial feature
    (b, c, h, w) over its channels, brought to [0, 1] image by image."""

    def attention(features: Tensor) -> Tensor:
        seen = features.sum(1).flatten(1)
        low, high = seen.amin(1, keepdim=True), seen.amax(1, keepdim=True)
        return (seen - low) / (high - low).clamp(min=1e-6)

    return F.l1_loss(attention(student), attention(teacher))


def feature_distance(student: Tensor, teacher: Tensor) -> Scalar:
    """1 − cos between two features (b, …) of the same shape, each image's taken as one vector; mean over the batch."""
    return (1 - F.cosine_similarity(student.flatten(1), teacher.flatten(1), dim=1, eps=1e-6)).mean()


class Triplets(NamedTuple):
    """The metric loss and what to log beside it: without these a saturated margin looks like success."""

    loss: Scalar
    active: Scalar
    d_ap: Scalar
    d_an: Scalar


def triplet(
    anchor: Float[Tensor, "b d"],
    positive: Float[Tensor, "b d"],
    candidates: Float[Tensor, "n d"],
    y: Labels,
    confused: Labels | None,
    candidate_y: Int[Tensor, " n"],
    *,
    margin: float,
    norm_weight: float = 1e-3,
) -> Triplets:
    """``ranked`` with the negative mined: the hardest (nearest) of ``candidates`` whose label is ``confused``, the
    class that the anchor is, or is nearest to be, mistaken for.

    The anchor is the adversarial image and the positive its clean self. Where the candidates hold none of the class,
    and without ``confused``, the negative is the hardest of any class but ``y``; where they hold none of these either,
    the image's hinge is 0. TLA (Mao et al. 2019) with the confused class of AGKD-BML (Wang et al. 2021).
    """
    eligible = other = candidate_y[None, :] != y[:, None]
    if confused is not None:
        eligible = candidate_y[None, :] == confused[:, None]
        eligible = torch.where(eligible.any(1, keepdim=True), eligible, other)
    with torch.no_grad():
        similar = F.normalize(anchor, dim=1, eps=1e-6) @ F.normalize(candidates, dim=1, eps=1e-6).T
        hardest = similar.masked_fill(~eligible, -torch.inf).argmax(1)
    return ranked(anchor, positive, candidates[hardest], eligible.any(1), margin=margin, norm_weight=norm_weight)


def ranked(
    anchor: Float[Tensor, "b d"],
    positive: Float[Tensor, "b d"],
    negative: Float[Tensor, "b d"],
    exists: Bool[Tensor, " b"] | None = None,
    *,
    margin: float,
    norm_weight: float = 1e-3,
) -> Triplets:
    """[margin + d(a, p) − d(a, n)]_+ with d = 1 − cos, plus ``norm_weight`` · mean square of the three features.

    Where a negative does not exist, d(a, n) counts as 2 and the hinge as 0.
    """
    a, p, n = (F.normalize(features, dim=1, eps=1e-6) for features in (anchor, positive, negative))
    d_ap, d_an = 1 - (a * p).sum(1), 1 - (a * n).sum(1)
    hinge = F.relu(margin + d_ap - d_an)
    if exists is not None:
        d_an = torch.where(exists, d_an, torch.full_like(d_an, 2.0))
        hinge = hinge * exists
    size = (anchor.square().mean() + positive.square().mean() + negative.square().mean()) / 3
    return Triplets(
        hinge.mean() + norm_weight * size,
        (hinge > 0).to(hinge.dtype).mean().detach(),
        d_ap.mean().detach(),
        d_an.mean().detach(),
    )
