"""The folder in which certificates gather while they are made."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdml.certify.certificate import Certificate, parse
from fdml.errors import InputError
from fdml.files import write_whole

_HEADER = "header.json"


@dataclass
class Ledger:
    """The folder in which certificates gather: a file a process, to which each is added as soon as it is made.

    A process that is killed loses the image under way and nothing else, and any number of processes can go on.
    """

    folder: Path

    def begin(self, header: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Opens the folder for this work.

        Raises ``InputError`` where it holds certificates already, unless ``overwrite``, or ``resume`` and the header is
        the same.
        """
        path = self.folder / _HEADER
        if path.exists() and not overwrite:
            if not resume:
                raise InputError(f"{self.folder.parent} holds certificates: go on with --resume, or --overwrite them")
            try:
                before = json.loads(path.read_text())
            except (OSError, ValueError):
                before = None
            if not isinstance(before, dict):
                raise InputError(f"{path} is not the header of certificates: use --overwrite to begin anew")
            now = json.loads(json.dumps(header))
            for key in sorted({*before, *now}):
                if before.get(key) != now.get(key):
                    was, is_ = json.dumps(before.get(key))[:60], json.dumps(now.get(key))[:60]
                    raise InputError(
                        f"{self.folder.parent} was begun with {key}={was}, now it is {is_}: --resume goes on with the"
                        " same work only"
                    )
            return
        if resume:
            raise InputError(f"{self.folder.parent} holds no certificates to go on with: leave --resume away")
        for old in self._parts():
            old.unlink()
        write_whole(path, json.dumps(header, indent=2) + "\n")

    def read(self) -> dict[int, Certificate]:
        """Every certificate so far, by image. A line that a kill cut short is not one."""
        found = {}
        for part in self._parts():
            for place, line in enumerate(part.read_text(encoding="utf-8").splitlines(keepends=True)):
                if line.endswith("\n"):
                    certificate = parse(line, f"{part}:{place + 1}")
                    found[certificate.index] = certificate
        return dict(sorted(found.items()))

    def add(self, certificate: Certificate, rank: int) -> None:
        """Adds a certificate to this process's file, and flushes it to the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"part-{rank}.jsonl"
        with path.open("ab+") as stream:
            end = stream.seek(0, os.SEEK_END)
            if end:
                stream.seek(end - 1)
                if stream.read(1) != b"\n":  # what a kill cut short ends here, and stays unread
                    self._cut(path)
            stream.write(certificate.to_json().encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _cut(self, path: Path) -> None:
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"))
