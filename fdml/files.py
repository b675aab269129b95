"""Files are written whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from fdml.errors import InputError


def write_whole(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Writes a temporary file beside ``path``, flushes it to the disk and renames it into place.

    ``content`` is the content itself or a function that writes to the path it is given. A crash or a full disk at any
    moment leaves the previous file as it was; raises ``InputError`` where the system refuses to write.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays: writers such as matplotlib choose the format by it.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
    except OSError as error:
        # Unlike Path.exists, this asks a folder that may not be searched without raising.
        kept = "; the previous file is intact" if os.path.exists(path) else ""
        raise InputError(f"cannot write {path}: {error.strerror or error}{kept}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


# Read once: a temporary file is private to its owner, the file it becomes is as public as any other.
_UMASK = _umask()
