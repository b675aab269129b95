"""Accuracy under attack, image by image."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fdml.attacks import Attack, Model
from fdml.inference import inference
from fdml.losses import Labels
from fdml.randomness import Streams
from fdml.threat import Images, Threat


@dataclass(frozen=True)
class Accuracy:
    """Which of the n images stand under each attack: name -> (n,) booleans. ``clean`` is always among them."""

    standing: dict[str, Tensor]

    def shares(self) -> dict[str, float]:
        """The share of images standing under each attack, and under all of them at once (``worst``)."""
        every = torch.stack(list(self.standing.values())).all(0)
        return {name: float(right.double().mean()) for name, right in {**self.standing, "worst": every}.items()}


def evaluate(
    model: Model,
    x: Images,
    y: Labels,
    threat: Threat,
    attacks: Mapping[str, Attack],
    *,
    seed: int = 0,
    batch_size: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Runs every attack on every image that the model answers rightly; one answered wrongly counts as fallen.

    ``batch_size`` images are attacked together, by default as many as suit the device. ``tick`` is called after each
    attack of each batch. Each image has a stream of random numbers for each attack, so that neither the batch size nor
    another attack changes its outcome.
    """
    batch_size = batch_size or (250 if x.device.type == "cpu" else 1000)
    standing = {"clean": predictions(model, x, batch_size) == y}
    right = standing["clean"].nonzero().squeeze(1)
    for name, attack in attacks.items():
        stands = torch.zeros_like(standing["clean"])
        for index in right.split(batch_size):
            generator = Streams.of(index, seed, name)
            x_adv = attack(model, x[index], y[index], threat, generator=generator)
            assert bool(threat.contains(x_adv, x[index]).all()), f"{name} left the threat model"
            stands[index] = predictions(model, x_adv, batch_size) == y[index]
            tick()
        standing[name] = stands
    return Accuracy({name: right.cpu() for name, right in standing.items()})


def predictions(model: Model, x: Images, batch_size: int = 250) -> Labels:
    """The answers of the model, as class indices (b,); −1 where a logit is not a number, which is no answer."""
    with inference(model), torch.inference_mode():
        logits = torch.cat([model(part) for part in _parts(x, batch_size)])
        return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share of n images (Wilson 1927), 95% by default."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _parts(x: Images, batch_size: int) -> Iterator[Images]:
    for part in x.split(batch_size):
        yield part.contiguous(memory_format=torch.channels_last)
