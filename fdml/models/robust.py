"""What every model of fdml is: pixels in [0, 1] in; logits and named intermediate features out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fdml.errors import InputError, unknown


class Outputs(NamedTuple):
    """The answer of a model and what it saw on the way.

    ``logits`` has shape (b, classes). ``taps`` maps a name to that layer's features, in order of depth: (b, c, h, w)
    for a spatial layer, (b, c) for a pooled one. A backbone's last tap is always ``features``, the pooled input of its
    last linear layer.
    """

    logits: Tensor
    taps: dict[str, Tensor]


class RobustModel(nn.Module):
    """A backbone with its normalisation inside: a callable from images in [0, 1] (NCHW, float32) to logits.

    ``backbone(x)`` returns ``Outputs``; ``tap_names`` lists its taps. ``mean`` and ``std`` (one per channel, in pixel
    units) are buffers, so that eps means the same for every model and the file of the weights is complete.

    Raises ``InputError`` for statistics that do not fit each other or a deviation that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, tap_names: Sequence[str], *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise InputError(f"mean {tuple(mean)} and std {tuple(std)} must have one value a channel, std above 0")
        self.backbone = backbone
        self.tap_names = tuple(tap_names)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def outputs(self, x: Float[Tensor, "b c h w"]) -> Outputs:
        """Logits and taps."""
        return self.backbone((x - self.mean) / self.std)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits alone."""
        return self.outputs(x).logits


class Tapped(nn.Module):
    """Makes a backbone of any ``nn.Module`` that returns logits: the outputs of the named modules are its taps."""

    def __init__(self, module: nn.Module, taps: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self._taps = tuple(taps)
        named = dict(module.named_modules())
        for name in taps:
            if name not in named or not name:
                raise unknown("module to tap", name, [known for known in named if known])
            named[name].register_forward_hook(_keep)

    def forward(self, x: Tensor) -> Outputs:
        logits = self.module(x)
        return Outputs(logits, {name: self._seen(name) for name in self._taps})

    def _seen(self, name: str) -> Tensor:
        output = self.module.get_submodule(name).__dict__.pop("_tapped", None)
        if not isinstance(output, Tensor):
            raise InputError(f"module {name!r} returns {type(output).__name__}, but a tap must be a tensor")
        return output


def _keep(module: nn.Module, _inputs: object, output: object) -> None:
    # On the module itself, so that a copy of the network taps its own modules.
    module.__dict__["_tapped"] = output


def wrap(
    module: nn.Module, taps: Sequence[str], *, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
) -> RobustModel:
    """Makes a ``RobustModel`` of a user's own classifier.

    ``module`` maps normalised images (NCHW) to logits; ``taps`` are names from ``module.named_modules()``, in order of
    depth, whose outputs (b, c, h, w) or (b, c) guide and are guided in training. ``mean`` and ``std`` default to none.

    Raises ``InputError`` for a name that is not a module, with the nearest one that is.
    """
    return RobustModel(Tapped(module, taps), taps, mean=mean, std=std)
