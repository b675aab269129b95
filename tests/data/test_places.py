"""Finding files, and downloading them whole or not at all."""

import gzip
import hashlib
import http.server
import io
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_up import empty_machine  # noqa: F401

from fdml.data import load, places
from fdml.data.download import Remote, fetch
from fdml.errors import InputError

URLOPEN = urllib.request.urlopen  # before a fixture takes the network away


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


FORMS = (("a", "b"), ("c",))


def find(data_dir: Path | None) -> tuple[Path, ...]:
    return places.find("mnist", FORMS, [], data_dir, download=False)


def test_the_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, environment, system = tmp_path / "given", tmp_path / "environment", tmp_path / "system"
    monkeypatch.setenv("FDML_DATA", str(environment))
    monkeypatch.setattr(places, "_SYSTEM", {"mnist": (system,)})
    last_to_first = [
        places.cache("mnist"),
        system,
        environment / "mnist",
        environment / "MNIST" / "raw",
        environment,
        given / "mnist",
        given / "MNIST" / "raw",
        given,
    ]
    for folder in last_to_first:
        touch(folder, "a", "b.gz")
        assert find(given) == (folder / "a", folder / "b.gz")


def test_files_of_one_form_lie_in_one_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a")
    touch(tmp_path / "mnist", "b")
    (tmp_path / "c").mkdir()  # a folder is not a file
    with pytest.raises(InputError, match=r"\(.* has no b\)"):
        find(tmp_path)
    touch(tmp_path / "MNIST" / "raw", "c")
    assert find(tmp_path) == (tmp_path / "MNIST" / "raw" / "c",)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "svhn"])
def test_without_files_and_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDML_DATA", str(tmp_path / "environment"))
    with pytest.raises(InputError, match=r"https?://.* failed .*no network in tests") as caught:
        load(name, data_dir=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for place in (tmp_path, tmp_path / name, tmp_path / "environment" / name, places.cache(name)):
        assert str(place) in message
    with pytest.raises(InputError, match="allow the download, or put"):
        load(name, data_dir=tmp_path, download=False)


CONTENT = bytes(range(256)) * 20


def archive(**changes: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in (
            {"set/one": b"1", "set/two": b"22", "../escape": b"x", "set/extra": b"x"} | changes
        ).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("set/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return file.getvalue()


SERVED = {"/file": CONTENT, "/longer": CONTENT + b"x", "/shorter": CONTENT[:-1], "/other": CONTENT[::-1]}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = SERVED.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def network(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
    monkeypatch.setenv("no_proxy", "*")
    return server


def remote(base: str, *paths: str, content: bytes = CONTENT, members: tuple[tuple[str, int], ...] = ()) -> Remote:
    digest = hashlib.sha256(content).hexdigest()
    return Remote("file", tuple(base + path for path in paths), len(content), digest, members)


def test_a_download_is_verified_then_named(network: str, tmp_path: Path) -> None:
    fetch(remote(network, "/missing", "/other", "/file"), tmp_path / "deep" / "folder")
    assert [path.name for path in (tmp_path / "deep" / "folder").iterdir()] == ["file"]
    assert (tmp_path / "deep" / "folder" / "file").read_bytes() == CONTENT
    fetch(remote("http://127.0.0.1:1", "/file"), tmp_path / "deep" / "folder")  # already there: nothing is asked for


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/missing", "404"),
        ("/longer", "larger than the expected 5,120 bytes"),
        ("/shorter", "5,119 bytes instead of 5,120"),
        ("/other", "SHA-256 is"),
    ],
)
def test_a_bad_download_leaves_nothing(network: str, tmp_path: Path, path: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        fetch(remote(network, path), tmp_path)
    assert f"{network}{path}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


MEMBERS = (("set/one", 1), ("set/two", 2))


def test_an_archive_gives_only_what_is_wanted(network: str, tmp_path: Path) -> None:
    SERVED["/file.tar.gz"] = archive()
    fetch(remote(network, "/file.tar.gz", content=archive(), members=MEMBERS), tmp_path / "in")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["in", "in/one", "in/two"]
    assert (tmp_path / "in" / "two").read_bytes() == b"22"


@pytest.mark.parametrize(
    ("content", "members", "says"),
    [
        (archive(**{"set/two": b"much more"}), MEMBERS, "set/two in file is not a file of 2 bytes"),
        (archive(), (*MEMBERS, ("set/link", 0)), "set/link in file is not a file"),
        (archive(), (*MEMBERS, ("set/three", 3)), "file has no set/three"),
        (archive()[:-20], MEMBERS, "end|truncated"),
        (gzip.compress(b"not a tar", mtime=0), MEMBERS, "failed"),
        (b"not a gzip", MEMBERS, "not a gzip file"),
    ],
)
def test_a_bad_archive_leaves_nothing(
    network: str, tmp_path: Path, content: bytes, members: tuple[tuple[str, int], ...], says: str
) -> None:
    SERVED["/bad.tar.gz"] = content
    with pytest.raises(InputError, match=says):
        fetch(remote(network, "/bad.tar.gz", content=content, members=members), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    touch(tmp_path, "file")
    with pytest.raises(InputError, match="could not be made"):
        fetch(remote("http://127.0.0.1:1", "/x"), tmp_path / "file" / "below")
