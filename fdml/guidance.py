"""The teacher's side: what it says of a clean image, computed once where no augmentation changes the image."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fdml.data.dataset import Arrays, Split
from fdml.errors import InputError, unknown
from fdml.inference import inference
from fdml.models import RobustModel
from fdml.recipe import Recipe

CACHE_LIMIT = 512 << 20
"""Bytes that the teacher's cached outputs may take; beyond, it runs beside the student."""


class Advice(NamedTuple):
    """The teacher's logits (b, classes) and the taps asked for, of clean images; where a method asks, also its logits
    of the adversarial ones."""

    logits: Tensor
    taps: dict[str, Tensor]
    adversarial: Tensor | None = None


@dataclass(frozen=True)
class Teacher:
    """A fixed model whose answers guide the student. ``cache`` holds its answers to every training image, or nothing.
    ``sees_attacks``: it also answers the adversarial images. ``precision`` is that of the student's training."""

    model: RobustModel
    layers: tuple[str, ...]
    cache: Advice | None
    sees_attacks: bool = False
    precision: str = "fp32"

    @classmethod
    def of(cls, model: RobustModel, recipe: Recipe, train: Split) -> "Teacher":
        """The teacher for a recipe, with its answers to the training images cached where that is sound and small.

        Raises ``InputError`` for a layer in ``fd_layers``, or one that the base needs, that the teacher does not have.
        """
        layers = {*recipe.layers} if recipe.fd else set()
        for layer in layers:
            if layer not in model.tap_names:
                raise unknown("layer in fd_layers", layer, model.tap_names)
        if recipe.ml:
            layers.add(model.tap_names[-1])
        if recipe.base == "agkd-bml":
            if len(model.tap_names) < 2:
                raise InputError("base=agkd-bml needs a network with a spatial tap before its pooled features")
            layers.add(model.tap_names[-2])
        teacher = cls(model, tuple(sorted(layers)), None, recipe.base == "hat", recipe.precision)
        if recipe.augmentations or not isinstance(train, Arrays):
            return teacher
        # One batch tells how large the whole would be.
        parts = torch.arange(len(train)).split(500)
        first = teacher.advise(next(iter(train.batches(parts[:1]))).x)
        per_image = sum(tensor[0].nbytes for tensor in (first.logits, *first.taps.values()))
        if per_image * len(train) > CACHE_LIMIT:
            return teacher
        answers = [teacher.advise(batch.x) for batch in train.batches(parts)]
        taps = {layer: torch.cat([answer.taps[layer] for answer in answers]) for layer in layers}
        cache = Advice(torch.cat([answer.logits for answer in answers]), taps)
        return replace(teacher, cache=cache)

    def advise(self, x: Tensor, index: Tensor | None = None) -> Advice:
        """The answers to clean images ``x``, which are the training images ``index`` where that is known."""
        if self.cache is not None and index is not None:
            return Advice(self.cache.logits[index], {name: tap[index] for name, tap in self.cache.taps.items()})
        with self._answering(x.device):
            seen = self.model.outputs(x.contiguous(memory_format=torch.channels_last))
        return Advice(seen.logits.float(), {name: seen.taps[name].float() for name in self.layers})

    def advise_beside(self, advice: Advice, x_adv: Tensor) -> Advice:
        """The same advice, with the logits of the adversarial images where the method asks for them."""
        if not self.sees_attacks:
            return advice
        with self._answering(x_adv.device):
            adversarial = self.model(x_adv.contiguous(memory_format=torch.channels_last))
        return advice._replace(adversarial=adversarial.float())

    @contextmanager
    def _answering(self, device: torch.device) -> Iterator[None]:
        half = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with inference(self.model), torch.no_grad(), half:
            yield


class Guided(nn.Module):
    """A student in training: its outputs, and its taps brought to the teacher's widths by 1x1 adapters.

    Adapters exist only where widths differ, are trained with the student and never saved with it. Nor is ``peer``, a
    network that learns beside the student and from it, where the method has one.
    """

    def __init__(
        self, model: RobustModel, teacher: Teacher | None, sample: Tensor, peer: RobustModel | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.peer = peer
        self.adapters = nn.ModuleDict()
        if teacher is None:
            return
        wanted = teacher.advise(sample)
        with inference(model), torch.no_grad():
            own = model.outputs(sample)
        for layer, tap in wanted.taps.items():
            if layer not in own.taps:
                raise unknown("layer of the student for fd_layers", layer, model.tap_names)
            if own.taps[layer].shape[2:] != tap.shape[2:]:
                sizes = f"{tuple(own.taps[layer].shape[2:])} and {tuple(tap.shape[2:])}"
                raise InputError(f"layer {layer!r} has different sizes in the student and the teacher: {sizes}")
            inputs, outputs = own.taps[layer].shape[1], tap.shape[1]
            if inputs != outputs:
                adapter = nn.Conv2d(inputs, outputs, 1) if tap.ndim == 4 else nn.Linear(inputs, outputs)
                self.adapters[layer] = adapter

    def forward(self, x: Tensor, *, peer: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and every tap, adapted where the teacher's width differs; or those of the peer, as they are."""
        if peer:
            assert self.peer is not None
            beside = self.peer.outputs(x)
            return beside.logits, beside.taps
        seen = self.model.outputs(x)
        return seen.logits, {name: self._adapt(name, tap) for name, tap in seen.taps.items()}

    def _adapt(self, name: str, tap: Tensor) -> Tensor:
        return self.adapters[name](tap) if name in self.adapters else tap
