"""Backbones that return logits and named taps, and the model that carries its own normalisation."""

import re
from collections.abc import Mapping, Sequence

from fdml.errors import InputError, unknown
from fdml.models.cnn import CNN
from fdml.models.frozen import Frozen
from fdml.models.resnet import ResNet, resnet18, wide_resnet
from fdml.models.robust import Outputs, RobustModel, wrap

__all__ = ["ARCHITECTURES", "Frozen", "Outputs", "RobustModel", "build", "wrap"]

ARCHITECTURES = {
    "cnn": "six layers for small grey images: 136,000 parameters at width=16",
    "resnet18": "ResNet-18 with the CIFAR stem: 11.2 million parameters; preact=true for pre-activation",
    "wrn-28-10": "wide ResNet, any wrn-DEPTH-WIDTH: 36.5 million parameters",
}


def build(
    architecture: str,
    *,
    input: tuple[int, int, int],
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    options: Mapping[str, object] | None = None,
) -> RobustModel:
    """A freshly initialised model, by name.

    ``input`` is (channels, height, width) in pixels; ``mean`` and ``std`` are the training images' statistics per
    channel, in [0, 1]; ``options`` are keywords of the architecture (``width``, ``preact``).

    Raises ``InputError`` for an unknown architecture or option and for images smaller than 8 pixels.
    """
    channels, height, width = input
    if min(height, width) < 8:
        raise InputError(f"images are {height}x{width} pixels, but the networks need at least 8x8")
    if len(mean) != channels:
        raise InputError(f"{len(mean)} channel means given for images of {channels} channels")
    backbone = _backbone(architecture, channels, min(height, width), classes, dict(options or {}))
    return RobustModel(backbone, backbone.taps, mean=mean, std=std)


def _backbone(architecture: str, channels: int, size: int, classes: int, options: dict) -> CNN | ResNet:
    width = options.get("width", 1)
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise InputError(f"architecture {architecture!r}: width must be a whole number of at least 1, got {width!r}")
    wide = re.fullmatch(r"wrn-(\d{1,3})-(\d{1,2})", architecture)
    try:
        if architecture == "cnn":
            return CNN(channels, size, classes, **options)
        if architecture == "resnet18":
            return resnet18(channels, classes, **options)
        if wide:
            depth, factor = int(wide[1]), int(wide[2])
            if depth < 10 or (depth - 4) % 6 or not factor:
                raise InputError(f"{architecture!r}: the depth must be 6n + 4 and at least 10, the width at least 1")
            return wide_resnet(channels, classes, depth=depth, factor=factor, **options)
    except TypeError as error:
        raise InputError(f"architecture {architecture!r}: {error}") from None
    raise unknown("architecture", architecture, ARCHITECTURES)
