"""The named recipes: each a function from a data set's settings to a Recipe, with its source."""

from collections.abc import Callable
from dataclasses import replace

from fdml.errors import unknown
from fdml.recipe import Recipe


def fdml(base: Recipe) -> Recipe:
    """The method: AT from the teacher's weights, guided by its clean features (distillation and metric loss)."""
    return replace(base, start="teacher", fd=0.3, ml=2.0)


def fd(base: Recipe) -> Recipe:
    """Ablation of fdml: feature distillation without the metric loss."""
    return replace(fdml(base), ml=0.0)


def ml(base: Recipe) -> Recipe:
    """Ablation of fdml: the metric loss without feature distillation."""
    return replace(fdml(base), fd=0.0)


def pgd_at(base: Recipe) -> Recipe:
    """Adversarial training on PGD examples (Madry et al. 2018)."""
    return base


def trades(base: Recipe) -> Recipe:
    """CE on clean images + beta KL(clean ‖ adversarial), inner attack on the KL (Zhang et al. 2019)."""
    return replace(base, base="trades", beta=6.0, label_smoothing=0.0, one_pass=True)


def mart(base: Recipe) -> Recipe:
    """Boosted CE + KL weighted by misclassification (Wang et al. 2020)."""
    return replace(base, base="mart", beta=5.0, label_smoothing=0.0, one_pass=True)


def alp(base: Recipe) -> Recipe:
    """Adversarial logit pairing, beta 0.5 (Kannan et al. 2018)."""
    return replace(base, base="alp", beta=0.5, one_pass=True)


def hat(base: Recipe) -> Recipe:
    """TRADES with helper images beyond the adversarial ones, labelled by a clean teacher (Rade and Moosavi 2022)."""
    return replace(base, base="hat", beta=2.5, gamma=0.5, label_smoothing=0.0, one_pass=True)


def rslad(base: Recipe) -> Recipe:
    """A robust teacher's softened answers in place of labels, in the inner attack too (Zi et al. 2021)."""
    return replace(
        base, base="rslad", teacher_kind="robust", teacher_epochs=base.epochs, label_smoothing=0.0, one_pass=True
    )


def tla(base: Recipe) -> Recipe:
    """Triplets of the student's own features: own clean image and another of the class (Mao et al. 2019)."""
    return replace(base, base="tla", gamma=2.0, margin=0.03, one_pass=True)


def agkd_bml(base: Recipe) -> Recipe:
    """Attention of a clean teacher, triplets with images attacked back from the confused class (Wang et al. 2021)."""
    return replace(
        base, base="agkd-bml", beta=6.0, gamma=2.0, margin=0.03, label_smoothing=0.5, attack_target="confused",
        start="teacher", one_pass=True,
    )  # fmt: skip


def lbgat(base: Recipe) -> Recipe:
    """The logits of a network that learns clean images beside the student; beta 0 (Cui et al. 2021)."""
    return replace(base, base="lbgat", beta=0.0, label_smoothing=0.0, one_pass=True)


def fast_at(base: Recipe) -> Recipe:
    """One-step training with strong noise, N-FGSM (de Jorge et al. 2022)."""
    return replace(base, attack="n-fgsm")


def standard(base: Recipe) -> Recipe:
    """Clean images only: what a teacher is, and what adversarial training is compared with."""
    return replace(base, attack="none")


def smooth(base: Recipe) -> Recipe:
    """Gaussian noise alone, to certify by smoothing (Cohen et al. 2019)."""
    return replace(_smoothing(base), attack="none")


def smooth_adv(base: Recipe) -> Recipe:
    """Adversarial training of the smoothed classifier: l2 PGD through the noise (SmoothAdv, Salman et al. 2019)."""
    return replace(_smoothing(base), noise_copies=2, attack_steps=2, attack_step=0.75)


def fdml_smooth(base: Recipe) -> Recipe:
    """FDML inside the noise: the clean teacher's features repair what adversarial and noisy images become."""
    return fdml(_smoothing(base))


def ibp(base: Recipe) -> Recipe:
    """Interval bounds, to certify inside linf (Shi et al. 2021)."""
    return replace(_bounded(base), attack="none", ibp=1.0)


def fdml_ibp(base: Recipe) -> Recipe:
    """FDML beside interval bounds: robust and certified at once (after MTL-IBP, De Palma et al. 2024)."""
    return replace(fdml(_bounded(base)), ibp=0.5)


def _bounded(base: Recipe) -> Recipe:
    # Bounds are for small networks: these are narrow, and the time goes into steps, of which bounds take many.
    return replace(
        base,
        norm="linf",
        eps=min(base.eps, 0.1),
        attack_radius=1.5,
        architecture="cnn",
        width=8,
        epochs=5 * base.epochs // 4,
        batch_size=64,
        clip=1.0,
    )


def _smoothing(base: Recipe) -> Recipe:
    # One step: through noise a second one buys nothing that a certificate shows.
    return replace(base, norm="l2", eps=0.5, sigma=0.25, attack_radius=1.0, attack_steps=1, attack_step=1.0)


RECIPES: dict[str, Callable[[Recipe], Recipe]] = {
    "fdml": fdml,
    "fd": fd,
    "ml": ml,
    "pgd-at": pgd_at,
    "trades": trades,
    "mart": mart,
    "alp": alp,
    "hat": hat,
    "rslad": rslad,
    "tla": tla,
    "agkd-bml": agkd_bml,
    "lbgat": lbgat,
    "fast-at": fast_at,
    "standard": standard,
    "smooth": smooth,
    "smooth-adv": smooth_adv,
    "fdml-smooth": fdml_smooth,
    "ibp": ibp,
    "fdml-ibp": fdml_ibp,
}


def _digits() -> Recipe:
    # The threat is coarse for 64 pixels and clean accuracy has room to spare: learning from a fifth beyond eps buys
    # three points of robustness (docs/results.md). Few images are few steps: bounds need a longer time to grow.
    return Recipe(
        name="digits",
        eps=0.2,
        epochs=30,
        teacher_epochs=15,
        attack_steps=5,
        attack_step=0.5,
        attack_radius=1.2,
        ibp_warmup=0.8,
    )


def _small_grey() -> Recipe:
    return Recipe(name="grey", eps=0.1, epochs=8, teacher_epochs=5, attack_steps=2, attack_step=0.75)


def _small_colour() -> Recipe:
    return Recipe(
        name="colour", eps=8 / 255, architecture="resnet18", epochs=30, teacher_epochs=30, augment="flip,crop"
    )


SETTINGS: dict[str, Callable[[], Recipe]] = {
    "digits": _digits,
    "mnist": lambda: replace(_small_grey(), eps=0.3, attack_steps=5, attack_step=0.4),
    "fashion-mnist": _small_grey,
}
"""What a data set asks for: threat, network and length. Any other set is taken for small colour images."""


def recipe(name: str, data: str = "digits") -> Recipe:
    """The recipe ``name`` with the settings of the data set ``data``; raises ``InputError`` for an unknown recipe."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    base = SETTINGS.get(data, _small_colour)()
    return RECIPES[name](replace(base, name=name))
