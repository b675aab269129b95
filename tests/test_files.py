"""A file is written whole or the previous one stays, whatever goes wrong on the way."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fdml.errors import InputError
from fdml.files import write_whole


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside the block the system refuses to let any file grow beyond ``size`` bytes (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("ä\n", "ä\n".encode()),
        (b"\x00\xff", b"\x00\xff"),
        (b"", b""),
        (lambda path: path.write_bytes(b"by a function"), b"by a function"),
    ],
    ids=["text", "bytes", "nothing", "function"],
)
def test_what_is_written_is_there(content: object, expected: bytes, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "file.txt"
    for _ in range(2):  # the second time, over the first
        write_whole(path, content)  # pyright: ignore[reportArgumentType]
        assert path.read_bytes() == expected
        assert list(path.parent.iterdir()) == [path]


def test_a_function_writes_to_a_file_of_the_same_suffix_in_the_same_folder(tmp_path: Path) -> None:
    seen = []

    def write(path: Path) -> None:
        seen.append(path)
        path.write_bytes(b"x")

    write_whole(tmp_path / "curves.png", write)
    assert seen[0].suffix == ".png"
    assert seen[0].parent == tmp_path
    assert seen[0].name.startswith(".")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_follow_the_umask(umask: int, tmp_path: Path) -> None:
    code = f"import os; os.umask({umask}); from fdml.files import write_whole; from pathlib import Path; "
    code += f"write_whole(Path({str(tmp_path / 'file')!r}), 'x')"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True, timeout=60)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_a_writer_that_fails_midway_changes_nothing(failure: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("previous")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise failure

    with pytest.raises(failure):
        write_whole(path, write)
    assert path.read_text() == "previous"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError) as caught:
        write_whole(path, write)
    assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert list(tmp_path.iterdir()) == []
    path.write_text("previous")
    with pytest.raises(InputError, match="No space left on device; the previous file is intact"):
        write_whole(path, write)
    assert path.read_text() == "previous"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_the_system_cuts_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_whole(path, "previous")
    with files_of_at_most(1000), pytest.raises(InputError, match="File too large; the previous file is intact"):
        write_whole(path, b"x" * 5000)
    assert path.read_text() == "previous"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.mkdir()
    (path / "inside").write_text("kept")
    with pytest.raises(InputError, match="Is a directory") as caught:
        write_whole(path, "new")
    assert str(path) in str(caught.value)
    assert (path / "inside").read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("kept")
    with pytest.raises(InputError) as caught:
        write_whole(tmp_path / "taken" / "file", "new")
    assert str(caught.value).startswith(f"cannot write {tmp_path}/taken/file: ")
    assert "previous" not in str(caught.value)
    assert (tmp_path / "taken").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("mode", [0o500, 0o000], ids=oct)
def test_a_folder_that_may_not_be_written(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "file").write_text("previous")
    folder.chmod(mode)
    try:
        with pytest.raises(InputError, match="Permission denied") as caught:
            write_whole(folder / "file", "new")
    finally:
        folder.chmod(0o700)
    assert str(folder / "file") in str(caught.value)
    # Of a folder that may not even be searched nobody can say what it holds.
    assert ("the previous file is intact" in str(caught.value)) == (mode == 0o500)
    assert (folder / "file").read_text() == "previous"
