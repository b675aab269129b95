"""Victim: a model under attack, with what an attacker may use of it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fdml import bundle
from fdml.attacks import Model
from fdml.card import Card, read_card
from fdml.checkpoint import load
from fdml.errors import InputError
from fdml.evaluate.session import Session, exported
from fdml.models import Frozen, Outputs

SUFFIXES = (".safetensors", ".onnx")


@dataclass
class Victim:
    """``model`` gives logits and gradients, and decides whether an image is fooled. ``like`` is a batch of images such
    as it is given."""

    name: str
    model: Model
    gradients: bool = True
    card: Card | None = None
    file: Path | None = None
    like: Tensor | None = None

    @classmethod
    def of(cls, name: str, model: Model, **rest: Any) -> "Victim":
        """The victim of a torch model, in the form in which it is attacked."""
        return cls(name, Frozen(model) if isinstance(model, nn.Module) else model, **rest)

    @cached_property
    def forward(self) -> Model:
        """The same logits, up to rounding, without gradients and faster: ONNX Runtime, where it is installed and takes
        the model; else the model."""
        if self.like is None or not isinstance(self.model, nn.Module):
            return self.model
        return exported(self.model, self.like) or self.model

    @classmethod
    def read(cls, path: Path, name: str, device: torch.device, like: Tensor | None = None) -> "Victim":
        """The victim of a ``.safetensors`` file of fdml, an ``.onnx`` file, or a bundle.

        Raises ``InputError`` for anything else, and for a file that cannot be read.
        """
        if path.is_dir() and (path / bundle.SUMS).exists():
            found = bundle.read(path)
            return cls(name, Session(found.model), gradients=False, card=found.card, file=found.model)
        file = path
        if file.is_dir():
            file = file / "student.safetensors"  # the folder of a run
        if not file.exists():
            raise InputError(
                f"{path} does not exist: give a .safetensors file, an .onnx file, a bundle or a run folder"
            )
        if file.suffix == ".onnx":
            session = Session(file)
            return cls(name, session, gradients=False, file=file)
        if file.suffix not in SUFFIXES:
            raise InputError(f"{path} is no model: give a .safetensors file, an .onnx file, a bundle or a run folder")
        card = read_card(file)
        return cls.of(name, load(file, device=device), like=like, card=card, file=file)

    @property
    def outputs(self) -> Callable[[Tensor], Outputs] | None:
        """Logits and taps, where the model has them."""
        has = isinstance(self.model, Frozen) and self.model.tap_names
        return cast("Frozen", self.model).outputs if has else None

    def sha256(self) -> str | None:
        """The digest of the file."""
        if self.file is None:
            return None
        with self.file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
