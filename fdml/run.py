"""The run folder: what is in it, who may write it, and how a run finds its way back."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fdml
from fdml.errors import InputError
from fdml.files import write_whole
from fdml.recipe import Recipe, from_dict

_OURS = ("recipe.json", "metrics.jsonl", "student.safetensors", "student-last.safetensors", "teacher.safetensors")
_OUR_FOLDERS = ("report", "state")

CHOOSE = ("certified", "noisy", "pgd", "clean")
"""The best epoch is the one of the highest score on validation: of the first of these that its recipe has."""


class Run:
    """A folder with ``recipe.json``, ``metrics.jsonl``, ``teacher.safetensors``, ``student.safetensors`` (best on
    validation), ``student-last.safetensors``, ``report/`` and ``state/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.report = path / "report"
        self.metrics = path / "metrics.jsonl"

    def model(self, role: str, which: str = "") -> Path:
        """The file of the ``teacher`` or ``student``; ``which`` may be ``last``."""
        return self.path / f"{role}{'-' if which else ''}{which}.safetensors"

    def state(self, role: str) -> Path:
        """The resumable state of the training of ``role``; never shipped."""
        return self.path / "state" / f"{role}.safetensors"

    def best(self, role: str) -> Path:
        """The best model so far, before the run ends."""
        return self.path / "state" / f"{role}-best.safetensors"

    def begin(self, recipe: Recipe, data: Mapping[str, str], *, resume: bool, overwrite: bool) -> None:
        """Makes the folder this run's own.

        Raises ``InputError`` when it holds another run and neither ``resume`` nor ``overwrite`` is given, or when
        ``resume`` meets another recipe or other data.
        """
        held = [name for name in (*_OURS, *_OUR_FOLDERS) if (self.path / name).exists()]
        if held and overwrite:
            for name in held:
                target = self.path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink()
        elif held and not resume:
            raise InputError(
                f"{self.path} already holds a run ({', '.join(held)}): continue it with --resume, replace it with"
                " --overwrite, or name another folder with --out"
            )
        elif held:
            self._check_same(recipe, data)
            return
        content = {"fdml": fdml.__version__, "recipe": recipe.to_dict(), "data": dict(data)}
        write_whole(self.path / "recipe.json", json.dumps(content, indent=2) + "\n")

    def recipe(self) -> Recipe:
        """The recipe that the folder was begun with; raises ``InputError`` where there is none that can be read."""
        values = self._begun()["recipe"]
        try:
            return from_dict(values)
        except InputError as error:
            raise InputError(f"{self.path / 'recipe.json'}: {error}") from None

    def data(self) -> str:
        """The name of the data set that the folder was begun with."""
        return str(self._begun()["data"].get("name"))

    def summary(self) -> dict[str, Any] | None:
        """The closing summary, where the run has come that far."""
        path = self.report / "summary.json"
        if not path.exists():
            return None
        found = _parsed(_text(path))
        if found is None:
            raise InputError(f"{path} is not the summary of a run: write it again with fdml train --resume")
        return found

    def rows(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, without half a last line: what a kill in the middle of writing leaves.

        Raises ``InputError`` where any other line is no line of a run.
        """
        lines = _text(self.metrics).splitlines(keepends=True) if self.metrics.exists() else []
        rows = []
        for number, line in enumerate(lines, 1):
            row = _parsed(line)
            if row is not None and isinstance(row.get("role"), str) and isinstance(row.get("epoch"), int):
                rows.append(row)
            elif number < len(lines) or line.endswith("\n"):
                raise InputError(f"{self.metrics}: line {number} is not a line of a run: start again with --overwrite")
        return rows

    def keep_rows(self, role: str, epochs: int) -> None:
        """Drops the lines of ``role`` beyond the first ``epochs``: what a killed run wrote after its last state."""
        rows = [row for row in self.rows() if row["role"] != role or row["epoch"] <= epochs]
        if self.metrics.exists():
            write_whole(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Appends one line to ``metrics.jsonl``."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.metrics}: {error.strerror}") from error

    def _begun(self) -> dict[str, Any]:
        path = self.path / "recipe.json"
        if not path.exists():
            raise InputError(f"{path} is missing, so this run cannot be resumed: start again with --overwrite")
        content = _parsed(_text(path))
        if content is None or not isinstance(content.get("recipe"), dict) or not isinstance(content.get("data"), dict):
            raise InputError(f"{path} cannot be read as a recipe: start again with --overwrite")
        return content

    def _check_same(self, recipe: Recipe, data: Mapping[str, str]) -> None:
        # A key that came later than the run has its default, which is what the run had.
        begun, old_data = self.recipe().to_dict(), self._begun()["data"]
        for kind, old, new in (("recipe", begun, recipe.to_dict()), ("data", old_data, dict(data))):
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    raise InputError(
                        f"{self.path} was begun with {kind} {key}={old.get(key)!r}, not {new.get(key)!r}: resume it as"
                        " it was, or name another folder with --out"
                    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _parsed(text: str) -> dict[str, Any] | None:
    """The JSON object that the text is, or nothing."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
