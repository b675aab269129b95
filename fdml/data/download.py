"""Downloads that are whole and unchanged, or do not happen."""

import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import Progress

from fdml.errors import InputError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Remote:
    """A file to download: its name, mirrors in order of preference, exact size in bytes and SHA-256.

    ``members``: for a tar archive, the (path inside, size in bytes) of what is wanted; they are written flat and the
    archive is not kept.
    """

    file: str
    urls: tuple[str, ...]
    size: int
    sha256: str
    members: tuple[tuple[str, int], ...] = ()


def fetch(remote: Remote, folder: Path) -> None:
    """Puts the file, or the members of the archive, into ``folder``; does nothing where they are already.

    Nothing gets its final name before its checksum is verified and its bytes are on disk, so an interrupted download
    leaves no half a file, and two processes may fetch the same file at once.

    Raises ``InputError`` that gives the reason of each mirror.
    """
    finals = [folder / Path(member).name for member, _ in remote.members] or [folder / remote.file]
    if all(final.is_file() for final in finals):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} could not be made ({error.strerror})") from error
    failures: list[str] = []
    for url in remote.urls:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            try:
                archive = Path(scratch) / remote.file
                _download(url, archive, remote)
                if remote.members:
                    _extract(archive, Path(scratch), remote)
                for final in finals:
                    os.replace(Path(scratch) / final.name, final)
                return
            except (OSError, EOFError, zlib.error, tarfile.TarError, http.client.HTTPException, InputError) as error:
                plain = type(error) is urllib.error.URLError
                reason = str(error.reason if plain else error).strip() or type(error).__name__
                failures.append(f"{url} failed ({reason})".replace("\n", " "))
    raise InputError("; ".join(failures))


def _download(url: str, target: Path, remote: Remote) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "fdml"})
    digest, total = hashlib.sha256(), 0
    with urllib.request.urlopen(request, timeout=30) as response, _written(target) as file, _progress() as progress:
        task = progress.add_task(remote.file, total=remote.size)
        while chunk := response.read(_CHUNK):
            total += len(chunk)
            if total > remote.size:
                raise InputError(f"larger than the expected {remote.size:,} bytes")
            digest.update(chunk)
            file.write(chunk)
            progress.advance(task, len(chunk))
    if total != remote.size:
        raise InputError(f"{total:,} bytes instead of {remote.size:,}")
    if digest.hexdigest() != remote.sha256:
        raise InputError(f"SHA-256 is {digest.hexdigest()}, expected {remote.sha256}")


def _extract(archive: Path, folder: Path, remote: Remote) -> None:
    """Copies the wanted members' bytes; no name, mode or link of the archive is ever applied to the disk."""
    wanted = dict(remote.members)
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            size = wanted.get(member.name)
            if size is None:
                continue
            source = tar.extractfile(member) if member.isreg() and member.size == size else None
            if source is None:
                raise InputError(f"{member.name} in {archive.name} is not a file of {size:,} bytes")
            with source, _written(folder / Path(member.name).name) as file:
                while chunk := source.read(_CHUNK):
                    file.write(chunk)
            del wanted[member.name]
    if wanted:
        raise InputError(f"{archive.name} has no {next(iter(wanted))}")


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
