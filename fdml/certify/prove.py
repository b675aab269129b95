"""From images to certificates, by either method."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fdml.attacks import Model
from fdml.certify.by_bounds import Bounding, BoundsProver, onnx_source
from fdml.certify.by_smoothing import Sampling, SmoothingProver
from fdml.certify.certificate import Certificate
from fdml.errors import InputError
from fdml.evaluate.session import Session, exported
from fdml.models import Frozen


class Prover(Protocol):
    """Makes certificates of images, of ``classes`` classes. ``together`` is how many it likes to be given at once."""

    together: int
    classes: int

    def prove(self, numbers: Tensor, images: Tensor, labels: Tensor | None) -> Iterator[Certificate]:
        """The certificates of ``images`` (b, c, h, w) in [0, 1], in their order; ``numbers`` (b,) are their places."""
        ...


def certify(
    model: nn.Module | Path,
    images: Tensor,
    settings: Sampling | Bounding,
    *,
    labels: Tensor | None = None,
    numbers: Sequence[int] | None = None,
    precision: str = "fp32",
) -> list[Certificate]:
    """Certificates of ``images`` (b, c, h, w), float32 in [0, 1], for any torch classifier that takes such images, or
    an ONNX file: by randomised smoothing (``Sampling``) or by bounds (``Bounding``).

        certify(model, x, Sampling(sigma=0.25, radii=(0.5,)))
        certify(Path("model.onnx"), x, Bounding(norm="linf", eps=2 / 255))

    ``labels`` (b,) may be left out: what is certified is the model's answer. ``numbers`` name the images, and choose
    their noise: the same image, number and seed give the same certificate. Noise must not be known to whoever chose the
    image: give a seed of your own where images come from outside.

    Raises ``InputError`` for images outside [0, 1], labels that the model does not know, and models that the method
    does not cover.
    """
    if not (images.ndim == 4 and images.is_floating_point() and bool(((images >= 0) & (images <= 1)).all())):
        raise InputError(f"images must be float (b, c, h, w) in [0, 1], got {images.dtype} {tuple(images.shape)}")
    chosen = torch.arange(len(images)) if numbers is None else torch.tensor(list(numbers))
    if len(chosen) != len(images) or (labels is not None and len(labels) != len(images)):
        raise InputError(f"{len(images)} images need as many numbers and labels, not {len(chosen)}")
    if not len(images):
        return []
    if isinstance(settings, Bounding):
        prover: Prover = BoundsProver(onnx_source(model, images), settings)
    else:
        classify = classifier(Session(model) if isinstance(model, Path) else model, images[:8], precision)
        with torch.inference_mode():
            classes = classify(images[:1]).shape[1]
        prover = SmoothingProver(classify, classes, settings, device=images.device)
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < prover.classes:
        known = prover.classes - 1
        raise InputError(f"labels are {int(labels.min())} to {int(labels.max())}, the classes 0 to {known}")
    found: list[Certificate] = []
    for rows in torch.arange(len(images)).split(prover.together):
        found += prover.prove(chosen[rows], images[rows], None if labels is None else labels[rows])
    return found


def classifier(model: Model, like: Tensor, precision: str = "fp32") -> Model:
    """The fastest form of ``model`` for forward passes: ONNX Runtime on a CPU where it takes the model, else torch.

    ``precision`` bf16 computes in bfloat16: about twice as fast where the processor has it, and what is certified is
    then the network as computed so.
    """
    if not isinstance(model, nn.Module):
        if precision != "fp32":
            raise InputError(f"--precision {precision}: an ONNX file is computed in its own precision")
        return model
    frozen = model if isinstance(model, Frozen) else Frozen(model)
    if precision == "fp32":
        return exported(frozen, like) or frozen
    half = Frozen(frozen.model).bfloat16()
    return lambda x: half(x.bfloat16()).float()
