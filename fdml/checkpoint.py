"""One model is one ``.safetensors`` file with its Card in the header; the state that a run resumes from is another."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fdml.card import KEY, Card, header, read_card
from fdml.errors import InputError
from fdml.files import write_whole
from fdml.models import RobustModel, build

CUSTOM = "custom"
"""The architecture of a model whose code fdml does not have: ``wrap`` made it, and ``load`` must be given it."""

STATE_FORMAT = "1"


def save(model: RobustModel, card: Card, path: str | Path) -> None:
    """Writes the weights and the card to one file, whole or not at all.

    Raises ``InputError`` when the system refuses to write; the previous file is then intact.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {KEY: card.to_json()}
    _write(Path(path), tensors, metadata)


def load(path: str | Path, *, device: str | torch.device = "cpu", model: RobustModel | None = None) -> RobustModel:
    """The model of a file that ``fdml train`` wrote: an ``nn.Module`` from images in [0, 1] to logits, in eval mode.

    The file alone is enough for fdml's own architectures. A model made by ``wrap`` needs its code: give a freshly built
    one as ``model``, and it is filled.

    Raises ``InputError`` for a file without a card or with a newer one, and for weights that do not fit the
    architecture.
    """
    path = Path(path)
    card = read_card(path)
    if model is None:
        if card.architecture == CUSTOM:
            raise InputError(f"{path} holds a wrapped model of the user's own: give load(…, model=) its code")
        # The card's limits bound a single layer; the header, which is proved to fit the file, bounds the whole model.
        with torch.device("meta"):
            model = _build(path, card)
        _check_fit(path, model)
        model.to_empty(device="cpu")
    else:
        _check_fit(path, model)
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be read: {str(error).splitlines()[0]}") from None
    return model.eval().to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _build(path: Path, card: Card) -> RobustModel:
    try:
        return build(
            card.architecture,
            input=card.input,
            classes=len(card.classes),
            mean=card.mean,
            std=card.std,
            options=card.options,
        )
    except (
        ValueError,
        RuntimeError,
    ) as error:  # sizes that torch itself refuses, beside what is wrong by our own rules
        raise InputError(f"{path}: the card's network cannot be built: {str(error).splitlines()[0]}") from None


def _check_fit(path: Path, model: RobustModel) -> None:
    found = {name: info.shape for name, info in header(path).tensors.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in wanted.items():
        if name not in found:
            raise InputError(f"{path}: the tensor {name!r} is missing; the card does not describe this file's weights")
        if found[name] != shape:
            raise InputError(
                f"{path}: the tensor {name!r} has shape {list(found[name])}, the card's network {list(shape)}"
            )
    for name in found:
        if name not in wanted:
            raise InputError(f"{path}: the tensor {name!r} is not part of the network that the card describes")


@dataclass(frozen=True)
class State:
    """What a run needs to go on as if it had not stopped: tensors by name, and plain JSON values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save_state(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Writes a resumable state, whole or not at all; floats keep every bit."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"fdml.state": STATE_FORMAT, "values": json.dumps(values)}
    _write(path, ready, metadata)


def load_state(path: Path) -> State:
    """The state that ``save_state`` wrote; raises ``InputError`` for a file that is no state of this version."""
    metadata = header(path).metadata
    if metadata.get("fdml.state") != STATE_FORMAT:
        raise InputError(f"{path} is not a training state of this version of fdml: train again with --overwrite")
    try:
        values = json.loads(metadata.get("values", ""))
        return State(safetensors.torch.load_file(path), dict(values))
    except (ValueError, TypeError, RecursionError, safetensors.SafetensorError):
        raise InputError(f"{path}: the training state cannot be read: train again with --overwrite") from None


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    def write(temporary: Path) -> None:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:  # a full disk too: the library has one error for everything
            raise OSError(str(error)) from None

    write_whole(path, write)
