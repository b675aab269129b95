"""What an evaluation has found so far, on the disk: one small file a chunk of images and unit of work.

A chunk is what one process works on at a time. Because a file is written whole or not at all, an evaluation that was
killed loses the unit under way and nothing else, and any number of processes can go on with it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdml.checkpoint import State, load_state, save_state
from fdml.errors import InputError
from fdml.files import write_whole

PLAN = "plan.json"


@dataclass
class Record:
    """What one step did to a chunk of b images.

    ``tried`` (b,) says which images it was run on, ``fooled`` (b,) which of them fell, ``answers`` (b,) what the model
    says now (−1: nothing, or no number), ``queries`` (b,) how often each was shown to the model, where it is counted.
    ``seconds`` is the time spent.
    """

    tried: Tensor
    fooled: Tensor
    answers: Tensor
    queries: Tensor
    seconds: float = 0.0

    @classmethod
    def empty(cls, count: int) -> "Record":
        """Nothing tried yet."""
        no = torch.zeros(count, dtype=torch.bool)
        return cls(no, no.clone(), torch.full((count,), -1), torch.zeros(count, dtype=torch.int64))


class Store:
    """The folder of one evaluation's state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, plan: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Opens the folder for this plan.

        Raises ``InputError`` where the folder holds an evaluation already, unless ``overwrite``, or ``resume`` and the
        plan is the same.
        """
        path = self.folder / PLAN
        if overwrite:
            for old in sorted(self.folder.rglob("*.safetensors")):
                old.unlink()
        elif path.exists():
            before = self._plan(path)
            differs = sorted(key for key in {*before, *plan} if before.get(key) != plan.get(key))
            if not resume:
                raise InputError(f"{self.folder.parent} holds an evaluation: go on with --resume, or --overwrite it")
            if differs:
                key = differs[0]
                was, now = _short(before.get(key)), _short(plan.get(key))
                raise InputError(
                    f"{self.folder.parent} was begun with {key}={was}, now it is {now}:"
                    " --resume goes on with the same evaluation only"
                )
            return
        elif resume:
            raise InputError(f"{self.folder.parent} holds no evaluation to resume: leave --resume away")
        write_whole(path, json.dumps(plan, indent=2) + "\n")

    def record(self, victim: str, step: str, start: int, count: int) -> Record:
        """What ``step`` did to the chunk that begins at image ``start``."""
        state = self.read(victim, step, start)
        if state is None:
            return Record.empty(count)
        found = state.tensors
        return Record(
            found["tried"], found["fooled"], found["answers"], found["queries"], float(state.values["seconds"])
        )

    def write_record(self, victim: str, step: str, start: int, record: Record, rows: Tensor, x_adv: Tensor) -> None:
        """Keeps the record, and adversarial images for the rows of the chunk that no step had fooled before."""
        old = self.read(victim, step, start)
        if old is not None:
            rows, x_adv = torch.cat([old.tensors["rows"], rows]), torch.cat([old.tensors["x_adv"], x_adv.cpu()])
        tensors = {name: getattr(record, name) for name in ("tried", "fooled", "answers", "queries")}
        self.write(victim, step, start, tensors | {"rows": rows, "x_adv": x_adv}, {"seconds": record.seconds})

    def fallen(self, victim: str, start: int) -> tuple[Tensor, Tensor, list[str]] | None:
        """(rows, images, steps): what was fooled of the chunk, by the step that did it first; None for nothing."""
        rows, images, names = [], [], []
        for path in sorted((self.folder / victim).glob(f"*/{start:08d}.safetensors")):
            found = load_state(path).tensors
            if len(found.get("rows", ())):
                rows.append(found["rows"])
                images.append(found["x_adv"])
                names += [path.parent.name] * len(found["rows"])
        return (torch.cat(rows), torch.cat(images), names) if rows else None

    def read(self, victim: str, unit: str, start: int) -> State | None:
        """What ``write`` wrote, or None."""
        path = self._path(victim, unit, start)
        return load_state(path) if path.exists() else None

    def write(
        self, victim: str, unit: str, start: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Keeps a unit's tensors and plain values."""
        save_state(self._path(victim, unit, start), tensors, values)

    def _path(self, victim: str, unit: str, start: int) -> Path:
        return self.folder / victim / unit / f"{start:08d}.safetensors"

    def _plan(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{path} is not the plan of an evaluation: use --overwrite to begin anew")
        return found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
